"""The batch that all processes draw together, each of them a part of it."""

from __future__ import annotations

from funcprobe.data.rollouts import concatenate, to_device
from funcprobe.errors import InputError
from funcprobe.parallel.world import world
from funcprobe.types import Rollouts


def gather_rollouts(own: Rollouts | None) -> Rollouts:
    """Return the rollouts of all processes in the order of their ranks, whole in every process.

    A trainer that samples in several processes has a part of U in each; a verb wants all of U in each, and shares its
    rows out by itself. Rows of one prompt stay one group, wherever they were drawn. A process without rows gives None.

    Raises:
        InputError: If no process has any rows, or the parts do not fit together.
    """
    parts = [part for part in world().all_of(None if own is None else to_device(own, "cpu")) if part is not None]
    if not parts:
        raise InputError("No process has any rollouts to gather; at least one has to bring some.")
    whole = concatenate(parts)
    return whole if own is None else to_device(whole, own.ids.device)
