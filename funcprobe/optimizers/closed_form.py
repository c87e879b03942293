"""SGD, Adam and AdamW over torch's functional kernels, with their step in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcprobe import tree
from funcprobe.optimizers import kernels
from funcprobe.optimizers.groups import Group, assignments, check_gradient
from funcprobe.optimizers.kernels import Kernel, State, Terms, dense, laid_out_as, still
from funcprobe.optimizers.state import check_state
from funcprobe.optimizers.unreached import reached
from funcprobe.types import Gradients, OptimizerResult, OptState, Params

#: The classes whose step is known in closed form.
KERNELS: dict[type[torch.optim.Optimizer], Kernel] = {
    torch.optim.SGD: kernels.SGD,
    torch.optim.Adam: kernels.ADAM,
    torch.optim.AdamW: kernels.ADAM,
}


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

    def apply(
        self, params: Params, opt_state: OptState, gradient: Gradients, lr: float | None = None
    ) -> OptimizerResult:
        """Return parameters, Δθ and state after one step; `lr` overrides every group's for this call.

        Raises:
            InputError: If names, shapes or the learning rate do not fit.
        """
        check_gradient(params, gradient)
        there = {name: g.detach() for name, g in reached(gradient).items()}
        delta = self.delta(params, opt_state, {name: there.get(name) for name in params}, lr)
        after = {name: leaf.detach().clone() for name, leaf in params.items() if name not in there}
        state_after = {name: self._kept(name, params, opt_state) for name in after}
        for names, hyper in assignments(self.groups, params, lr):
            mine = [name for name in names if name in there]
            leaves = [dense(params[name]) for name in mine]
            # copies of gradients too: foreach kernels write on them
            grads = [dense(there[n], params[n].dtype, params[n].device) for n in mine]
            states = [self._state(name, params, opt_state, hyper, copy=True) for name in mine]
            if mine:
                with torch.no_grad():
                    self._kernel.run(leaves, grads, states, hyper)
            after |= {name: laid_out_as(leaf, params[name]) for name, leaf in zip(mine, leaves, strict=True)}
            state_after |= dict(zip(mine, states, strict=True))
        return OptimizerResult(
            {name: after[name] for name in params}, delta, {name: state_after[name] for name in params}
        )

    def delta(self, params: Params, opt_state: OptState, gradient: Gradients, lr: float | None = None) -> Params:
        """Return the step `Δθ` alone, in float32 (float64 for float64 leaves); differentiable in the gradient.

        A leaf is worked on in flat chunks, so that float64 temporaries do not grow with it.

        Raises:
            InputError: If names or shapes do not fit.
        """
        return self._delta(params, opt_state, gradient, lr)

    def _delta(
        self, params: Params, opt_state: OptState, gradient: Gradients, lr: float | None, as_stored: bool = True
    ) -> Params:
        pieces: dict[str, list[Tensor]] = {name: [] for name in params}
        for name, g, terms in self.pieces(params, opt_state, gradient, lr, as_stored=as_stored):
            wide = torch.promote_types(params[name].dtype, torch.float32)
            pieces[name].append((terms.scale * g.double()).add_(terms.momentum + terms.decay).to(wide))
        return {name: _joined(found).reshape(params[name].shape) for name, found in pieces.items()}

    def vjp(
        self, params: Params, opt_state: OptState, gradient: Gradients, covector: Params, lr: float | None = None
    ) -> Params:
        """Return `(∂Δθ/∂g)ᵀ c` at the gradient, float32 or wider: through the denominators too, which `terms` holds.

        At a leaf whose gradient is None it is 0.

        Raises:
            InputError: If names or shapes do not fit.
        """

        def wide(x: Tensor, name: str) -> Tensor:
            return x.to(torch.promote_types(params[name].dtype, torch.float32))

        # the gradient as it is stored, differentiated in a dtype that does not round its derivative
        at = {name: wide(g.to(params[name].dtype), name) for name, g in reached(gradient).items()}
        _, pull = torch.func.vjp(  # type: ignore[misc]
            lambda g: self._delta(params, opt_state, {**gradient, **g}, lr, as_stored=False), at
        )
        (found,) = pull({name: wide(c, name) for name, c in covector.items()})
        return {name: found[name] if name in found else wide(torch.zeros_like(p), name) for name, p in params.items()}

    def affine(self, params: Params, opt_state: OptState, gradient: Gradients, lr: float | None = None) -> Affine:
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

    def terms(
        self, params: Params, opt_state: OptState, gradient: Gradients, lr: float | None = None
    ) -> dict[str, Terms]:
        """Return for every leaf `(scale, momentum, decay)`, float64: the affine form with its offset in two parts.

        Raises:
            InputError: If names or shapes do not fit.
        """
        leaves = self._leaves(params, lr)
        return {name: self._terms(name, params, opt_state, gradient, leaves[name]) for name in params}

    def pieces(
        self,
        params: Params,
        opt_state: OptState,
        gradient: Gradients,
        lr: float | None = None,
        *,
        as_stored: bool = True,
    ) -> Iterator[tuple[str, Tensor, Terms]]:
        """Yield (leaf, gradient, terms) for flat pieces of every leaf, in order: the results of `terms`, cut.

        Where the gradient of a leaf is None, its pieces are 0, terms and all.

        Float64 temporaries then do not grow with a leaf, and an embedding has hundreds of millions of entries. The
        gradient is rounded to the dtype of its leaf, as an optimizer sees it, unless `as_stored` is false.

        Raises:
            InputError: If names or shapes do not fit.
        """
        leaves = self._leaves(params, lr)
        for name, p in params.items():
            leaf, whole = p.detach(), gradient[name]
            if whole is None:
                yield from ((name, torch.zeros_like(theta), still(theta)) for theta in tree.pieces(leaf))
                continue
            state = self._state(name, params, opt_state, leaves[name])
            sides = tree.pieces(leaf), tree.pieces(whole), _state_pieces(state, leaf)
            for theta, g, entries in zip(*sides, strict=True):
                g = g.to(leaf.dtype) if as_stored else g
                yield name, g, self._kernel.terms(theta, g, entries, leaves[name])

    @property
    def _kernel(self) -> Kernel:
        return KERNELS[self.cls]

    def _leaves(self, params: Params, lr: float | None) -> dict[str, dict[str, Any]]:
        return {name: hyper for names, hyper in assignments(self.groups, params, lr) for name in names}

    def _terms(
        self, name: str, params: Params, opt_state: OptState, gradient: Gradients, hyper: Mapping[str, Any]
    ) -> Terms:
        leaf, g = params[name].detach(), gradient[name]
        if g is None:
            return still(leaf)
        return self._kernel.terms(leaf, g.to(leaf.dtype), self._state(name, params, opt_state, hyper), hyper)

    def _kept(self, name: str, params: Params, opt_state: OptState) -> dict[str, Tensor]:
        """Return a copy of the state of a leaf that does not step, as it is."""
        return {key: value.detach().clone() for key, value in check_state(name, params[name], opt_state).items()}

    def _state(
        self, name: str, params: Params, opt_state: OptState, hyper: Mapping[str, Any], copy: bool = False
    ) -> dict[str, Tensor]:
        """Return a leaf's state, typed and placed as torch's load_state_dict does; an empty one is initialised."""
        leaf, state = params[name].detach(), check_state(name, params[name], opt_state, self._kernel.keys(hyper))
        if not state:
            return self._kernel.init(leaf, hyper)
        placed = {k: v.detach().to(leaf.device, leaf.dtype) for k, v in state.items() if k != "step"}
        if "step" in state:
            step = state["step"].detach()
            placed["step"] = step if step.is_floating_point() else step.to(kernels.step_dtype(hyper))
        placed = {key: placed[key] for key in state}
        return {key: dense(value) for key, value in placed.items()} if copy else placed


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _state_pieces(state: State, leaf: Tensor) -> Iterator[State]:
    """Yield the part of a leaf's state that belongs to each of its pieces; `step` belongs to all of them."""
    cut = {key: tree.pieces(value) for key, value in state.items() if key != "step"}
    whole = {key: value for key, value in state.items() if key == "step"}
    for index in range(len(tree.pieces(leaf))):
        yield {**whole, **{key: parts[index] for key, parts in cut.items()}}
