"""The second order of a step: δF₂ = ½ D²F[Δθ, Δθ], by nested forward mode that forward over reverse checks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from funcprobe import engine
from funcprobe.data.rollouts import take
from funcprobe.engine.passes import Passes
from funcprobe.errors import InputError, NumericsError
from funcprobe.measurement.evidence import Evidence
from funcprobe.types import Leaves, Observable, Params, Rollouts

#: Sequences, and completion tokens of each, on which nested forward mode is held against forward over reverse.
CHECKED_SEQUENCES, CHECKED_TOKENS = 4, 64


def curved(
    passes: Passes,
    params: Params,
    direction: Leaves,
    eps: float,
    mode: Literal["auto", "forward", "reverse"],
) -> tuple[engine.Directional, float]:
    """Return the scores with ṡ and s̈, and by how much a check of s̈ failed; without s̈ where it cannot be trusted.

    `eps` is that of the model's arithmetic, in whose terms the check is judged.

    Raises:
        InputError: If the mode is unknown.
        NumericsError: With `mode="forward"`, if the check fails.
    """
    if mode not in ("auto", "forward", "reverse"):
        raise InputError(f"Unknown mode '{mode}' of the second order; expected 'auto', 'forward' or 'reverse'.")
    if mode == "reverse":
        return passes.directional(params, direction, "E, forward mode"), 0.0
    found = passes.directional(params, direction, "E, second order", order=2)
    off = _disagreement(passes, params, direction, found)
    if off <= max(1e-3, 4 * eps):
        return found, off
    if mode == "forward":
        raise NumericsError(
            f"Nested forward mode and forward over reverse disagree by {off:.1e} of the size of their terms: an "
            "operation of the model has a wrong second derivative; use mode='auto' or 'reverse'."
        )
    return found._replace(curvatures=None), off


def second_by_reverse(
    passes: Passes, params: Params, direction: Leaves, observable: Observable, along: engine.Directional
) -> float:
    """Return δF₂ with `f′·s̈` by forward over reverse: a reverse-mode graph a microbatch, and no error bar."""
    f = Evidence(passes.evaluation, along.scores, along.scores).of(observable)
    flat = along._replace(curvatures=engine.each(torch.zeros_like, along.scores))
    bent = passes.curvature_by_reverse(engine.cotangents(f, along.scores), params, direction, "E, forward over reverse")
    return 0.5 * (float(engine.second_derivative(f, flat)) + bent)


def _disagreement(passes: Passes, params: Params, direction: Leaves, found: engine.Directional) -> float:
    """Return how far Σ c·s̈ of a few beginnings is from forward over reverse, relative to Σ|c·s̈|.

    The cotangents are drawn once and for all, so that no observable that happens to have none hides a fault. The
    policy is causal: the beginning of a sequence is scored as it is in the whole.
    """
    assert found.curvatures is not None
    rows, few = _beginnings(passes.evaluation)
    shape, draw = few.completion_mask.shape, torch.Generator().manual_seed(0)
    bent = engine.each(lambda x: x[rows.to(x.device), : shape[1]], found.curvatures)
    fixed = engine.each(lambda x: torch.randn(shape, generator=draw, dtype=torch.float64).to(x.device), bent)
    by_reverse = passes._replace(evaluation=few, progress=None).curvature_by_reverse(
        fixed, params, direction, "check of the second order"
    )
    terms = engine.fields(engine.each(torch.mul, fixed, bent))
    size = float(terms.abs().sum())
    return abs(float(terms.sum()) - by_reverse) / size if size else abs(by_reverse)


def _beginnings(rollouts: Rollouts) -> tuple[Tensor, Rollouts]:
    """Return the rows of the shortest sequences, and their first tokens: a graph of them is small at any length."""
    rows = rollouts.attention_mask.sum(1).argsort(stable=True)[:CHECKED_SEQUENCES]
    few = take(rollouts, rows)
    columns = int(few.prompt_lengths.max()) + CHECKED_TOKENS
    return rows, Rollouts(
        few.ids[:, :columns],
        few.attention_mask[:, :columns],
        few.prompt_lengths,
        few.completion_mask[:, :CHECKED_TOKENS],
        few.temperature,
        few.group_ids,
        few.weight,
    )
