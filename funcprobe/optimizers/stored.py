"""Optimizers of a run that keeps its weights in a narrower dtype than the one it is measured in.

A bfloat16 run steps bfloat16 weights with bfloat16 moments, and at a small learning rate most of its entries do not
move at all. Computed in float32 and stored as the run stores it, such a step has both sides: `params` are what torch's
own kernel makes of weights, moments and gradient in the storage dtype, bit for bit, and `delta` is Δθ from the same
weights, the same moments and the gradient as it came, in float64, with nothing rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from funcprobe.arguments import checked
from funcprobe.errors import InputError
from funcprobe.optimizers.any_class import LiftedOptimizer, pinned
from funcprobe.optimizers.closed_form import PureOptimizer
from funcprobe.optimizers.groups import Group, assignments, check_gradient
from funcprobe.types import Gradients, Optimizer, OptimizerResult, OptState, Params

#: The dtype in which a run keeps each leaf and its moments, by name; a leaf without an entry is kept as it is computed.
Storage = Mapping[str, torch.dtype]

#: State of torch.optim that is one number a leaf, kept in a dtype of its own: counts, and what NAdam and ASGD multiply.
_NUMBERS = frozenset({"step", "mu_product", "mu", "eta"})


@checked
def stored(optimizer: Optimizer, storage: Storage) -> Optimizer:
    """Return an optimizer whose result is stored as a run stores it: `params` rounded by the step, `delta` not.

    Parameters, moments and gradient are cast to the storage dtype, the class's own kernel runs there, and what it
    leaves is cast back, which loses nothing. State that is a single number (`step`, the μ-product of NAdam) keeps its
    dtype, as in a run that was never interrupted.

    Args:
        optimizer: One of this package: sgd, adam, adamw, from_torch(...).
        storage: The dtype of every leaf that is stored in another one than it is computed in; `Checkpoint.storage`.

    Raises:
        InputError: If the optimizer is not one of this package, or a dtype is no floating-point one.

    Example:
        >>> from funcprobe.optimizers.factories import sgd
        >>> w = {"w": torch.ones(2)}
        >>> taken = stored(sgd(1e-3), {"w": torch.bfloat16}).apply(w, {"w": {}}, w)
        >>> taken.params["w"], taken.delta["w"]
        (tensor([1., 1.]), tensor([-0.0010, -0.0010]))
    """
    if wrong := [dtype for dtype in storage.values() if not dtype.is_floating_point]:
        raise InputError(f"The storage dtype {wrong[0]} is none that weights can be stepped in; expected bfloat16, ...")
    if not storage:
        return optimizer
    if isinstance(optimizer, PureOptimizer):
        return replace(optimizer, storage=dict(storage))
    if isinstance(optimizer, LiftedOptimizer):
        return StoredLifted(optimizer.cls, optimizer.groups, dict(storage))
    raise InputError(
        f"A {type(optimizer).__name__} cannot be told how its result is stored; use sgd, adamw or from_torch(...)."
    )


def is_stored(optimizer: Optimizer) -> bool:
    """Return whether an optimizer stores its result in another dtype than it computes in."""
    return bool(getattr(optimizer, "storage", None))


def storage_name(optimizer: Optimizer, params: Params) -> str:
    """Return the dtypes that a step leaves parameters in, as words: "bfloat16", or "bfloat16, float32".

    Example:
        >>> from funcprobe.optimizers.factories import sgd
        >>> storage_name(sgd(0.1), {"w": torch.ones(1)})
        'float32'
    """
    storage: Storage = getattr(optimizer, "storage", {})
    found = {storage.get(name, leaf.dtype) for name, leaf in params.items()}
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))


def narrowed(tensors: Params, storage: Storage) -> Params:
    """Return the leaves, detached, each in the dtype that it is stored in."""
    return {name: x.detach().to(storage.get(name, x.dtype)) for name, x in tensors.items()}


def as_held(params: Params, opt_state: OptState, storage: Storage) -> tuple[Params, OptState]:
    """Return parameters and moments at the values that the storage dtype holds, in the dtypes that they came in.

    What the dtype holds already is not copied.
    """
    held = {name: _through(p.detach(), storage.get(name, p.dtype)) for name, p in params.items()}
    state = _moments(opt_state, params, lambda name, m: _through(m, storage.get(name, m.dtype)))
    return held, state


def narrowed_state(opt_state: OptState, params: Params, storage: Storage) -> OptState:
    """Return the state with its moments in the dtype that they are stored in; single numbers stay as they are."""
    return _moments(opt_state, params, lambda name, m: m.detach().to(storage.get(name, m.dtype)))


def is_moment(key: str, value: Tensor, leaf: Tensor) -> bool:
    """Return whether a state entry is kept in the dtype of its leaf, and not a number that torch keeps in its own."""
    number = key in _NUMBERS or (value.dim() == 0 and leaf.dim() > 0)
    return value.is_floating_point() and not number


@dataclass(frozen=True)
class StoredLifted(LiftedOptimizer):
    """Any other class, stored: run on copies in the storage dtype, and once more in float64 for Δθ."""

    storage: Storage = field(default_factory=dict)  #: by leaf

    def apply(
        self, params: Params, opt_state: OptState, gradient: Gradients, lr: float | None = None
    ) -> OptimizerResult:
        """Return parameters, Δθ and state after one step; `lr` overrides every group's for this call.

        Raises:
            InputError: If names, shapes or the learning rate do not fit.
        """
        check_gradient(params, gradient)
        low = narrowed(params, self.storage)
        after, state = self._run(
            low, narrowed_state(opt_state, params, self.storage), _like(gradient, low), lr, wide=False
        )
        held, moments = as_held(params, opt_state, self.storage)
        exact, _ = self._exactly(params)._run(held, moments, gradient, lr, wide=True)
        delta = {
            name: (exact[name] - p.double()).to(torch.promote_types(p.dtype, torch.float32)) for name, p in held.items()
        }
        return _widened(OptimizerResult(after, delta, state), params)

    def vjp(
        self, params: Params, opt_state: OptState, gradient: Gradients, covector: Params, lr: float | None = None
    ) -> Params:
        """Return `(∂Δθ/∂g)ᵀ c` at the gradient, of Δθ in which nothing is rounded.

        Raises:
            InputError: If names, shapes or the learning rate do not fit, or the step cuts the graph.
        """
        held, moments = as_held(params, opt_state, self.storage)
        return self._exactly(params).vjp(held, moments, gradient, covector, lr)

    def _exactly(self, params: Params) -> LiftedOptimizer:
        """Return the optimizer of the exact step, whose defaults that follow a dtype follow that of the storage."""
        groups = []
        for names, hyper in assignments(self.groups, params, None):
            dtypes = {name: self.storage.get(name, params[name].dtype) for name in names}
            for dtype in dict.fromkeys(dtypes.values()):
                groups.append(Group(tuple(n for n in names if dtypes[n] == dtype), pinned(hyper, dtype)))
        return LiftedOptimizer(self.cls, tuple(groups))


def _widened(taken: OptimizerResult, params: Params) -> OptimizerResult:
    """Return a result in the dtypes of `params`, which hold every value of the storage dtypes."""
    after = {name: taken.params[name].to(p.dtype) for name, p in params.items()}
    state = _moments(taken.opt_state, params, lambda name, m: m.to(params[name].dtype))
    return OptimizerResult(after, taken.delta, state)


def _moments(opt_state: OptState, params: Params, f: Callable[[str, Tensor], Tensor]) -> OptState:
    """Return a state with `f(name of the leaf, moment)` in place of every moment, and all else as it is."""
    return {
        name: {
            key: f(name, value) if name in params and is_moment(key, value, params[name]) else value
            for key, value in entries.items()
        }
        for name, entries in opt_state.items()
    }


def _like(gradient: Gradients, leaves: Params) -> Gradients:
    given = ((name, leaf, gradient[name]) for name, leaf in leaves.items())
    return {name: None if g is None else g.detach().to(leaf.dtype) for name, leaf, g in given}


def _through(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor rounded to a dtype, in its own; itself where that changes nothing."""
    if dtype == x.dtype:
        return x
    rounded = x.to(dtype).to(x.dtype)
    return x if torch.equal(rounded, x) else rounded
