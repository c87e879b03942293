"""Scores on a line of parameters θ + x·v, from tangents at a few of its points, where nothing cancels, or values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Legendre, Polynomial, legendre
from torch import Tensor

from funcprobe import engine, tree
from funcprobe.engine.passes import Passes
from funcprobe.optimizers.kernels import laid_out_as
from funcprobe.types import Leaves, Params, TokenScores


class Line(NamedTuple):
    """The scores at θ + x·v for every x of [0, length], from the tangents along v at some nodes, or from values there.

    `s(x) = s(0) + ∫₀ˣ p(u) du`, with p the polynomial through the tangents. `p(0)` is the tangent at θ itself, so that
    the change of a score is as accurate relative to itself for a small x as for a large one. With secants in their
    place, `(s(x_k) − s(0)) / x_k`, it is `s(x) = s(0) + x p(x)`: a node takes a scoring pass instead of a forward-mode
    one, and what rounding does to a value is relative to its whole change.
    """

    anchor: TokenScores  #: [B, T] at θ
    length: float  #: the largest x
    nodes: tuple[float, ...]  #: x of each slope, 0 first
    slopes: tuple[TokenScores, ...]  #: [B, T], ds/dx at 0, and at each other node ds/dx, or the secant from 0
    by_values: bool = False  #: whether these are secants

    @classmethod
    def straight(cls, along: engine.Directional, length: float = 1.0) -> Line:
        """Return the line of first order, whose only node is θ."""
        return cls(along.scores, length, (0.0,), (along.tangents,))

    def scores(self, x: float) -> TokenScores:
        """Return `s(x)` `[B, T]`."""
        basis = _basis(self.nodes, self.length)
        weights = [float(x * p(x) if self.by_values else p.integ(lbnd=0.0)(x)) for p in basis]
        return engine.each(torch.add, self.anchor, self._sum(weights))

    def curvature(self) -> TokenScores:
        """Return `p′(0)` `[B, T]`, of secants twice that: it stands for the second derivative of the scores at θ."""
        c = 2.0 if self.by_values else 1.0
        return self._sum([c * float(p.deriv()(0.0)) for p in _basis(self.nodes, self.length)])

    def nearness(self, x: float) -> float:
        """Return the share of its largest error, relative to x, that the line has up to an x, to leading order."""
        at = tuple(node / self.length for node in self.nodes)
        return min(1.0, _steepness(at, self.by_values) * x / self.length)

    def without(self, x: float) -> Line:
        """Return the line that leaves one node out."""
        kept = [k for k, node in enumerate(self.nodes) if node != x]
        return self._replace(nodes=tuple(self.nodes[k] for k in kept), slopes=tuple(self.slopes[k] for k in kept))

    def _sum(self, weights: Sequence[float]) -> TokenScores:
        def weighted(*each: Tensor) -> Tensor:
            return torch.stack([w * x for w, x in zip(weights, each, strict=True)]).sum(0)

        return engine.each(weighted, *self.slopes)


def walk(
    along: engine.Directional,
    nodes: Sequence[float],
    slopes_at: Callable[[float], TokenScores],
    length: float = 1.0,
    by_values: bool = False,
) -> Line:
    """Return the line through the slopes at some nodes.

    Args:
        along: Scores and tangents at θ.
        nodes: In units of the length, 0 first: see `radau`, `even` and `spread`.
        slopes_at: Returns the tangents at an x, or the secants; see `tangents_along` and `secants_along`.
        length: The largest x.
        by_values: Whether they are secants.
    """
    at = tuple(length * x for x in nodes)
    slopes = (along.tangents, *(slopes_at(x) for x in at[1:]))
    return Line(along.scores, length, at, slopes, by_values)


def tangents_along(passes: Passes, params: Params, direction: Leaves) -> Callable[[float], TokenScores]:
    """Return the function from x to the tangents of E's scores along v at θ + x·v: a forward-mode pass each."""

    def tangents_at(x: float) -> TokenScores:
        return passes.directional(along_line(params, direction, x), direction, "E along the line").tangents

    return tangents_at


def secants_along(
    passes: Passes, params: Params, direction: Leaves, anchor: TokenScores, order: Literal[0, 1, 2]
) -> Callable[[float], TokenScores]:
    """Return the function from x to `(s(θ + x·v) − s(θ)) / x` over E, in the anchor's arithmetic: one pass each."""

    def secants_at(x: float) -> TokenScores:
        scores = passes.scores(along_line(params, direction, x), "E along the line", order)
        return engine.each(lambda s, before: (s - before) / x, scores, anchor)

    return secants_at


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


@cache
def spread(n: int) -> tuple[float, ...]:
    """Return the n + 1 nodes on [0, 1], both ends among them, whose secants leave the least error relative to x.

    To leading order that is the product over nodes, which no polynomial with roots at both ends has smaller than
    Chebyshev's, stretched until its first and last root are there.

    Example:
        >>> [round(x, 4) for x in spread(3)]
        [0.0, 0.2929, 0.7071, 1.0]
    """
    roots = np.sin(math.pi * (2 * np.arange(n + 1) - n) / (2 * (n + 1)))  # Chebyshev's, from −1 up; 0 is exact
    return (0.0, *(float(x) for x in (1 + roots / roots[-1])[1:-1] / 2), 1.0)


@cache
def _steepness(nodes: tuple[float, ...], by_values: bool) -> float:
    """Return how steeply the error of a line on [0, 1] relative to x starts at 0, in units of its largest value."""
    product = Polynomial.fromroots(nodes)
    error = product if by_values else product.integ(lbnd=0) // Polynomial([0.0, 1.0])
    largest = float(np.abs(error(np.linspace(0.0, 1.0, 1001))).max())
    return abs(float(error.deriv()(0.0))) / largest


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
