"""Two passes timed side by side: alternating, in one process, as a ratio per round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Ratio(NamedTuple):
    """Time of one pass over that of another."""

    median: float  #: of the rounds' ratios, wall clock
    low: float  #: lower quartile
    high: float  #: upper quartile
    cpu: float  #: median ratio of processor time, which other programs disturb less
    seconds: tuple[float, float]  #: median wall seconds of either pass


def side_by_side(
    first: Callable[[], Any], second: Callable[[], Any], rounds: int, device: str, warm: bool = False
) -> Ratio:
    """Time both passes in every round, the order swapped from round to round, after one untimed run of each.

    Where the process is `warm`, because it has run both on another batch, the untimed runs are left out.
    """
    if not warm:
        first(), second()
    walls, cpus = [], []
    for number in range(rounds):
        order = (first, second) if number % 2 == 0 else (second, first)
        taken = {f: _seconds(f, device) for f in order}
        walls.append((taken[first][0], taken[second][0]))
        cpus.append(taken[first][1] / taken[second][1])
    ratios = [a / b for a, b in walls]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else (ratios * 3)
    each = (statistics.median(a for a, _ in walls), statistics.median(b for _, b in walls))
    return Ratio(statistics.median(ratios), low, high, statistics.median(cpus), each)


def _seconds(run: Callable[[], Any], device: str) -> tuple[float, float]:
    """Return (wall, processor) seconds of one run, with the device's queue empty before and after."""
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    _wait(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
