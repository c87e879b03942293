"""Comparisons written by hand: their outcomes are points of sweeps, so every change is known in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from funcprobe.errors import Note
from funcprobe.results.comparison import Comparison
from tests.cases.written_probe import provenance
from tests.cases.written_sweep import DIVERGENCE, ENTROPY, sweep

LAWS = {"entropy": ENTROPY, "kl": DIVERGENCE}


def comparison(lrs: Mapping[str, float] | None = None, notes: tuple[Note, ...] = (), **options: Any) -> Comparison:
    """Return a comparison of one update at several learning rates, each under a name."""
    lrs = {"grpo": 1e-5, "a third, $lr$": 1e-4} if lrs is None else lrs
    options = {"laws": LAWS, **options}
    outcomes = {name: sweep(lrs=(lr,), **options).points[0] for name, lr in lrs.items()}
    made = sweep(**options).provenance
    return Comparison(outcomes, provenance(evaluation=made.evaluation, batch=made.batch, mode=made.mode), 0.95, notes)
