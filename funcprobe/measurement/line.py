"""Scores on a line of parameters θ + x·v, as integrals of their tangents at a few of its points: nothing cancels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Legendre, Polynomial, legendre
from torch import Tensor

from funcprobe import engine, tree
from funcprobe.engine.passes import Passes
from funcprobe.optimizers.kernels import laid_out_as
from funcprobe.types import Leaves, Params, TokenScores


class Line(NamedTuple):
    """The scores at θ + x·v for every x of [0, length], from the tangents along v at some nodes.

    `s(x) = s(0) + ∫₀ˣ p(u) du`, with p the polynomial through the tangents. `p(0)` is the tangent at θ itself, so that
    the change of a score is as accurate relative to itself for a small x as for a large one.
    """

    anchor: TokenScores  #: [B, T] at θ
    length: float  #: the largest x
    nodes: tuple[float, ...]  #: x of each tangent, 0 first
    tangents: tuple[TokenScores, ...]  #: [B, T], ds/dx at each node

    @classmethod
    def straight(cls, along: engine.Directional, length: float = 1.0) -> Line:
        """Return the line of first order, whose only node is θ."""
        return cls(along.scores, length, (0.0,), (along.tangents,))

    def scores(self, x: float) -> TokenScores:
        """Return `s(x)` `[B, T]`."""
        integrals = [float(p.integ(lbnd=0.0)(x)) for p in _basis(self.nodes, self.length)]
        return engine.each(torch.add, self.anchor, self._sum(integrals))

    def curvature(self) -> TokenScores:
        """Return `p′(0)` `[B, T]`, which stands for the second derivative of the scores along v at θ."""
        return self._sum([float(p.deriv()(0.0)) for p in _basis(self.nodes, self.length)])

    def _sum(self, weights: Sequence[float]) -> TokenScores:
        def weighted(*each: Tensor) -> Tensor:
            return torch.stack([w * x for w, x in zip(weights, each, strict=True)]).sum(0)

        return engine.each(weighted, *self.tangents)


def walk(
    along: engine.Directional, nodes: Sequence[float], tangents_at: Callable[[float], TokenScores], length: float = 1.0
) -> Line:
    """Return the line through the tangents at some nodes.

    Args:
        along: Scores and tangents at θ.
        nodes: In units of the length, 0 first: see `radau` and `even`.
        tangents_at: Returns the tangents at an x; see `tangents_along`.
        length: The largest x.
    """
    at = tuple(length * x for x in nodes)
    return Line(along.scores, length, at, (along.tangents, *(tangents_at(x) for x in at[1:])))


def tangents_along(passes: Passes, params: Params, direction: Leaves) -> Callable[[float], TokenScores]:
    """Return the function from x to the tangents of E's scores along v at θ + x·v: a forward-mode pass each."""

    def tangents_at(x: float) -> TokenScores:
        return passes.directional(along_line(params, direction, x), direction, "E along the line").tangents

    return tangents_at


@cache
def radau(n: int) -> tuple[float, ...]:
    """Return the n + 1 nodes of the Radau rule on [0, 1] with 0 among them: the best for the integral up to 1.

    They are the roots of `P_n + P_{n+1}`, moved from [−1, 1]; the rule is exact for polynomials of degree 2n.

    Example:
        >>> [round(x, 4) for x in radau(2)]
        [0.0, 0.3551, 0.8449]
    """
    roots = np.sort(legendre.legroots([0.0] * n + [1.0, 1.0]).real)
    return (0.0, *(float((1 + root) / 2) for root in roots[1:]))


@cache
def even(n: int) -> tuple[float, ...]:
    """Return the n + 1 nodes on [0, 1], 0 among them, of the least error for integrals up to every x, relative to x.

    To leading order that error is `∫₀ˣ ω / x`, with ω the product over nodes: a polynomial of degree n + 1 that is 0 at
    0. The flattest one is Chebyshev's, stretched until its first root is at 0. For the integral up to 1 alone it is
    worse than `radau`, at its worst x better: by 1.7 for n = 2.

    Example:
        >>> [round(x, 4) for x in even(2)]
        [0.0, 0.2829, 0.7613]
    """
    first = math.cos(math.pi / (2 * (n + 1)))
    flattest = Chebyshev.basis(n + 1)(Polynomial([-first, 1 + first]))
    roots = np.sort((flattest * Polynomial([0.0, 1.0])).deriv().roots().real)
    return (0.0, *(float(x) for x in roots[1:]))


def steepness(n: int) -> float:
    """Return how steeply the error of `even(n)` relative to x starts at 0, in units of its largest value."""
    first = math.pi / (2 * (n + 1))
    return (n + 1) * (1 + math.cos(first)) / math.sin(first)


@lru_cache(maxsize=64)
def _basis(nodes: tuple[float, ...], length: float) -> tuple[Legendre, ...]:
    """Return Lagrange's polynomials of the nodes: each is 1 at its own node and 0 at the others."""
    x = 2 * np.array(nodes) / length - 1
    coefficients = np.linalg.inv(legendre.legvander(x, len(nodes) - 1))
    return tuple(Legendre(column, domain=[0.0, length]) for column in coefficients.T)


def along_line(params: Params, direction: Leaves, x: float) -> Params:
    """Return θ + x·v, added in float64 and rounded once to the dtype of the parameters."""
    return tree.map_(lambda p, v: on_line(p, v, x), params, direction)


def on_line(p: Tensor, v: Tensor, x: float) -> Tensor:
    """Return one leaf of θ + x·v, added in float64 piece by piece, and rounded once to the dtype of the parameters."""
    found = torch.empty(p.shape, dtype=p.dtype, device=p.device)
    for into, theta, along in zip(*(tree.pieces(leaf.detach(), p.device) for leaf in (found, p, v)), strict=True):
        into.copy_(theta.double() + x * along.to(p.device).double())
    return laid_out_as(found, p)
