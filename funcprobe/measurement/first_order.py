"""The first order of a step on the evaluation rollouts, in forward or in reverse mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe import engine, tree
from funcprobe.engine.passes import Passes
from funcprobe.errors import ForwardModeError
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.options import Inquiry
from funcprobe.measurement.routing import Choices, watched
from funcprobe.measurement.second_order import curved, second_by_reverse
from funcprobe.types import Observable, Params, Rollouts, TokenScores

_MATH_KERNEL = "attention ran in the math kernel on E, because fused kernels have no forward derivative"
_ONE_BY_ONE = "experts ran one by one on E, because grouped products have no forward derivative"


class First(NamedTuple):
    """The anchor's scores, and the first order in whichever form the mode gives it."""

    scores: TokenScores  #: [B, T] at θ
    along: engine.Directional | None  #: forward mode: tangents along Δθ, for every observable at once
    gradients: Mapping[str, Params]  #: reverse mode: ∇F of each observable
    eps: float | None = None  #: of the arithmetic that made the scores
    seconds: Mapping[str, float] = {}  #: δF₂ of each observable, where it was taken forward over reverse
    choices: Choices | None = None  #: the experts that tokens went to at θ

    @property
    def mode(self) -> str:
        """Return "forward" or "reverse"."""
        return "reverse" if self.along is None else "forward"

    def value(self, name: str, observable: Observable, evidence: Evidence, update: Params) -> float | None:
        """Return δF₁ of an observable; None in reverse mode for one whose ∇F was not taken."""
        if self.along is not None:
            return float(evidence.first_order(observable))
        return float(tree.dot(self.gradients[name], update)) if name in self.gradients else None

    def scaled(self, c: float) -> First:
        """Return the same for `c·Δθ`; ∇F does not know which way it will be asked along."""
        if self.along is None:
            return self
        seconds = {name: c * c * second for name, second in self.seconds.items()}
        return self._replace(along=self.along.scaled(c), seconds=seconds)

    def second(self, name: str, observable: Observable, evidence: Evidence) -> float | None:
        """Return δF₂ of an observable; None where no second order was asked for."""
        if self.along is None:
            return None
        if self.along.curvatures is not None:
            return float(evidence.second_order(observable))
        if not bool(engine.fields(engine.cotangents(evidence.of(observable), self.along.scores)).any()):
            # a divergence: D²F = f″[ṡ, ṡ] + f′·s̈, and f′ = 0 at the anchor
            flat = self.along._replace(curvatures=engine.each(torch.zeros_like, self.along.scores))
            return float(evidence._replace(along=flat).second_order(observable))
        return self.seconds.get(name)


def first_order(asked: Inquiry, params: Params, update: Params) -> First:
    """Return the anchor's scores and the first order along the update, in forward mode where the model allows.

    Raises:
        ForwardModeError: If the model has no forward derivative and forward mode, a path or order 2 was asked for.
    """
    options = asked.options
    if options.mode != "reverse":
        try:
            found = _forward(asked, params, update)
        except ForwardModeError as error:
            if options.order == 2 or options.method == "path":
                wanted = "order=2" if options.order == 2 else "method='path'"
                raise ForwardModeError(
                    f"{str(error).removesuffix('.')}, and leave out {wanted}, which needs one."
                ) from error
            if options.mode == "forward":
                raise
            asked.said.notes.append(f"reverse mode was used: {error}")
        else:
            asked.said.found(asked.passes.policy.checks)
            return found
    found = _reverse(asked, params)
    asked.said.found(asked.passes.policy.checks)
    return found


def first_orders(asked: Inquiry, params: Params, updates: Sequence[Params]) -> list[First]:
    """Return the first order along each of several updates: one forward pass with a tangent each, or one ∇F for all.

    Raises:
        ForwardModeError: As `first_order`.
    """
    options = asked.options
    if len(updates) > 1 and options.order == 1 and options.mode != "reverse":
        passes, choices = _watching(asked)
        try:
            several = passes.directional_of_many(params, updates, f"E, forward mode along {len(updates)} steps")
        except ForwardModeError:
            pass  # what it means is decided where a single update meets it
        else:
            found_of = engine.arithmetic(asked.passes.policy, params)
            asked.said.notes += _kernels(found_of)
            asked.said.found(asked.passes.policy.checks)
            return [First(along.scores, along, {}, found_of.eps, choices=choices) for along in several]
    found: list[First] = []
    for update in updates:
        # ∇F does not know along which update it will be asked
        shared = found and found[0].along is None
        found.append(found[0] if shared else first_order(asked, params, update))
    return found


def _forward(asked: Inquiry, params: Params, update: Params) -> First:
    (passes, choices), seconds = _watching(asked), {}
    arithmetic = engine.arithmetic(asked.passes.policy, params)
    if asked.options.order == 1:
        along = passes.directional(params, update, "E, forward mode")
    else:
        along, off = curved(passes, params, update, arithmetic.eps)
        if along.curvatures is None:
            asked.said.notes.append(
                f"the second order was taken forward over reverse: nested forward mode was off by {off:.1e}"
            )
            seconds = {n: second_by_reverse(passes, params, update, o, along) for n, o in asked.observables.items()}
    asked.said.notes += _kernels(arithmetic)
    return First(along.scores, along, {}, arithmetic.eps, seconds, choices)


def _kernels(arithmetic: engine.Arithmetic) -> list[str]:
    """Say which kernels stood in for the policy's own."""
    attention = [_MATH_KERNEL] if arithmetic.fused_attention else []
    return attention + ([_ONE_BY_ONE] if arithmetic.grouped_experts else [])


def _reverse(asked: Inquiry, params: Params) -> First:
    found: dict[str, engine.Gradient] = {}
    passes, choices = _watching(asked)
    for name, observable in asked.observables.items():

        def f(scores: TokenScores, rollouts: Rollouts, o: Observable = observable) -> tuple[Tensor, dict[str, Tensor]]:
            return o(scores, engine.detached(scores), rollouts), {}

        found[name] = passes.gradient(f, params, "E, reverse mode")
    scores = next(iter(found.values())).scores
    eps = engine.arithmetic(asked.passes.policy, params).eps
    return First(scores, None, {name: g.gradient for name, g in found.items()}, eps, choices=choices)


def _watching(asked: Inquiry) -> tuple[Passes, Choices]:
    choices = Choices(asked.passes)
    return watched(asked.passes, choices), choices
