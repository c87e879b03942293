"""The effect of one step on the stored parameters: how far it went, and how much storing it in their dtype lost."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe import tree
from funcprobe.training.rule import is_finite, refuse
from funcprobe.types import Leaves, Params

#: Above this ratio of rounding to update, θ′ as stored is another step than θ + Δθ, and both are told.
WORTH_TELLING = 1e-2


class Movement(NamedTuple):
    """The size of a step, and of the rounding that storing it caused."""

    norm: float  #: ‖Δθ‖₂, float64
    rounding_ratio: float  #: ‖(θ′ − θ) − Δθ‖₂ / ‖Δθ‖₂; 0 where nothing moved
    unmoved: float  #: fraction of entries that Δθ would move and the storage dtype does not
    norms: dict[str, float]  #: ‖Δθ‖₂ of every leaf


class Move(NamedTuple):
    """One step of the parameters, whose leaves may be computed as they are read."""

    params: Params  #: θ
    after: Leaves  #: θ′ as stored
    delta: Leaves  #: Δθ as a value
    size: Movement
    narrow: bool = False  #: whether θ′ is stored in a narrower dtype than it was computed in

    @classmethod
    def of(cls, params: Params, after: Leaves, delta: Leaves, *, narrow: bool = False) -> Move:
        """Measure a step, leaf by leaf.

        Raises:
            NumericsError: If Δθ or θ′ is not finite; the message names the leaf.
        """
        return cls(params, after, delta, movement(params, after, delta), narrow)

    def rounding(self) -> Leaves:
        """Return `(θ′ − θ) − Δθ`, subtracted in float64 and kept in the dtype of Δθ."""
        return tree.Lazy(self.params, lambda name: _off(self.params[name], self.after[name], self.delta[name]))

    def top(self, k: int) -> tuple[tuple[str, float], ...]:
        """Return the k leaves that moved furthest, with the norm of their Δθ, the furthest first."""
        return tuple(sorted(self.size.norms.items(), key=lambda item: (-item[1], item[0]))[:k])


def displacement(params: Params, after: Leaves) -> Leaves:
    """Return θ′ − θ, subtracted in float64 and kept in float32 or wider."""

    def moved(name: str) -> Tensor:
        p = params[name].detach()
        return (after[name].double() - p.double()).to(torch.promote_types(p.dtype, torch.float32))

    return tree.Lazy(params, moved)


def movement(params: Params, after: Leaves, delta: Leaves) -> Movement:
    """Return how far a step went, in one pass over pieces of the leaves, which a cache holds.

    Raises:
        NumericsError: If Δθ or θ′ is not finite; the message names the leaf.
    """
    went, lost, wanted, stuck = dict.fromkeys(params, 0.0), 0.0, 0.0, 0.0
    wide: dict[str, torch.dtype] = {}
    stored: dict[str, torch.dtype] = {}
    for name, own in _sums_of(params, after, delta).items():
        went[name], lost, wanted, stuck = own.went, lost + own.lost, wanted + own.wanted, stuck + own.stuck
        if not math.isfinite(own.went + own.lost):  # a finite step may still leave the range of float16
            u, q = delta[name], after[name]
            wide |= {name: u.dtype} if tree.anywhere(not is_finite(u), (name,)) else {}
            stored |= {name: q.dtype} if tree.anywhere(not is_finite(q), (name,)) else {}
    refuse(wide, "step Δθ")
    refuse(stored, "stepped parameter")
    norm = math.sqrt(sum(went.values()))
    ratio = math.sqrt(lost) / norm if norm > 0 else 0.0
    return Movement(norm, ratio, stuck / wanted if wanted else 0.0, {n: math.sqrt(x) for n, x in went.items()})


def _sums_of(params: Params, after: Leaves, delta: Leaves) -> dict[str, _Sums]:
    """Return the sums over the entries of every leaf, in all processes where these hold parts."""
    each = [_Sums.of(p, after[name], delta[name]) for name, p in params.items()]
    everywhere = tree.over_processes(torch.tensor(each, dtype=torch.float64).reshape(-1, len(_Sums._fields)), params)
    return {name: _Sums(*row) for name, row in zip(params, everywhere.tolist(), strict=True)}


class _Sums(NamedTuple):
    """The sums over the entries of a leaf that the size of a step is made of."""

    went: float = 0.0  #: Σ u²
    lost: float = 0.0  #: Σ ((q − p) − u)²
    wanted: float = 0.0  #: entries that Δθ would move
    stuck: float = 0.0  #: those among them that stay

    @classmethod
    def of(cls, p: Tensor, q: Tensor, u: Tensor) -> _Sums:
        went = lost = 0.0
        wanted = stuck = 0
        for p_, q_, u_ in zip(*(tree.pieces(x.detach()) for x in (p, q, u)), strict=True):
            wide, off = u_.double(), _off(p_, q_, u_).double()
            went += float(torch.dot(wide, wide))
            lost += float(torch.dot(off, off))
            moves = u_ != 0
            wanted += int(moves.sum())
            stuck += int(moves.logical_and_(q_ == p_).sum())
        return cls(went, lost, wanted, stuck)


def _off(p: Tensor, q: Tensor, u: Tensor) -> Tensor:
    return (q.double() - p.double()).sub_(u.double()).to(u.dtype)
