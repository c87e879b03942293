"""SGD, Adam and AdamW over torch's functional kernels, with their step in closed form."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcprobe import tree
from funcprobe.optimizers import kernels
from funcprobe.optimizers.affine import Form, Terms
from funcprobe.optimizers.groups import Group, assignments, check_gradient
from funcprobe.optimizers.kernels import Kernel, State, dense, laid_out_as
from funcprobe.optimizers.state import check_state
from funcprobe.optimizers.unreached import reached
from funcprobe.types import Gradients, Leaves, OptimizerResult, OptState, Params

#: The classes whose step is known in closed form.
KERNELS: dict[type[torch.optim.Optimizer], Kernel] = {
    torch.optim.SGD: kernels.SGD,
    torch.optim.Adam: kernels.ADAM,
    torch.optim.AdamW: kernels.ADAM,
}


class Entries(NamedTuple):
    """A flat piece of a leaf with all that belongs to it, at the values that the run keeps."""

    theta: Tensor  #: [n]
    gradient: Tensor  #: [n], as it came
    state: State  #: [n] each, and `step`, which belongs to all pieces


@dataclass(frozen=True)
class PureOptimizer:
    """SGD, Adam or AdamW over torch's functional kernels, with their step in closed form.

    A leaf is worked on in flat pieces, whose temporaries do not grow with it: an embedding has hundreds of millions of
    entries. Moments and gradient may lie on another device than the leaf, and go there a piece at a time.
    """

    cls: type[torch.optim.Optimizer]  #: the class in torch.optim whose results are reproduced
    groups: tuple[Group, ...]  #: complete hyperparameters for every leaf
    #: the dtype in which a run keeps a leaf and its moments, where it is another than it is computed in: see `stored`
    storage: Mapping[str, torch.dtype] = field(default_factory=dict)

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

    def apply(
        self, params: Params, opt_state: OptState, gradient: Gradients, lr: float | None = None
    ) -> OptimizerResult:
        """Return parameters, Δθ and state after one step; `lr` overrides every group's for this call.

        Raises:
            InputError: If names, shapes or the learning rate do not fit.
        """
        check_gradient(params, gradient)
        hypers = self._leaves(params, lr)
        steps = {name: self._run(name, params, opt_state, gradient, hypers[name]) for name in params}
        delta = {name: self._delta_of(name, params, opt_state, gradient, hypers[name]) for name in params}
        return OptimizerResult({n: p for n, (p, _) in steps.items()}, delta, {n: s for n, (_, s) in steps.items()})

    def lazily(
        self, params: Params, opt_state: OptState, gradient: Gradients, lr: float | None = None
    ) -> tuple[Leaves, Leaves]:
        """Return θ′ and Δθ as `apply` does, each leaf computed when it is read: no state after the step, no whole tree.

        Raises:
            InputError: If names, shapes or the learning rate do not fit.
        """
        check_gradient(params, gradient)
        hypers = self._leaves(params, lr)
        return (
            tree.Lazy(params, lambda name: self._run(name, params, opt_state, gradient, hypers[name])[0]),
            tree.Lazy(params, lambda name: self._delta_of(name, params, opt_state, gradient, hypers[name])),
        )

    @torch.no_grad()
    def _delta_of(
        self, name: str, params: Params, opt_state: OptState, gradient: Gradients, hyper: Mapping[str, Any]
    ) -> Tensor:
        leaf = params[name].detach()
        if gradient[name] is None:
            return torch.zeros_like(leaf, dtype=_wide(leaf))
        entries = self._entries(name, params, opt_state, gradient, hyper)
        formed = (self._formed(leaf, each, hyper) for each in entries)
        return _filled(leaf, _wide(leaf), (form.step(theta, g) for theta, g, form in formed))

    def delta(self, params: Params, opt_state: OptState, gradient: Gradients, lr: float | None = None) -> Params:
        """Return the step `Δθ` alone, in float32 (float64 for float64 leaves); differentiable in the gradient.

        Raises:
            InputError: If names or shapes do not fit.
        """
        return self._differentiable(params, opt_state, gradient, lr, as_stored=True)

    def _differentiable(
        self, params: Params, opt_state: OptState, gradient: Gradients, lr: float | None, as_stored: bool
    ) -> Params:
        pieces: dict[str, list[Tensor]] = {name: [] for name in params}
        for name, theta, g, form in self._forms(params, opt_state, gradient, lr, as_stored):
            moved = g if form is None else form.step(theta, g)
            pieces[name].append(moved.to(_wide(params[name])))
        return {name: _joined(found, params[name]) for name, found in pieces.items()}

    def vjp(
        self, params: Params, opt_state: OptState, gradient: Gradients, covector: Params, lr: float | None = None
    ) -> Params:
        """Return `(∂Δθ/∂g)ᵀ c` at the gradient, float32 or wider: through the denominators too, which `terms` holds.

        At a leaf whose gradient is None it is 0.

        Raises:
            InputError: If names or shapes do not fit.
        """

        def wide(x: Tensor, name: str) -> Tensor:
            return x.to(_wide(params[name]))

        # the gradient as it is stored, differentiated in a dtype that does not round its derivative
        at = {name: wide(g.to(params[name].dtype), name) for name, g in reached(gradient).items()}
        _, pull = torch.func.vjp(  # type: ignore[misc]
            lambda g: self._differentiable(params, opt_state, {**gradient, **g}, lr, as_stored=False), at
        )
        (found,) = pull({name: wide(c, name) for name, c in covector.items()})
        return {name: found[name] if name in found else wide(torch.zeros_like(p), name) for name, p in params.items()}

    def terms(
        self, params: Params, opt_state: OptState, gradient: Gradients, lr: float | None = None
    ) -> dict[str, Terms]:
        """Return for every leaf `(scale, momentum, decay)` with `Δθ = scale ⊙ g + momentum + decay`, in float64.

        AdamW: `scale = −η(1−β₁)/(bc₁·denom)`, `momentum = −ηβ₁m/(bc₁·denom)`, `decay = −ηλθ`; Adam's coupled decay is
        `scale ⊙ λθ`; SGD with momentum μ: `−η(1−damp) g` and `−ημ·buf`, Nesterov accordingly. None is ever taken as a
        difference of steps.

        Raises:
            InputError: If names or shapes do not fit.
        """
        found: dict[str, list[Terms]] = {name: [] for name in params}
        for name, _, terms in self.pieces(params, opt_state, gradient, lr):
            found[name].append(terms)
        return {n: Terms(*(_joined(of, params[n]) for of in zip(*each, strict=True))) for n, each in found.items()}

    def pieces(
        self,
        params: Params,
        opt_state: OptState,
        gradient: Gradients,
        lr: float | None = None,
        *,
        as_stored: bool = True,
        names: Collection[str] | None = None,
    ) -> Iterator[tuple[str, Tensor, Terms]]:
        """Yield (name, gradient, terms) for flat pieces of all leaves, or of some, in order: `terms`, cut.

        Where the gradient of a leaf is None, its pieces are 0, terms and all. The gradient is rounded to the dtype of
        its leaf, as an optimizer sees it, unless `as_stored` is false; it is in float64.

        Raises:
            InputError: If names or shapes do not fit.
        """
        for name, theta, g, form in self._forms(params, opt_state, gradient, lr, as_stored, names):
            yield name, g, Terms(g, g, g) if form is None else form.terms(theta)

    def _forms(
        self,
        params: Params,
        opt_state: OptState,
        gradient: Gradients,
        lr: float | None,
        as_stored: bool,
        names: Collection[str] | None = None,
    ) -> Iterator[tuple[str, Tensor, Tensor, Form | None]]:
        """Yield (name, parameters, gradient in float64, form) of flat pieces; where it is None: 0 and no form."""
        hypers = self._leaves(params, lr)
        for name, leaf in params.items():
            if names is not None and name not in names:
                continue
            if gradient[name] is None:
                yield from ((name, theta, _nothing(theta), None) for theta in tree.pieces(leaf.detach()))
                continue
            for entries in self._entries(name, params, opt_state, gradient, hypers[name]):
                yield name, *self._formed(leaf, entries, hypers[name], as_stored)

    @property
    def _kernel(self) -> Kernel:
        return KERNELS[self.cls]

    def _leaves(self, params: Params, lr: float | None) -> dict[str, dict[str, Any]]:
        return {name: hyper for names, hyper in assignments(self.groups, params, lr) for name in names}

    @staticmethod
    def _step(step: Tensor, leaf: Tensor, hyper: Mapping[str, Any]) -> Tensor:
        """Return a step count where the kernel wants it; an old file may hold it as an integer."""
        placed = step.detach().to(leaf.device if hyper["fused"] or hyper["capturable"] else step.device)
        return placed if placed.is_floating_point() else placed.to(kernels.step_dtype(hyper))

    def _entries(
        self,
        name: str,
        params: Params,
        opt_state: OptState,
        gradient: Gradients,
        hyper: Mapping[str, Any],
        in_pieces: bool = True,
    ) -> Iterator[Entries]:
        """Yield the pieces of a leaf that steps, or all of it, typed and placed as torch's load_state_dict does.

        Raises:
            InputError: If the state does not fit.
        """
        leaf, g = params[name].detach(), gradient[name]
        assert g is not None
        kept = self.storage.get(name, leaf.dtype)
        state = check_state(name, leaf, opt_state, self._kernel.keys(hyper))
        own = {"theta": leaf, "gradient": g, **{key: x.detach() for key, x in state.items() if key != "step"}}
        cut = {key: tree.pieces(x, leaf.device) if in_pieces else (x.reshape(-1),) for key, x in own.items()}
        for index in range(len(cut["theta"])):
            theta, found = cut["theta"][index].to(kept), {}
            for key, x in state.items():
                found[key] = self._step(x, leaf, hyper) if key == "step" else cut[key][index].to(leaf.device, kept)
            init = found if state else self._kernel.init(theta, hyper)
            yield Entries(theta, cut["gradient"][index].to(leaf.device), init)

    def _formed(
        self, leaf: Tensor, entries: Entries, hyper: Mapping[str, Any], as_stored: bool = True
    ) -> tuple[Tensor, Tensor, Form]:
        """Return a piece's parameters, its gradient in float64, and its step in closed form."""
        g = (entries.gradient.to(leaf.dtype) if as_stored else entries.gradient).double()
        theta = entries.theta.to(leaf.dtype)
        state = {key: x if key == "step" else x.to(leaf.dtype) for key, x in entries.state.items()}
        return theta, g, self._kernel.form(theta, g, state, hyper)

    @torch.no_grad()
    def _run(
        self, name: str, params: Params, opt_state: OptState, gradient: Gradients, hyper: Mapping[str, Any]
    ) -> tuple[Tensor, State]:
        """Return a leaf and its state after torch's own kernel, which writes on copies.

        They are of the whole leaf: beside the end of a piece a processor's kernels round in another way.
        """
        leaf = params[name].detach()
        if gradient[name] is None:
            kept = check_state(name, leaf, opt_state)
            return leaf.clone(), {key: x.detach().clone() for key, x in kept.items()}
        (whole,) = self._entries(name, params, opt_state, gradient, hyper, in_pieces=False)
        theta, g = dense(whole.theta), whole.gradient.to(whole.theta.dtype).contiguous()  # read, never written
        state = {key: dense(x) for key, x in whole.state.items()}
        self._kernel.run([theta], [g], [state], hyper)
        moments = {key: x if key == "step" else x.reshape(leaf.shape).to(leaf.dtype) for key, x in state.items()}
        return laid_out_as(theta.reshape(leaf.shape).to(leaf.dtype), leaf), moments


def _wide(leaf: Tensor) -> torch.dtype:
    return torch.promote_types(leaf.dtype, torch.float32)


def _nothing(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.float64)


def _joined(pieces: Sequence[Tensor], leaf: Tensor) -> Tensor:
    return (pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))).reshape(leaf.shape)


def _filled(leaf: Tensor, dtype: torch.dtype, pieces: Iterator[Tensor]) -> Tensor:
    """Return pieces put together without a second copy of them all."""
    whole = torch.empty(leaf.shape, dtype=dtype, device=leaf.device)
    for into, piece in zip(tree.pieces(whole, leaf.device), pieces, strict=True):
        into.copy_(piece)
    return whole
