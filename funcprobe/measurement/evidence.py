"""The scores that the model passes of one step leave: every number about any observable is a function of them.

And of the base weights `a [B]` of the rollouts: a jackknife reads the same evidence with other weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe import engine
from funcprobe.types import Observable, Rollouts, TokenScores

#: Some tens of roundings, of a sum of thousands of terms.
NOISE = 64 * torch.finfo(torch.float64).eps


class Evidence(NamedTuple):
    """The scores that one step leaves on the evaluation rollouts, and the values of observables made from them."""

    rollouts: Rollouts  #: E
    anchor: TokenScores  #: [B, T] at θ
    after: TokenScores  #: [B, T] at θ′ as stored, or at θ + Δθ by a path
    along: engine.Directional | None = None  #: at θ, with tangents along Δθ; None in reverse mode

    def of(self, observable: Observable, a: Tensor | None = None) -> engine.Functional:
        """Return the observable as a function of scores alone, with base weights `a [B]`, by default E's own."""
        rollouts = self.rollouts if a is None else self.rollouts._replace(weight=a)
        return lambda scores: observable(scores, self.anchor, rollouts)

    def before(self, observable: Observable, a: Tensor | None = None) -> Tensor:
        """Return F(θ)."""
        return self.of(observable, a)(self.anchor)

    def change(self, observable: Observable, a: Tensor | None = None) -> Tensor:
        """Return ΔF, a float64 subtraction of functions of scores."""
        f = self.of(observable, a)
        return f(self.after) - f(self.anchor)

    def first_order(self, observable: Observable, a: Tensor | None = None) -> Tensor:
        """Return δF₁ = DF(θ)[Δθ]."""
        assert self.along is not None
        return engine.derivative(self.of(observable, a), self.along)[1]

    def second_order(self, observable: Observable, a: Tensor | None = None) -> Tensor:
        """Return δF₂ = ½ D²F(θ)[Δθ, Δθ]."""
        assert self.along is not None
        return 0.5 * engine.second_derivative(self.of(observable, a), self.along)

    def orders(self, observable: Observable, a: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return δF₁ and δF₂ from one pass over the functions of scores, where curvatures were taken."""
        assert self.along is not None
        first, second = engine.derivatives(self.of(observable, a), self.along)
        return first, 0.5 * second

    def noise(self, observable: Observable) -> float:
        """Return the size below which a change of the observable is float64 rounding of F alone."""
        return NOISE * abs(float(self.before(observable)))

    def magnitude(self, observable: Observable, since: TokenScores | None = None) -> float:
        """Return Σ|∂F/∂s ⊙ (s(θ′) − s(θ))| over tokens and fields: the size of the terms that make ΔF.

        The cotangents are taken at θ′, where those of a divergence are not 0; for a small step this is Σ|terms| of δF₁.
        With `since`, other scores stand in for those at θ: the size of what has changed since then.
        """
        c = engine.cotangents(self.of(observable), self.after)
        before = self.anchor if since is None else since
        parts = engine.each(lambda c, x, y: (c * (x - y)).abs().sum(), c, self.after, before)
        return float(engine.fields(parts).sum())
