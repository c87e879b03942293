"""Scores on a line of parameters θ + x·v, as integrals of their tangents at a few of its points: nothing cancels."""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial import Legendre, legendre
from torch import Tensor

from funcprobe import engine, tree
from funcprobe.engine.passes import Passes
from funcprobe.types import Params, TokenScores


class Line(NamedTuple):
    """The scores at θ + x·v for every x of [0, 1], from the tangents along v at the nodes of a Radau rule.

    `s(x) = s(0) + ∫₀ˣ p(u) du`, with p the polynomial through the tangents. `p(0)` is the tangent at θ itself, so that
    the change of a score is as accurate relative to itself for a small x as for a large one.
    """

    anchor: TokenScores  #: [B, T] at θ
    nodes: tuple[float, ...]  #: x of each tangent, 0 first
    tangents: tuple[TokenScores, ...]  #: [B, T], ds/dx at each node

    @classmethod
    def straight(cls, along: engine.Directional) -> Line:
        """Return the line of first order, whose only node is θ."""
        return cls(along.scores, (0.0,), (along.tangents,))

    def scores(self, x: float) -> TokenScores:
        """Return `s(x)` `[B, T]`."""
        return engine.each(torch.add, self.anchor, self._sum(tuple(float(p.integ(lbnd=0.0)(x)) for p in _basis(self.nodes))))

    def curvature(self) -> TokenScores:
        """Return `p′(0)` `[B, T]`, which stands for the second derivative of the scores along v at θ."""
        return self._sum(tuple(float(p.deriv()(0.0)) for p in _basis(self.nodes)))

    def of_rows(self, rows: Tensor, width: int) -> Line:
        """Return the line of some rows of the batch, cut to the width of their own longest completion."""

        def part(x: Tensor) -> Tensor:
            return x[rows.to(x.device), :width]

        return Line(engine.each(part, self.anchor), self.nodes, tuple(engine.each(part, t) for t in self.tangents))

    def _sum(self, weights: tuple[float, ...]) -> TokenScores:
        def weighted(*each: Tensor) -> Tensor:
            return torch.stack([w * x for w, x in zip(weights, each, strict=True)]).sum(0)

        return engine.each(weighted, *self.tangents)


def walk(
    passes: Passes,
    params: Params,
    direction: Params,
    along: engine.Directional,
    n: int,
    known: MutableMapping[float, TokenScores] | None = None,
) -> Line:
    """Return the line with n nodes beside θ, whose tangents are known: n forward-mode passes over E.

    `known` are tangents by the x of their node; those that are missing are computed and put there.
    """
    tangents, known = [along.tangents], {} if known is None else known
    for x in radau(n)[1:]:
        if x not in known:
            at = along_line(params, direction, x)
            known[x] = passes.directional(at, direction, "E along the line").tangents
        tangents.append(known[x])
    return Line(along.scores, radau(n), tuple(tangents))


@cache
def radau(n: int) -> tuple[float, ...]:
    """Return the n + 1 nodes of the Radau rule on [0, 1] with 0 among them, exact for polynomials of degree 2n.

    They are the roots of `P_n + P_{n+1}`, moved from [−1, 1].

    Example:
        >>> [round(x, 4) for x in radau(2)]
        [0.0, 0.3551, 0.8449]
    """
    roots = np.sort(legendre.legroots([0.0] * n + [1.0, 1.0]).real)
    return (0.0, *(float((1 + root) / 2) for root in roots[1:]))


@cache
def _basis(nodes: tuple[float, ...]) -> tuple[Legendre, ...]:
    """Return Lagrange's polynomials of the nodes: each is 1 at its own node and 0 at the others."""
    x = 2 * np.array(nodes) - 1
    coefficients = np.linalg.inv(legendre.legvander(x, len(nodes) - 1))
    return tuple(Legendre(column, domain=[0.0, 1.0]) for column in coefficients.T)


def along_line(params: Params, direction: Params, x: float) -> Params:
    """Return θ + x·v, added in float64 and rounded once to the dtype of the parameters."""
    return tree.map_(lambda p, v: (p.double() + x * v.double()).to(p.dtype), params, direction)
