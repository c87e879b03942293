"""A step taken again without some tokens of U: the truth that attribution owes.

The gradient is linear in the tokens' shares of it, `g = Σ_jt (∂s_jt/∂θ)ᵀ ∂loss/∂s_jt`, so a batch without some tokens,
under its old normaliser, has the gradient that is left when their shares are taken out. Only rows that lose a token are
passed again. Picks of a modifier stay as they were made on the whole batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe.attribution.step_parts import StepParts
from funcprobe.engine.passes import Passes
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.update import Update
from funcprobe.types import Gradients, Observable, TokenScores


class Resteps(NamedTuple):
    """One step and its evaluation rollouts, on which it is measured again and again."""

    parts: StepParts
    passes: Passes  #: over E
    observable: Observable
    anchor: TokenScores  #: of E at θ

    @classmethod
    def of(cls, parts: StepParts, passes: Passes, observable: Observable) -> Resteps:
        """Return the re-steps of a step, with one pass over E."""
        return cls(parts, passes, observable, passes.scores(parts.params, "E at θ"))

    def change(self, drop: Tensor | None = None) -> float:
        """Return ΔF of the true step without the tokens where `drop [B, T]` is True; of the whole step for None.

        It costs a backward pass over the rows that lose a token, and a scoring pass over E. ΔF is a difference, as of
        `method="difference"` in a probe: its float error is that of the scores.

        Raises:
            NumericsError: If a score or the step is not finite.
        """
        parts = self.parts
        gradient = parts.gradient if drop is None else without(parts, drop)
        made = parts.step.policy, parts.rule.optimizer, parts.params, parts.opt_state, gradient
        update = Update.from_gradient(*made, parts.lr, parts.rule.max_grad_norm)
        after = self.passes.scores(update.take().params, "E at θ′")
        return float(Evidence(self.passes.evaluation, self.anchor, after).change(self.observable))


def without(parts: StepParts, drop: Tensor) -> Gradients:
    """Return the gradient of the loss without the tokens where `drop [B, T]` is True, normaliser unchanged."""
    rows = drop.any(1).nonzero().flatten()
    if not len(rows):
        return parts.gradient
    dropped = parts.gradient_of(rows, drop)
    return {name: None if g is None else g - dropped[name].to(g) for name, g in parts.gradient.items()}


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Return Spearman's rank correlation of two vectors; ties share the mean of their ranks, nan where one is flat."""
    return correlation(_ranks(x), _ranks(y))


def correlation(x: Tensor, y: Tensor) -> float:
    """Return Pearson's correlation of two vectors; nan where one is flat."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    size = (x @ x).sqrt() * (y @ y).sqrt()
    return float(x @ y / size) if float(size) > 0 else float("nan")


def _ranks(x: Tensor) -> Tensor:
    below, equal = (x[None, :] < x[:, None]).sum(1), (x[None, :] == x[:, None]).sum(1)
    return below.double() + (equal.double() - 1) / 2 + torch.ones((), dtype=torch.float64)
