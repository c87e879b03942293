"""The units of an attribution's columns, by their names."""

from __future__ import annotations

from collections.abc import Iterable

#: Columns in the unit of the observable.
_OBSERVABLE = frozenset({"contribution", "error", "low", "high", "gradient", "momentum", "decay", "rest"})

#: Columns in units of their own. Predictors carry an unknown scale, and advantages and rewards the user's.
_OWN = {
    "logp": "nats",
    "entropy": "nats",
    "mean_logp": "nats per token",
    "mean_entropy": "nats per token",
    "length": "tokens",
    "tokens": "tokens",
    "sequences": "sequences",
    "size": "entries",
}


def units_of(names: Iterable[str], unit: str) -> dict[str, str]:
    """Return the unit of every column that has one, the observable's being `unit`.

    Example:
        >>> units_of(["text", "contribution", "logp"], "nats per token")
        {'contribution': 'nats per token', 'logp': 'nats'}
    """
    known = {name: unit if _is_of_the_observable(name) else _OWN.get(name) for name in names}
    return {name: own for name, own in known.items() if own is not None}


def _is_of_the_observable(name: str) -> bool:
    return name in _OBSERVABLE or name.startswith(("through_", "batch "))
