"""A part of E on which a curve is chosen, and how far two lines over it are apart on all of E."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe import engine
from funcprobe.data.rollouts import take
from funcprobe.measurement.change import one_rounding
from funcprobe.measurement.curve import SMALL
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.line import Line
from funcprobe.measurement.path import EPS64
from funcprobe.types import Observable, Rollouts

#: Lines are chosen on a part of E: this share of the rows, and at least so many, where all of E are so many times more.
SHARE, FEWEST, LEAST_SAVED = 16, 16, 4


class Held(NamedTuple):
    """The curve on some rows of E, and one with a node more, which it is held against."""

    rollouts: Rollouts  #: those rows
    total: int  #: how many there are
    coarse: Line
    fine: Line


class Apart(NamedTuple):
    """How far two lines are apart somewhere, relative to Σ|terms|."""

    off: float  #: the difference of ΔF over all of E
    size: float  #: |ΔF|, or `SMALL` where that is less


def part_of(rollouts: Rollouts) -> tuple[Tensor, Rollouts]:
    """Return some rows of E and their rollouts, spread evenly; all where that would not be many fewer.

    Rows of one prompt come in pairs, or alone where the prompt has no other: an observable may compare them.
    """
    total = rollouts.ids.shape[0]
    fewer = total // max(FEWEST, total // SHARE)  # of so many pairs one is taken
    if fewer < LEAST_SAVED:
        return torch.arange(total, device=rollouts.ids.device), rollouts
    prompts, counts = rollouts.group_ids.unique(return_inverse=True, return_counts=True)[1:]
    order = prompts.argsort(stable=True)
    rank = torch.arange(total, device=order.device) - (counts.cumsum(0) - counts)[prompts[order]]
    size = counts[prompts[order]]
    paired = (rank // 2 * 2 + 2 <= size) | (size == 1)
    first = paired & (rank % 2 == 0)
    rows = order[paired & torch.isin(first.cumsum(0) - 1, torch.arange(0, total, fewer, device=order.device))]
    return rows.sort().values, take(rollouts, rows.sort().values)


def apart(held: Held, x: float, observable: Observable) -> Apart:
    """Return by how much a node more changes ΔF of all of E.

    What it changes is a sum over rows, of which some are known: with their mean μ and spread σ the sum over all N is
    `√(N²μ² + Nσ²)`, where μ² is what the n known ones show, less σ² (1/n − 1/N), which is chance.
    """
    evidence = Evidence(held.rollouts, held.fine.anchor, held.fine.scores(x))
    size = evidence.magnitude(observable)
    if size <= evidence.noise(observable):
        return Apart(0.0, SMALL)
    c = engine.cotangents(evidence.of(observable), evidence.after)
    parts = engine.each(lambda c, one, other: (c * (one - other)).sum(1), c, held.coarse.scores(x), evidence.after)
    rows, total = engine.fields(parts).sum(0), held.total
    n, spread = len(rows), float(rows.var()) if len(rows) > 1 else 0.0
    square = max(0.0, float(rows.mean()) ** 2 - spread * (1 / n - 1 / total))
    off = math.sqrt(total**2 * square + (total * spread if total > n else 0.0))
    # scores are sums of the anchor and a change, rounded to float64: of a tiny change that is all that differs
    rounding = 2 * one_rounding(evidence, observable, EPS64)
    change = abs(float(evidence.change(observable))) / size
    beyond = off * n / total - rounding
    return Apart((0.0 if beyond <= 0 else beyond) / size, max(change, SMALL))
