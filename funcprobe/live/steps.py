"""The optimizer steps since a window opened: θ where it did, the parts of every Δθ summed, and copies to be opened."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe import tree
from funcprobe.attribution.parameter_parts import LeafPart
from funcprobe.measurement.move import displacement
from funcprobe.measurement.update import Update
from funcprobe.optimizers.closed_form import PureOptimizer
from funcprobe.training.response import add_parts, nothing
from funcprobe.types import Gradients, OptState, Params

#: The parts of a step that are summed, by the names of their rows.
PARTS = ("gradient on U", "momentum", "weight decay")


class Kept(NamedTuple):
    """A copy of one step, from which its tokens can be told when the window closes."""

    step: int
    update: Update  #: made from the batch
    gradient: Gradients  #: that the trainer used, as it reached the optimizer


class Expected(NamedTuple):
    """One leaf after the step that is about to be taken, as we take it."""

    name: str
    after: Tensor  #: θ′
    moved: float  #: ‖Δθ‖₂
    rounding: float  #: ‖θ‖₂ times the eps of its dtype: one unit in the last place of every entry


@dataclass
class Steps:
    """All that a window has to remember of its steps."""

    before: Params  #: θ where the window opened: a copy
    first: int
    last: int = -1
    sums: dict[str, Params] | None = None  #: parts of Δθ over all steps; None where a step has no such parts
    kept: list[Kept] = field(default_factory=list)
    lr: float | None = None
    grad_norm: float | None = None
    mismatch: float = 0.0
    expected: Expected | None = None

    @classmethod
    def since(cls, params: Params, step: int) -> Steps:
        """Return the steps since this moment: none yet."""
        return cls({name: p.detach().clone() for name, p in params.items()}, step, step - 1, _sums(params))

    def take(self, update: Update, step: int, *, split: bool = True) -> None:
        """Take in a step that is about to be taken; without `split` its parts are left unknown, and it is not checked.

        Raises:
            InputError: If gradient, state or learning rate do not fit.
            NumericsError: If the gradient is not finite.
        """
        self.last = step
        if not split or update.rule is None or update.opt_state is None:
            self.sums, self.expected = None, None
            self.lr = self.lr if update.rule is None else update.rule.optimizer.lr if update.lr is None else update.lr
            return
        gradient = update.gradient().gradient
        given = update.params, update.opt_state, gradient, update.lr
        taken = update.rule.lazily(*given)
        self.lr, self.grad_norm = taken.info["lr"], taken.info["grad_norm"]
        if not isinstance(update.rule.optimizer, PureOptimizer):
            self.sums, self.expected = None, None
            return
        if self.sums is not None:
            add_parts(self.sums, update.rule, *given)
        name = list(update.params)[step % len(update.params)]
        theta = update.params[name].detach()
        rounding = float(tree.norm({name: theta})) * torch.finfo(theta.dtype).eps
        self.expected = Expected(name, taken.after[name], float(tree.norm({name: taken.delta[name]})), rounding)

    def keep(self, update: Update, gradient: Gradients, step: int) -> None:
        """Keep a copy of a step made from a batch, so that its tokens can be told later."""
        held = replace(update, params=_copied(update.params), opt_state=_state(update.opt_state or {}))
        self.kept.append(Kept(step, held, {n: None if g is None else g.detach().clone() for n, g in gradient.items()}))

    def check(self, params: Params) -> None:
        """Hold one leaf of the step that was taken against the one that was expected; another leaf every time."""
        if self.expected is None:
            return
        name, after, moved, rounding = self.expected
        off = float(tree.norm({name: params[name].detach().double() - after.double()}))
        beyond = max(0.0, off - rounding)
        self.mismatch = max(self.mismatch, beyond / moved if moved else math.inf if beyond else 0.0)
        self.expected = None

    def leaves(self, covector: Params, now: Params) -> tuple[LeafPart, ...]:
        """Return every leaf's contribution ⟨∇F_n, Δθ_n⟩ over the window, and those of its parts."""
        back = displacement(self.before, now)
        return tuple(_leaf(name, covector[name], back[name], self.sums) for name in now)


def _leaf(name: str, covector: Tensor, delta: Tensor, sums: Mapping[str, Params] | None) -> LeafPart:
    whole = _dot(covector, delta)
    gradient, momentum, decay = (0.0 if sums is None else _dot(covector, sums[what][name]) for what in PARTS)
    return LeafPart(name, whole, gradient, momentum, decay, float(tree.norm({name: delta})), delta.numel())


def split_of(leaves: tuple[LeafPart, ...], known: bool) -> dict[str, float]:
    """Return the rows of a window's split, which sum to δF₁; only the whole where its parts are not known."""
    if not known:
        return {"steps": math.fsum(part.contribution for part in leaves)}
    columns = ("gradient", "momentum", "decay", "rest")
    names = (*PARTS, "rounding and rest")
    return {
        name: math.fsum(getattr(part, column) for part in leaves) for name, column in zip(names, columns, strict=True)
    }


def _sums(params: Params) -> dict[str, Params]:
    return {what: nothing(params) for what in PARTS}


def _dot(a: Tensor, b: Tensor) -> float:
    return float(tree.dot({"": a}, {"": b}))


def _copied(params: Params) -> Params:
    return {name: p.detach().clone() for name, p in params.items()}


def _state(opt_state: OptState) -> OptState:
    return {name: {key: x.detach().clone() for key, x in entries.items()} for name, entries in opt_state.items()}
