"""Every training loss by name: the eight losses of the field and the variants that preserve entropy.

| name | what it is |
|---|---|
| reinforce, rloo, grpo, bnpo, dr_grpo, dapo, gspo, cispo | losses under TRL's names: see `losses` |
| clip_cov, kl_cov, entropy_bonus, top_entropy_quantile, drop_negatives | one of those, changed: see `variants` |

Each is a `PolicyGradient`, whose docstring says how advantage, ratio and averaging meet.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from funcprobe import plugins
from funcprobe.errors import InputError
from funcprobe.objectives.losses import BASES
from funcprobe.objectives.policy_gradient import PolicyGradient
from funcprobe.objectives.variants import (
    VARIANTS,
)
from funcprobe.types import Objective

#: funcprobe's own objectives by name; other packages add theirs by an entry point in `funcprobe.objectives`.
OBJECTIVES: dict[str, Callable[..., PolicyGradient]] = {**BASES, **VARIANTS}


def objective_names() -> tuple[str, ...]:
    """Return every name that `objective` knows, those of other packages last."""
    return plugins.names("objective", OBJECTIVES)


def objective(name: str, **options: Any) -> Objective:
    """Return the objective of that name with those options, as a configuration file asks for it.

    The options of a variant are its own and, where `base` is a name, those of the base.

    Raises:
        InputError: If the name or an option is not known, a value is out of range, or another package's cannot be
            loaded or is no objective.

    Example:
        >>> objective("dapo", epsilon=0.1).epsilon_high
        0.28
        >>> objective("clip_cov", base="dapo", clip_cov_ratio=0.01, epsilon=0.1).name
        'clip_cov(dapo)'
    """
    factory, base = factory_of(name), options.get("base", "grpo")
    valid = options_of(name, base)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in valid.values())
    if unknown := [option for option in options if option not in valid and not takes_any]:
        over = f" over '{base}'" if name in VARIANTS and isinstance(base, str) else ""
        raise InputError(f"'{name}'{over} has no option '{unknown[0]}'; its options are {', '.join(valid)}.")
    made = factory(**options)
    if not isinstance(made, Objective) or isinstance(made, type):
        error = plugins.wrong("objective", name, made)
        raise error
    return made


def factory_of(name: str) -> Callable[..., Any]:
    """Return the function that makes objectives of that name.

    Raises:
        InputError: If there is none, or another package's cannot be loaded.
    """
    factory = plugins.find("objective", name, OBJECTIVES)
    if factory is None:
        raise InputError(f"There is no objective named '{name}'; the objectives are {', '.join(objective_names())}.")
    return factory


def options_of(name: str, base: object = "grpo") -> Mapping[str, inspect.Parameter]:
    """Return the options of an objective by name; those of a variant are its own and its base's.

    A base that is no name of a loss adds none: an objective that is already made has its options.
    """
    own = inspect.signature(factory_of(name)).parameters
    if name not in VARIANTS:
        return own
    inherited = inspect.signature(BASES[base]).parameters if isinstance(base, str) and base in BASES else {}
    return {**{option: p for option, p in own.items() if p.kind is not p.VAR_KEYWORD}, **inherited}
