"""Observables that are read beside the entropy, by the names that a configuration gives them."""

from __future__ import annotations

import functools
from collections.abc import Callable

from funcprobe import plugins
from funcprobe.errors import InputError
from funcprobe.estimators.divergence import kl
from funcprobe.estimators.returns import expected_reward, mean_length
from funcprobe.types import Observable

#: funcprobe's own; other packages add theirs by an entry point in `funcprobe.observables`.
OBSERVABLES: dict[str, Callable[[], Observable]] = {
    "reward": expected_reward,
    "kl": kl,
    "kl_before": functools.partial(kl, "before"),
    "length": mean_length,
}


def observable_names() -> tuple[str, ...]:
    """Return every name that `observable_named` knows, those of other packages last."""
    return plugins.names("observable", OBSERVABLES)


def observable_named(name: str) -> Observable:
    """Return the observable of that name, made with its defaults.

    Raises:
        InputError: If there is none, or another package's cannot be loaded or is no observable.

    Example:
        >>> observable_named("length").unit
        'tokens'
    """
    factory = plugins.find("observable", name, OBSERVABLES)
    if factory is None:
        raise InputError(f"There is no observable named '{name}'; the observables are {', '.join(observable_names())}.")
    made = factory()
    if not isinstance(made, Observable) or isinstance(made, type):
        error = plugins.wrong("observable", name, made)
        raise error
    return made
