"""The effect of one step on the stored parameters: how far it went, and how much storing it in their dtype lost."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe import tree
from funcprobe.types import Params

#: Above this ratio of rounding to update, θ′ as stored is another step than θ + Δθ, and both are told.
WORTH_TELLING = 1e-2


class Movement(NamedTuple):
    """The size of a step, and of the rounding that storing it caused."""

    norm: float  #: ‖Δθ‖₂, float64
    rounding_ratio: float  #: ‖(θ′ − θ) − Δθ‖₂ / ‖Δθ‖₂; 0 where nothing moved
    unmoved: float  #: fraction of entries that Δθ would move and the storage dtype does not


class Move(NamedTuple):
    """One step of the parameters."""

    params: Params  #: θ
    after: Params  #: θ′ as stored
    delta: Params  #: Δθ as a value
    size: Movement
    narrow: bool = False  #: whether θ′ is stored in a narrower dtype than it was computed in

    @classmethod
    def of(cls, params: Params, after: Params, delta: Params, *, narrow: bool = False) -> Move:
        """Measure a step."""
        return cls(params, after, delta, movement(params, after, delta), narrow)

    def rounding(self) -> Params:
        """Return `(θ′ − θ) − Δθ`, subtracted in float64 and kept in the dtype of Δθ."""
        return {name: _off(self.params, self.after, self.delta, name) for name in self.params}


def displacement(params: Params, after: Params) -> Params:
    """Return θ′ − θ, subtracted in float64 and kept in float32 or wider."""
    return {
        name: (after[name].double() - p.double()).to(torch.promote_types(p.dtype, torch.float32))
        for name, p in params.items()
    }


def movement(params: Params, after: Params, delta: Params) -> Movement:
    """Return how far a step went, in one pass over pieces of the leaves, which a cache holds."""
    went = lost = 0.0
    wanted = stuck = 0
    for name, leaf in delta.items():
        sides = (params[name], after[name], leaf)
        for p, q, u in zip(*(tree.pieces(x.detach()) for x in sides), strict=True):
            wide = u.double()
            off = (q.double() - p.double()).sub_(wide).to(u.dtype).double()
            went += float(torch.dot(wide, wide))
            lost += float(torch.dot(off, off))
            moves = u != 0
            wanted += int(moves.sum())
            stuck += int(moves.logical_and_(q == p).sum())
    ratio = math.sqrt(lost) / math.sqrt(went) if went > 0 else 0.0
    return Movement(math.sqrt(went), ratio, stuck / wanted if wanted else 0.0)


def _off(params: Params, after: Params, delta: Params, name: str) -> Tensor:
    off = (after[name].double() - params[name].double()) - delta[name].double()
    return off.to(delta[name].dtype)
