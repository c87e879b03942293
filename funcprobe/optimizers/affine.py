"""A step of an optimizer as a function of gradient, state and parameters, in closed form and in float64.

`Δθ = scale ⊙ g + momentum + decay` with the denominators held at their actual values. The terms are built from
parameters, state, gradient and hyperparameters, so nothing nearly equal is ever subtracted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Terms(NamedTuple):
    """One leaf's step in float64: `Δθ = scale ⊙ g + momentum + decay`."""

    scale: Tensor  #: what multiplies the gradient, leaf-shaped
    momentum: Tensor  #: the part that comes from the optimizer's state
    decay: Tensor  #: the part that comes from weight decay


class Form(NamedTuple):
    """One leaf's step: `Δθ = (a g + b m + c θ) / denominator + d θ`, of which only the denominator is an array."""

    gradient: float  #: a
    momentum: float = 0.0  #: b
    coupled: float = 0.0  #: c: of a decay that is added to the gradient
    decay: float = 0.0  #: d: of a decay that is not
    buffer: Tensor | None = None  #: m: first moment or momentum buffer; None where there is none
    denominator: Tensor | None = None  #: float64; None where it is 1

    def terms(self, theta: Tensor) -> Terms:
        """Return the step's parts at the parameters, float64."""
        wide = theta.double()
        scale, parts = torch.full_like(wide, self.gradient), torch.zeros_like(wide)
        if self.buffer is not None:
            parts = self.buffer.double() * self.momentum
        decay = wide * self.coupled
        if self.denominator is not None:
            scale, parts, decay = (x / self.denominator for x in (scale, parts, decay))
        return Terms(scale, parts, decay + wide * self.decay)

    def step(self, theta: Tensor, gradient: Tensor) -> Tensor:
        """Return Δθ at parameters and gradient, float64: the sum of its parts, in as few passes as there are terms."""
        moved = gradient * self.gradient
        if self.buffer is not None and self.momentum != 0:
            moved = moved.add_(self.buffer, alpha=self.momentum)
        if self.coupled != 0:
            moved = moved.add_(theta, alpha=self.coupled)
        if self.denominator is not None:
            moved = moved / self.denominator
        return moved if self.decay == 0 else moved.add_(theta, alpha=self.decay)
