"""The rule of a step: how a gradient becomes a step. Clip it by its global norm, then the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe import tree
from funcprobe.errors import InputError, NumericsError
from funcprobe.optimizers.closed_form import PureOptimizer
from funcprobe.optimizers.factories import clip_by_global_norm
from funcprobe.optimizers.groups import check_lr
from funcprobe.optimizers.unreached import check_reached, reached
from funcprobe.types import Gradients, Leaves, Optimizer, OptState, Params, StepResult


class LazyStep(NamedTuple):
    """A step whose leaves are read one by one."""

    after: Leaves  #: θ′
    delta: Leaves  #: Δθ, in float32 or wider
    info: dict[str, float]  #: as in `StepResult`


@dataclass(frozen=True)
class Rule:
    """The half of a step that needs no model: `θ′ = optimizer(θ, clip(gradient))`.

    Raises:
        InputError: If max_grad_norm is not above 0.
    """

    optimizer: Optimizer
    max_grad_norm: float | None = None  #: the global norm to which the gradient is clipped; None leaves it as it is

    def __post_init__(self) -> None:
        if self.max_grad_norm is not None:
            clip_by_global_norm({}, self.max_grad_norm)  # refuses a bound that is out of range before any model runs

    def apply(
        self,
        params: Params,
        opt_state: OptState,
        gradient: Gradients,
        lr: float | None = None,
        info: Mapping[str, float] | None = None,
    ) -> StepResult:
        """Return the step along a gradient: clip, then the optimizer; `lr` overrides every group's for this call.

        A leaf whose gradient is None is left alone, as torch.optim does: same parameters, same state, Δθ 0.

        The result's gradient is the raw one as it was given, detached and sharing storage; nothing else in the result
        shares storage with an argument, and no argument is changed. Its info is `info` with `grad_norm`,
        `clip_coefficient`, `lr` (the first group's, where groups differ) and, where there are leaves whose gradient is
        None, their number: `leaves_without_gradient`.

        Raises:
            InputError: If names, shapes or the learning rate do not fit, or no leaf has a gradient.
            NumericsError: If the gradient, the step or a stepped parameter is not finite; the message names the leaf.
        """
        detached = {name: None if g is None else g.detach() for name, g in gradient.items()}
        clipped, reported = self._checked(detached, lr)
        params_after, delta, state_after = self.optimizer.apply(params, opt_state, clipped, lr)
        check_finite(delta, "step Δθ")
        check_finite(params_after, "stepped parameter")  # a finite step may still leave the range of float16
        return StepResult(params_after, delta, state_after, detached, {**(info or {}), **reported})

    def lazily(
        self,
        params: Params,
        opt_state: OptState,
        gradient: Gradients,
        lr: float | None = None,
        info: Mapping[str, float] | None = None,
    ) -> LazyStep:
        """Return the step that `apply` takes, without the optimizer's state after it.

        A leaf is computed when it is read, where the optimizer can (SGD, Adam, AdamW). Nothing is changed, and all
        arguments have to stay as they are for as long as the step is read. Whether its leaves are finite is for the
        reader to check.

        Raises:
            InputError: If names, shapes or the learning rate do not fit, or no leaf has a gradient.
            NumericsError: If the gradient is not finite; the message names the leaf.
        """
        clipped, reported = self._checked(gradient, lr)
        if isinstance(self.optimizer, PureOptimizer):
            after, delta = self.optimizer.lazily(params, opt_state, clipped, lr)
        else:
            after, delta, _ = self.optimizer.apply(params, opt_state, clipped, lr)
        return LazyStep(after, delta, {**(info or {}), **reported})

    def _checked(self, gradient: Gradients, lr: float | None) -> tuple[Gradients, dict[str, float]]:
        """Return the clipped gradient, with its norm, clip factor and learning rate by name.

        Raises:
            InputError: If no leaf has a gradient, or the learning rate is out of range.
            NumericsError: If the gradient is not finite.
        """
        check_reached(gradient)
        self._refuse_parts(gradient)
        there = reached(gradient)
        check_finite(there, "gradient")
        lr = self.optimizer.lr if lr is None else check_lr(lr)
        clipped, coefficient, norm = self.clipped(gradient)
        reported = {"grad_norm": norm, "clip_coefficient": coefficient, "lr": lr}
        if alone := len(gradient) - len(there):
            reported["leaves_without_gradient"] = float(alone)
        return clipped, reported

    def _refuse_parts(self, gradient: Gradients) -> None:
        """Check that the optimizer is elementwise, where leaves lie in parts.

        Raises:
            InputError: If that is not known.
        """
        if any(isinstance(name, tree.Part) for name in gradient) and not isinstance(self.optimizer, PureOptimizer):
            raise InputError(
                "This optimizer may look at a whole leaf, and each process holds a part of it; take SGD, Adam or "
                "AdamW, or whole leaves."
            )

    def clipped(self, gradient: Gradients) -> tuple[Gradients, float, float]:
        """Return (the gradient as the optimizer gets it, the clip factor, the norm of the raw one)."""
        if self.max_grad_norm is None:
            return gradient, 1.0, float(tree.norm(reached(gradient)))
        coefficient, norm = clip_by_global_norm(gradient, self.max_grad_norm)
        if coefficient == 1.0:
            return gradient, coefficient, norm

        def scaled(name: str) -> Tensor | None:
            g = gradient[name]
            return None if g is None else g * coefficient

        return tree.Lazy(gradient, scaled), coefficient, norm


def check_finite(leaves: Leaves, what: str) -> None:
    """Check that every leaf is finite.

    Raises:
        NumericsError: If one is not; the message names it.
    """
    bad = torch.tensor([int(not is_finite(leaf)) for leaf in leaves.values()])
    found = zip(leaves, tree.over_processes(bad, leaves).tolist(), strict=True)
    refuse({name: leaves[name].dtype for name, somewhere in found if somewhere}, what)


def refuse(bad: Mapping[str, torch.dtype], what: str) -> None:
    """Say which leaves are not finite.

    Raises:
        NumericsError: If there are any.
    """
    if bad:
        name, dtype = next(iter(bad.items()))
        raise NumericsError(
            f"The {what} is not finite at '{name}' ({str(dtype).removeprefix('torch.')})"
            + (f" and {len(bad) - 1} more leaves" if len(bad) > 1 else "")
            + "; check the log-probabilities and the optimizer state, or load the model in a wider dtype."
        )


def is_finite(leaf: Tensor) -> bool:
    """Return whether every entry is finite: so where their sum is, and counted where that overflows or is not."""
    return bool(torch.isfinite(leaf.detach().sum())) or bool(torch.isfinite(leaf).all())
