"""The catalogue: every hostile input by name, in the order of what it spoils."""

from __future__ import annotations

from tests.hostile import (
    adapters,
    checkpoints,
    configurations,
    dumps,
    optimizers,
    places,
    prompts,
    results,
    rollouts,
    shards,
    words,
)
from tests.hostile.room import Case

_TABLES = (words, configurations, places, rollouts, dumps, prompts, checkpoints, adapters, optimizers, shards, results)


def _by_name() -> dict[str, Case]:
    """Return the cases by name.

    Raises:
        ValueError: If two have one name.
    """
    found: dict[str, Case] = {}
    for case in (case for table in _TABLES for case in table.CASES):
        if case.name in found:
            raise ValueError(f"two cases are called {case.name}")
        found[case.name] = case
    return found


CASES = _by_name()
