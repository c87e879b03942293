"""Any torch.optim optimizer class as a pure optimizer: a real instance, on copies, thrown away after one step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcprobe.errors import InputError
from funcprobe.optimizers.groups import Group, assignments, check_gradient
from funcprobe.optimizers.kernels import dense, laid_out_as
from funcprobe.optimizers.state import as_tensor, check_state
from funcprobe.optimizers.unreached import reached
from funcprobe.types import Gradients, OptimizerResult, OptState, Params


@dataclass(frozen=True)
class LiftedOptimizer:
    """An optimizer class of torch.optim, or of anybody, run on copies.

    Its `delta` is the difference of a second run on float64 copies, so it is accurate to about 1e-16·|θ|/|Δθ|. A
    class that rounds inside (Muon orthogonalises in bfloat16) rounds there too.
    """

    cls: type[torch.optim.Optimizer]  #: the class that is run
    groups: tuple[Group, ...]  #: complete hyperparameters for every leaf

    @property
    def lr(self) -> float:
        """The first group's learning rate."""
        return float(self.groups[0].hyperparameters["lr"])

    def init(self, params: Params) -> OptState:
        """Return an empty state for every leaf; the class fills it at its first step.

        Raises:
            InputError: If the groups and the parameters do not have the same names.
        """
        list(assignments(self.groups, params, None))
        return {name: {} for name in params}

    def apply(
        self, params: Params, opt_state: OptState, gradient: Gradients, lr: float | None = None
    ) -> OptimizerResult:
        """Return parameters, Δθ and state after one step; `lr` overrides every group's for this call.

        Raises:
            InputError: If names, shapes or the learning rate do not fit.
        """
        check_gradient(params, gradient)
        after, state = self._run(params, opt_state, gradient, lr, wide=False)
        exact, _ = self._run(params, opt_state, gradient, lr, wide=True)
        delta = {
            name: (exact[name] - p.detach().double()).to(torch.promote_types(p.dtype, torch.float32))
            for name, p in params.items()
        }
        return OptimizerResult(after, delta, state)

    def vjp(
        self, params: Params, opt_state: OptState, gradient: Gradients, covector: Params, lr: float | None = None
    ) -> Params:
        """Return `(∂Δθ/∂g)ᵀ c` at the gradient, by running the step on float64 copies with a graph.

        A class that has the option takes torch's `differentiable=True`; of any other the step is run as it is written,
        and what it reads out of a tensor as a number (the clip of Adafactor) is held. At a leaf whose gradient is None
        it is 0.

        Raises:
            InputError: If names, shapes or the learning rate do not fit, or the step cuts the graph.
        """
        check_gradient(params, gradient)
        leaves = {n: g.requires_grad_() for n, g in self._gradients(params, gradient, wide=True).items()}
        instance, copies = self._instance(params, opt_state, leaves, lr, wide=True, graph=True)
        # in-place arithmetic overwrites what a backward pass needs; torch keeps copies of it here
        with _generators_kept(params), torch.autograd.graph.allow_mutation_on_saved_tensors(), torch.enable_grad():
            inspect.unwrap(self.cls.step)(instance)
            value = torch.stack([(copies[n] * c.double()).sum() for n, c in covector.items()]).sum()
            if not value.requires_grad:
                raise InputError(
                    f"The step of {self.cls.__name__} cuts the graph between gradient and parameters, so it has no "
                    "derivative; attribute with an optimizer of torch.optim."
                )
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
        # √v has no derivative at v = 0, where an entry never had a gradient: no part of the gradient has a share in it
        pulled = dict(zip(leaves, found, strict=True))
        return {
            n: torch.where(torch.isfinite(pulled[n]) | (leaves[n] != 0), pulled[n], 0.0)
            if n in pulled
            else torch.zeros_like(p, dtype=torch.float64)
            for n, p in params.items()
        }

    def _run(
        self, params: Params, opt_state: OptState, gradient: Gradients, lr: float | None, wide: bool
    ) -> tuple[Params, OptState]:
        """Step a fresh instance on copies, in float64 if `wide`; the global generators are put back afterwards.

        The state of a leaf without a gradient is the given one: some classes (Adagrad) make one when they are built.
        """
        wanted = self._gradients(params, gradient, wide)
        instance, copies = self._instance(params, opt_state, wanted, lr, wide)
        with _generators_kept(params):
            instance.step()
        after = {name: laid_out_as(copy.detach(), params[name]) for name, copy in copies.items()}
        states = {n: instance.state.get(copy, {}) if n in wanted else opt_state[n] for n, copy in copies.items()}
        return after, {name: _stored(name, state) for name, state in states.items()}

    def _gradients(self, params: Params, gradient: Gradients, wide: bool) -> Params:
        """Return copies of the gradients that exist, rounded to the dtype of their leaf; in float64 where `wide`."""
        return {
            name: dense(g.to(params[name].dtype), torch.float64 if wide else params[name].dtype)
            for name, g in reached(gradient).items()
        }

    def _instance(
        self,
        params: Params,
        opt_state: OptState,
        gradient: Params,
        lr: float | None,
        wide: bool,
        graph: bool = False,
    ) -> tuple[torch.optim.Optimizer, Params]:
        """Return a fresh instance of the class over copies of the leaves, which carry that gradient."""
        copies = {name: dense(p, torch.float64 if wide else p.dtype) for name, p in params.items()}
        for name, copy in copies.items():
            copy.grad = gradient.get(name)
        groups: list[dict[str, Any]] = []
        for names, hyper in assignments(self.groups, params, lr):
            fixed = pinned(hyper, params[names[0]].dtype) if wide and names else hyper
            groups.append({**fixed, **(_differentiable(hyper) if graph else {}), "params": [copies[n] for n in names]})
        taken = inspect.signature(self.cls).parameters
        instance = self.cls(groups, **{k: v for k, v in groups[0].items() if k in taken and k != "params"})
        for name, copy in copies.items():
            if state := check_state(name, params[name], opt_state):
                instance.state[copy] = {key: _loaded(value, wide) for key, value in state.items()}
        if any("step" in state and not isinstance(state["step"], Tensor) for state in instance.state.values()):
            # as load_state_dict does: torch's classes make a tensor of a step count that old versions kept as an int
            instance.__setstate__({"state": instance.state, "param_groups": instance.param_groups})
        return instance, copies


