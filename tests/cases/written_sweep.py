"""Sweeps written by hand: every observable follows a cubic aη + bη² + cη³ that the test knows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from funcprobe.estimators.importance import WeightHealth
from funcprobe.estimators.uncertainty import Replicates
from funcprobe.measurement.outcome import Outcome
from funcprobe.measurement.readings import Reading, Sampled
from funcprobe.results.provenance import BatchCounts, Provenance
from funcprobe.results.sweep import SweepResult
from tests.cases.written_probe import provenance

LRS = (1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
ENTROPY = (-22.6, 3590.0, -2e4)  # falls; the crossover is at 22.6/3590 = 6.295e-3
REWARD = (16.6, -3000.0, 0.0)  # rises
DIVERGENCE = (0.0, 6760.0, -8e5)  # no first order
PROMPTS = 40

#: What float error a subtraction has here: above a tenth of the entropy's change at 1e-9 and 1e-8, below at 1e-7.
SUBTRACTION_ERROR = 5e-8
#: And a path: above a tenth of the entropy's remainder (3.6e-15) at 1e-9, below at 1e-8 (3.6e-13).
PATH_ERROR = 1e-15

UNITS = {"entropy": "nats per token", "reward": "reward"}
NAMES = {"entropy": "rao_blackwell/per_decision/token", "reward": "expected reward"}


def health(ess: float = 500.0) -> WeightHealth:
    return WeightHealth(ess, ess, ess, ess, 100.0, 200.0, 512.0, 0.31, 1.2, 0.4, 0.0, 0.1)


def replicated(laws: Mapping[str, tuple[float, float, float]], lr: float, spread: float) -> Sampled:
    """Return jackknife replicates in which the coefficients of every law vary from prompt to prompt."""
    linear = 1 + spread * torch.linspace(-1, 1, PROMPTS, dtype=torch.float64)
    square = 1 + spread * torch.linspace(1, -1, PROMPTS, dtype=torch.float64) ** 3
    columns, exact = [], []
    for a, b, c in laws.values():
        first, second = a * lr * linear, b * lr**2 * square
        columns += [first + second + c * lr**3 * linear, first, second]
        exact += [a * lr + b * lr**2 + c * lr**3, a * lr, b * lr**2]
    found = Replicates(torch.tensor(exact, dtype=torch.float64), torch.stack(columns, 1), PROMPTS, "jackknife")
    return Sampled(found, {name: 3 * k for k, name in enumerate(laws)})


def sweep(
    laws: Mapping[str, tuple[float, float, float]] | None = None,
    lrs: tuple[float, ...] = LRS,
    *,
    mode: str = "forward",
    order: int = 2,
    bars: bool = True,
    spread: float = 2e-3,
    path_below: float = 5e-5,
    caveats: Mapping[float, tuple[str, ...]] | None = None,
    **changes: Any,
) -> SweepResult:
    """Return a sweep of cubics, by default of the entropy alone: by path at small learning rates, else by difference.

    In reverse mode there is no path, no second order, no float error, and no bar but that of the change.
    """
    laws = {"entropy": ENTROPY} if laws is None else laws
    points = []
    for lr in lrs:
        sampled = replicated(laws, lr, spread)
        readings = {}
        for name, (a, b, c) in laws.items():
            change = a * lr + b * lr**2 + c * lr**3
            path = mode == "forward" and lr < path_below
            known = ["change"] + ["first_order", "remainder", "ratio"] * (mode == "forward")
            known += ["second_order"] * (mode == "forward" and order == 2)
            readings[name] = Reading(
                NAMES.get(name, name),
                UNITS.get(name, "units"),
                0.35,
                change,
                a * lr,
                b * lr**2 if order == 2 and mode == "forward" else None,
                "path" if path else "difference",
                2 if path else 0,
                None if mode == "reverse" else PATH_ERROR if path else SUBTRACTION_ERROR,
                change + SUBTRACTION_ERROR if path else change,
                {what: sampled.bar(name, what, 0.95) for what in known} if bars else {},
                (caveats or {}).get(lr, ()),
            )
        kept = sampled if bars else None
        points.append(Outcome(readings, {}, health(), lr, 2.0 * lr, 1e-5, 0.0, None, {}, sampled=kept))
    made = {"evaluation": BatchCounts(512, 3136, PROMPTS), "batch": BatchCounts(128, 757, 16), "mode": mode}
    made |= {field: changes.pop(field) for field in tuple(changes) if field in Provenance.__dataclass_fields__}
    return SweepResult(tuple(points), provenance(**made), **{"info": {"loss": 0.5}, **changes})


def with_reading(found: SweepResult, lr: float, name: str = "entropy", **fields: Any) -> SweepResult:
    """Return the sweep with some fields of one reading changed."""
    points = []
    for own, p in zip(found.lrs, found.points, strict=True):
        readings = {**p.readings, name: p.readings[name]._replace(**fields)} if math.isclose(own, lr) else p.readings
        points.append(dataclasses.replace(p, readings=readings))
    return dataclasses.replace(found, points=tuple(points))
