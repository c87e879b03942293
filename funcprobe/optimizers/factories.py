"""Optimizers as pure pairs: `init(params) -> state`, `apply(params, state, gradient) -> (params, delta, state)`.

`params` and `state` after a step are bit-identical to what the class in torch.optim would store: SGD, Adam and AdamW
run torch's functional kernels on copies, any other class is run itself on copies. `delta` is the step as a value, in
float64 arithmetic, kept in float32 (float64 for float64 leaves), so that it carries no rounding of the stored weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from funcprobe import tree
from funcprobe.errors import InputError
from funcprobe.optimizers.any_class import LiftedOptimizer, refuse
from funcprobe.optimizers.closed_form import KERNELS, PureOptimizer
from funcprobe.optimizers.groups import Group, build_groups, keys_of_its_own, stored_groups
from funcprobe.optimizers.unreached import reached
from funcprobe.types import Gradients


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
        >>> sgd(0.1).apply({"w": torch.ones(1)}, {"w": {}}, {"w": torch.ones(1)}).delta
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

    SGD, Adam and AdamW become the built-in ones. Every other class is run itself, on copies, and its `delta` is the
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
    return PureOptimizer(cls, made) if cls in KERNELS else LiftedOptimizer(cls, made)


def from_param_groups(
    cls: type[torch.optim.Optimizer] | str,
    param_groups: Sequence[Mapping[str, Any]],
    names: Sequence[Sequence[str]],
) -> PureOptimizer | LiftedOptimizer:
    """Return the pure optimizer of a live torch optimizer, or of a saved state_dict.

    Hyperparameters are read from every group and never from defaults; a learning rate that is a tensor becomes a
    float. Only implementation flags that older torch versions did not store (`foreach`, `fused`, `maximize`, ...) are
    completed, as torch itself completes them on loading. Keys that a class of torch.optim does not read are left out,
    with a warning; a class from elsewhere keeps them.

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
    made = from_torch(cls, groups=stored_groups(cls, param_groups, names))
    return dataclasses.replace(made, groups=keys_of_its_own(cls, made.groups, param_groups))


def clip_by_global_norm(gradient: Gradients, max_norm: float) -> tuple[float, float]:
    """Return (coefficient, norm) of clipping by the global norm, in float64: `min(1, max_norm / (norm + 1e-6))`.

    torch.nn.utils.clip_grad_norm_ multiplies the gradient by that coefficient. The norm is that of the leaves which
    have a gradient.

    Raises:
        InputError: If max_norm is not above 0.

    Example:
        >>> clip_by_global_norm({"w": torch.tensor([3.0, 4.0])}, 10.0)
        (1.0, 5.0)
    """
    if not max_norm > 0:
        raise InputError(f"max_grad_norm is {max_norm}; it must be above 0, or None to leave the gradient unclipped.")
    norm = float(tree.norm(reached(gradient)))
    return min(1.0, max_norm / (norm + 1e-6)), norm


def _built(cls: type[torch.optim.Optimizer], options: dict[str, Any]) -> PureOptimizer:
    groups = options.pop("groups")
    return PureOptimizer(cls, build_groups(cls, options, groups))
