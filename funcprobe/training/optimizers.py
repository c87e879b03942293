"""Optimizers as pure pairs: `init(params) -> state`, `apply(params, state, gradient) -> (params, update, state)`.

`params` and `state` after a step are bit-identical to what the class in torch.optim would store: SGD, Adam and AdamW
run torch's functional kernels on copies, any other class is run itself on copies. `update` is the step as a value, in
float64 arithmetic, kept in float32 (float64 for float64 leaves), so that it carries no rounding of the stored weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcprobe import tree
from funcprobe.errors import InputError
from funcprobe.training import kernels
from funcprobe.training.groups import Group, assignments, build_groups, check_gradient, stored_groups
from funcprobe.training.kernels import Kernel, Terms
from funcprobe.training.lifted import LiftedOptimizer, refuse
from funcprobe.training.state import check_state, state_from_torch, state_to_torch
from funcprobe.types import Optimizer, OptimizerResult, OptState, Params

__all__ = [
    "Affine",
    "Group",
    "LiftedOptimizer",
    "PureOptimizer",
    "adam",
    "adamw",
    "clip_by_global_norm",
    "from_param_groups",
    "from_torch",
    "sgd",
    "state_from_torch",
    "state_to_torch",
]

_KERNELS: dict[type[torch.optim.Optimizer], Kernel] = {
    torch.optim.SGD: kernels.SGD,
    torch.optim.Adam: kernels.ADAM,
    torch.optim.AdamW: kernels.ADAM,
}


def sgd(
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
    *,
    groups: Sequence[Group] | None = None,
    foreach: bool | None = None,
    fused: bool | None = None,
) -> PureOptimizer:
    """Return stochastic gradient descent as torch.optim.SGD computes it.

    `groups` lists leaves that differ, as torch's param_groups do; what a group does not state is taken from here.

    Raises:
        InputError: If an option is out of range, or a leaf is in two groups.

    Example:
        >>> sgd(0.1).apply({"w": torch.ones(1)}, {"w": {}}, {"w": torch.ones(1)}).update
        {'w': tensor([-0.1000])}
    """
    return _built(torch.optim.SGD, locals())


def adam(
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    *,
    decoupled_weight_decay: bool = False,
    groups: Sequence[Group] | None = None,
    foreach: bool | None = None,
    fused: bool | None = None,
) -> PureOptimizer:
    """Return Adam as torch.optim.Adam computes it; weight decay enters the gradient (coupled) unless told otherwise.

    Raises:
        InputError: If an option is out of range, or a leaf is in two groups.
    """
    return _built(torch.optim.Adam, locals())


def adamw(
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
    *,
    groups: Sequence[Group] | None = None,
    foreach: bool | None = None,
    fused: bool | None = None,
) -> PureOptimizer:
    """Return AdamW as torch.optim.AdamW computes it: weight decay `−ηλθ` stands beside the Adam step.

    Raises:
        InputError: If an option is out of range, or a leaf is in two groups.
    """
    return _built(torch.optim.AdamW, locals())


def from_torch(
    cls: type[torch.optim.Optimizer], *, groups: Sequence[Group] | None = None, **hyperparameters: Any
) -> PureOptimizer | LiftedOptimizer:
    """Return any torch.optim optimizer class as a pure optimizer.

    SGD, Adam and AdamW become the built-in ones. Every other class is run itself, on copies, and its `update` is the
    difference of a run on float64 copies.

    Raises:
        InputError: If the class needs a closure or sparse gradients, or refuses the hyperparameters.

    Example:
        >>> from_torch(torch.optim.RMSprop, lr=1e-2).lr
        0.01
    """
    refuse(cls)
    made = build_groups(cls, hyperparameters, groups)
    if "lr" not in made[0].hyperparameters:
        raise InputError(f"{cls.__name__} has no hyperparameter 'lr', which a step needs in order to be scaled.")
    return PureOptimizer(cls, made) if cls in _KERNELS else LiftedOptimizer(cls, made)


def from_param_groups(
    cls: type[torch.optim.Optimizer] | str,
    param_groups: Sequence[Mapping[str, Any]],
    names: Sequence[Sequence[str]],
) -> PureOptimizer | LiftedOptimizer:
    """Return the pure optimizer of a live torch optimizer, or of a saved state_dict.

    Hyperparameters are read from every group and never from defaults; a learning rate that is a tensor becomes a
    float. Only implementation flags that older torch versions did not store (`foreach`, `fused`, `maximize`, ...) are
    completed, as torch itself completes them on loading.

    Args:
        cls: The class, or the name of one in torch.optim ("AdamW").
        param_groups: `optimizer.param_groups`, or the "param_groups" of a state_dict.
        names: For every group the names of its leaves, in the group's order; an empty group has an empty list.

    Raises:
        InputError: If the class is unknown, a group lacks a hyperparameter, or there are too many or few name lists.
    """
    if isinstance(cls, str):
        found = getattr(torch.optim, cls, None)
        if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
            raise InputError(f"torch.optim has no optimizer named '{cls}'; name one of its classes, such as 'AdamW'.")
        cls = found
    return from_torch(cls, groups=stored_groups(cls, param_groups, names))


class Affine(NamedTuple):
    """A step as an affine function of the gradient: `Δθ = offset + scale ⊙ g`, denominators at their actual values."""

    offset: Params  #: float64: momentum and weight decay
    scale: Params  #: float64


@dataclass(frozen=True)
class PureOptimizer:
    """SGD, Adam or AdamW over torch's functional kernels, with their step in closed form."""

    cls: type[torch.optim.Optimizer]  #: the class in torch.optim whose results are reproduced
    groups: tuple[Group, ...]  #: complete hyperparameters for every leaf

    @property
    def lr(self) -> float:
        """The first group's learning rate."""
        return float(self.groups[0].hyperparameters["lr"])

    def init(self, params: Params) -> OptState:
        """Return the state before the first step: zero moments, no momentum buffer.

        Raises:
            InputError: If the groups and the parameters do not have the same names.
        """
        found = {name: self._kernel.init(params[name], hyper) for name, hyper in self._leaves(params, None).items()}
        return {name: found[name] for name in params}

    def apply(self, params: Params, opt_state: OptState, gradient: Params, lr: float | None = None) -> OptimizerResult:
        """Return parameters, update and state after one step; `lr` overrides every group's for this call.

        Raises:
            InputError: If names, shapes or the learning rate do not fit.
        """
        check_gradient(params, gradient)
        update = self.update(params, opt_state, gradient, lr)
        after: Params = {}
        state_after: OptState = {}
        for names, hyper in assignments(self.groups, params, lr):
            leaves = [params[name].detach().clone() for name in names]
            grads = [gradient[name].detach().to(params[name]) for name in names]
            states = [self._state(name, params, opt_state, hyper, copy=True) for name in names]
            with torch.no_grad():
                self._kernel.run(leaves, grads, states, hyper)
            after |= dict(zip(names, leaves, strict=True))
            state_after |= dict(zip(names, states, strict=True))
        return OptimizerResult(
            {name: after[name] for name in params}, update, {name: state_after[name] for name in params}
        )

    def update(self, params: Params, opt_state: OptState, gradient: Params, lr: float | None = None) -> Params:
        """Return the step `Δθ` alone, in float32 (float64 for float64 leaves); differentiable in the gradient.

        Raises:
            InputError: If names or shapes do not fit.
        """
        found = {}
        for name, hyper in self._leaves(params, lr).items():
            scale, momentum, decay = self._terms(name, params, opt_state, gradient, hyper)
            wide = torch.float64 if params[name].dtype == torch.float64 else torch.float32
            found[name] = (scale * gradient[name].to(params[name].dtype).double() + (momentum + decay)).to(wide)
        return {name: found[name] for name in params}

    def affine(self, params: Params, opt_state: OptState, gradient: Params, lr: float | None = None) -> Affine:
        """Return `(offset, scale)` with `Δθ = offset + scale ⊙ g`, float64 trees like the parameters.

        AdamW: `scale = −η(1−β₁)/(bc₁·denom)`, `offset = −η(β₁m/(bc₁·denom) + λθ)`; Adam's coupled decay enters as
        `scale ⊙ λθ`; SGD with momentum μ: `−η(1−damp) g` and `−ημ·buf`, Nesterov accordingly. Neither is ever taken
        as a difference of steps.

        Raises:
            InputError: If names or shapes do not fit.
        """
        terms = self.terms(params, opt_state, gradient, lr)
        return Affine(
            {name: t.momentum + t.decay for name, t in terms.items()}, {name: t.scale for name, t in terms.items()}
        )

    def terms(self, params: Params, opt_state: OptState, gradient: Params, lr: float | None = None) -> dict[str, Terms]:
        """Return for every leaf `(scale, momentum, decay)`, float64: the affine form with its offset in two parts.

        Raises:
            InputError: If names or shapes do not fit.
        """
        leaves = self._leaves(params, lr)
        return {name: self._terms(name, params, opt_state, gradient, leaves[name]) for name in params}

    @property
    def _kernel(self) -> Kernel:
        return _KERNELS[self.cls]

    def _leaves(self, params: Params, lr: float | None) -> dict[str, dict[str, Any]]:
        return {name: hyper for names, hyper in assignments(self.groups, params, lr) for name in names}

    def _terms(
        self, name: str, params: Params, opt_state: OptState, gradient: Params, hyper: Mapping[str, Any]
    ) -> Terms:
        state = self._state(name, params, opt_state, hyper)
        return self._kernel.terms(params[name].detach(), gradient[name].to(params[name].dtype), state, hyper)

    def _state(
        self, name: str, params: Params, opt_state: OptState, hyper: Mapping[str, Any], copy: bool = False
    ) -> dict[str, Tensor]:
        """Return a leaf's state, typed and placed as torch's load_state_dict does; an empty one is initialised."""
        leaf, state = params[name].detach(), check_state(name, params[name], opt_state, self._kernel.keys(hyper))
        if not state:
            return self._kernel.init(leaf, hyper)
        return {
            key: value.detach().clone()
            if key == "step" and copy
            else value.detach()
            if key == "step"
            else value.detach().to(device=leaf.device, dtype=leaf.dtype, copy=copy)
            for key, value in state.items()
        }


def clip_by_global_norm(gradient: Params, max_norm: float) -> tuple[float, float]:
    """Return (coefficient, norm) of clipping by the global norm, in float64: `min(1, max_norm / (norm + 1e-6))`.

    torch.nn.utils.clip_grad_norm_ multiplies the gradient by that coefficient.

    Raises:
        InputError: If max_norm is not above 0.

    Example:
        >>> clip_by_global_norm({"w": torch.tensor([3.0, 4.0])}, 10.0)
        (1.0, 5.0)
    """
    if not max_norm > 0:
        raise InputError(f"max_grad_norm is {max_norm}; it must be above 0, or None to leave the gradient unclipped.")
    norm = float(tree.norm(gradient))
    return min(1.0, max_norm / (norm + 1e-6)), norm


def _built(cls: type[torch.optim.Optimizer], options: dict[str, Any]) -> PureOptimizer:
    groups = options.pop("groups")
    return PureOptimizer(cls, build_groups(cls, options, groups))


def _protocols(pure: PureOptimizer, lifted: LiftedOptimizer) -> tuple[Optimizer, Optimizer]:
    """Hold both classes against the Optimizer protocol, statically."""
    return pure, lifted