def refuse(cls: type[torch.optim.Optimizer]) -> None:
    """Check that a class can step on dense gradients alone.

    Raises:
        InputError: If it needs a closure (LBFGS) or sparse gradients (SparseAdam), or is no optimizer.
    """
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise InputError(f"from_torch takes a torch.optim.Optimizer class, and was given {cls!r}.")
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise InputError(
            f"{cls.__name__} evaluates the loss through a closure during its step; one update is one gradient here. "
            "Use an optimizer whose step takes no closure."
        )
    if issubclass(cls, torch.optim.SparseAdam):
        raise InputError("SparseAdam takes sparse gradients, and gradients are dense here; use Adam.")


def pinned(hyper: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the hyperparameters with Adafactor's dtype-dependent default epsilon at its value for `dtype`."""
    eps = hyper.get("eps")
    if isinstance(eps, tuple) and eps[0] is None:
        return {**hyper, "eps": (torch.finfo(dtype).eps, *eps[1:])}
    return hyper


def _differentiable(hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options under which a class keeps a graph: those of torch's that it has."""
    wanted = {"differentiable": True, "foreach": False, "fused": False, "capturable": False}
    return {key: value for key, value in wanted.items() if key in hyper}


def _generators_kept(params: Params) -> AbstractContextManager[None]:
    devices = sorted({p.device.index for p in params.values() if p.device.type == "cuda"})
    return torch.random.fork_rng(devices=devices)


def _loaded(value: Tensor, wide: bool) -> Any:
    """Return a state entry for the class to change: an int64 scalar stands for a Python int, as many classes keep."""
    if value.dim() == 0 and value.dtype == torch.int64:
        return int(value)
    return dense(value, torch.float64 if wide and value.is_floating_point() else value.dtype)


def _stored(name: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: as_tensor(name, key, value) for key, value in state.items() if value is not None}
