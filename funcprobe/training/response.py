"""How a step answers to its gradient: the direction in parameter space along which the gradient's parts are weighed.

A functional F moves by `δF₁ = ⟨∇F, Δθ⟩`. To say which part of the gradient did it, the step is written as a function of
the gradient, and ∇F is carried back through it to a direction u: a part g_j of the gradient then has the share
⟨u, g_j⟩. There are two ways to do so, and they answer two questions:

    additive   Δθ = offset + scale ⊙ g, with denominators and clip factor at their actual values; u = scale ⊙ ∇F.
               All shares and ⟨∇F, offset⟩ (momentum, weight decay) sum to δF₁.
    jacobian   u = (∂Δθ/∂g)ᵀ ∇F, through denominators and clip factor: what if this part weighed a little less? The
               shares do not sum to δF₁ where the step is not linear in g.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from funcprobe import tree
from funcprobe.errors import InputError
from funcprobe.optimizers.closed_form import PureOptimizer
from funcprobe.optimizers.unreached import with_zeros
from funcprobe.training.rule import Rule
from funcprobe.types import Gradients, Leaves, Optimizer, OptState, Params

Form = Literal["auto", "additive", "jacobian"]


@runtime_checkable
class Differentiable(Protocol):
    """An optimizer whose step can be differentiated in the gradient."""

    def vjp(
        self, params: Params, opt_state: OptState, gradient: Gradients, covector: Params, lr: float | None = None
    ) -> Params:
        """Return `(∂Δθ/∂g)ᵀ c`, which is 0 at a leaf whose gradient is None."""
        ...


class Response(NamedTuple):
    """∇F carried back through a step."""

    form: Literal["additive", "jacobian"]
    direction: Leaves  #: u, in float32 or wider: a part g_j of the raw gradient has the share ⟨u, g_j⟩
    offsets: dict[str, dict[str, float]]  #: "momentum" and "weight decay": ⟨∇F_n, offset_n⟩ of every leaf n; or empty


def respond(
    rule: Rule,
    params: Params,
    opt_state: OptState,
    gradient: Gradients,
    covector: Params,
    lr: float | None = None,
    form: Form = "auto",
) -> Response:
    """Return ∇F (`covector`) carried back through the step that the raw `gradient` makes.

    "auto" is additive where the optimizer has that form (SGD, Adam, AdamW), and jacobian otherwise. At a leaf whose
    gradient is None the step answers to nothing, and direction and offsets are 0.

    Raises:
        InputError: If the form is unknown, or the optimizer cannot give it.
    """
    optimizer, form = rule.optimizer, form_of(rule.optimizer, form)
    clipped, coefficient, norm = rule.clipped(gradient)
    if isinstance(optimizer, PureOptimizer) and form == "additive":
        return _additive(optimizer, params, opt_state, clipped, covector, lr, coefficient)
    assert isinstance(optimizer, Differentiable)  # checked above
    u = optimizer.vjp(params, opt_state, clipped, covector, lr)
    return Response("jacobian", u if coefficient == 1.0 else _through_clip(u, gradient, coefficient, norm), {})


def form_of(optimizer: Optimizer, form: str) -> Literal["additive", "jacobian"]:
    """Return the form that is used where `form` is asked for: "auto" is additive where the optimizer has that form.

    Raises:
        InputError: If it cannot, or the form is unknown.
    """
    if form not in get_args(Form):
        raise InputError(f"Unknown form {form!r}; expected 'auto', 'additive' or 'jacobian'.")
    if form == "additive" and not isinstance(optimizer, PureOptimizer):
        raise InputError(
            f"{_name(optimizer)} has no additive form: its step is not offset + scale ⊙ g. Use form='jacobian'."
        )
    if not isinstance(optimizer, Differentiable):
        raise InputError(
            f"{_name(optimizer)} has no derivative in the gradient: it needs a method vjp(params, opt_state, gradient, "
            "covector, lr), as sgd, adamw and from_torch(...) have."
        )
    return "additive" if isinstance(optimizer, PureOptimizer) and form != "jacobian" else "jacobian"


def _additive(
    optimizer: PureOptimizer,
    params: Params,
    opt_state: OptState,
    clipped: Gradients,
    covector: Params,
    lr: float | None,
    coefficient: float,
) -> Response:
    """Return `coefficient · scale ⊙ ∇F`, leaf by leaf as it is read, and ⟨∇F, offset⟩ by leaf, in float64."""

    def weighed(name: str) -> Tensor:
        into = _empty({name: params[name]})
        pieces = optimizer.pieces(params, opt_state, clipped, lr, names=(name,))
        sides = (tree.pieces(x, params[name].device) for x in (into[name], covector[name]))
        for (_, _, terms), filled, c in zip(pieces, *sides, strict=True):
            filled.copy_(coefficient * terms.scale * c.to(terms.scale.device).double())
        return into[name]

    zero = torch.zeros((), dtype=torch.float64)
    offsets = {"momentum": dict.fromkeys(params, zero), "weight decay": dict.fromkeys(params, zero)}
    of = _pieces_of(covector, params)
    for name, _, terms in optimizer.pieces(params, opt_state, clipped, lr):
        c = next(of[name]).to(terms.scale.device).double()
        for what, offset in (("momentum", terms.momentum), ("weight decay", terms.decay)):
            offsets[what][name] = offsets[what][name] + (c * offset).sum().cpu()
    found = {}
    for what, by in offsets.items():
        sums = tree.over_processes(torch.stack(list(by.values())), params) if by else torch.zeros(0)
        found[what] = dict(zip(by, sums.tolist(), strict=True))
    return Response("additive", tree.Lazy(params, weighed), found)


def offsets_of(
    rule: Rule, params: Params, opt_state: OptState, gradient: Gradients, lr: float | None = None
) -> dict[str, Params]:
    """Return the parts of Δθ that are no multiple of the gradient: "momentum" and "weight decay", in float32 or wider.

    Raises:
        InputError: If the optimizer has no additive form.
    """
    found = {what: nothing(params) for what in ("momentum", "weight decay")}
    add_parts(found, rule, params, opt_state, gradient, lr)
    return found


@torch.no_grad()
def add_parts(
    into: Mapping[str, Params],
    rule: Rule,
    params: Params,
    opt_state: OptState,
    gradient: Gradients,
    lr: float | None = None,
) -> None:
    """Add the parts of Δθ to trees in float32 or wider: those of "gradient on U", "momentum", "weight decay" in `into`.

    "gradient on U" is `scale ⊙ g`; see the module. The trees are changed in place, piece by piece.

    Raises:
        InputError: If the optimizer has no additive form.
    """
    if not isinstance(rule.optimizer, PureOptimizer):
        raise InputError(f"{_name(rule.optimizer)} has no additive form: its step is not offset + scale ⊙ g.")
    clipped, _, _ = rule.clipped(gradient)
    filled = {what: _pieces_of(of, params) for what, of in into.items()}
    for name, g, terms in rule.optimizer.pieces(params, opt_state, clipped, lr):
        of = {"momentum": terms.momentum, "weight decay": terms.decay}
        for what, pieces in filled.items():
            next(pieces[name]).add_(terms.scale * g if what == "gradient on U" else of[what])


def nothing(params: Params) -> Params:
    """Return a tree of zeros of the parameters' shapes, in float32 or wider."""
    return {name: x.zero_() for name, x in _empty(params).items()}


def _empty(params: Params) -> Params:
    """Return a tree of the parameters' shapes, in float32 or wider, to be filled."""
    wide = {name: torch.promote_types(p.dtype, torch.float32) for name, p in params.items()}
    return {name: torch.empty(p.shape, dtype=wide[name], device=p.device) for name, p in params.items()}


def _pieces_of(leaves: Leaves, params: Params) -> dict[str, Iterator[Tensor]]:
    """Return the pieces of every leaf, cut as the optimizer cuts the parameters."""
    return {name: iter(tree.pieces(leaves[name], p.device)) for name, p in params.items()}


def _through_clip(u: Params, gradient: Gradients, coefficient: float, norm: float) -> Params:
    """Return `(∂(k g)/∂g)ᵀ u = k (u − g ⟨g, u⟩ / (‖g‖ (‖g‖ + 1e-6)))`, for the clip factor `k = M / (‖g‖ + 1e-6)`."""
    g = with_zeros(gradient, u)
    along = float(tree.dot(g, u)) / (norm * (norm + 1e-6))
    return tree.map_(lambda ui, gi: coefficient * (ui - along * gi.to(ui)), u, g)


def _name(optimizer: object) -> str:
    return getattr(getattr(optimizer, "cls", type(optimizer)), "__name__", type(optimizer).__name__)
