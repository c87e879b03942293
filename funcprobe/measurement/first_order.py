"""The first order of a step on the evaluation rollouts, in forward or in reverse mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe import engine, tree
from funcprobe.engine.kernels import without_batching_rule
from funcprobe.engine.passes import Passes
from funcprobe.errors import ForwardModeError, Note
from funcprobe.estimators.uncertainty import Replicates
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.measurement import Measurement
from funcprobe.measurement.readings import scaled_orders
from funcprobe.measurement.routing import Choices, watched
from funcprobe.measurement.second_order import curved, second_by_reverse
from funcprobe.types import Leaves, Observable, Params, Rollouts, TokenScores

_OWN_FORM = Note(
    "kernels", "attention on E ran in a form that has a forward derivative, which torch's fused kernels have not"
)
_ONE_BY_ONE = Note("kernels", "experts ran one by one on E, because grouped products have no forward derivative")


class FirstOrder(NamedTuple):
    """The anchor's scores, and the first order in whichever form the mode gives it."""

    scores: TokenScores  #: [B, T] at θ
    along: engine.Directional | None  #: forward mode: tangents along Δθ, for every observable at once
    gradients: Mapping[str, Params]  #: reverse mode: ∇F of each observable
    eps: float | None = None  #: of the arithmetic that made the scores
    seconds: Mapping[str, float] = {}  #: δF₂ of each observable, where it is known: not from the curvatures
    choices: Choices | None = None  #: the experts that tokens went to at θ
    rounding: engine.Directional | None = None  #: tangents along (θ′ − θ) − Δθ, where they came with the others
    orders: Replicates | None = None  #: δF₁ and δF₂ resampled over prompts, where that is known already

    @property
    def mode(self) -> str:
        """Return "forward" or "reverse"."""
        return "reverse" if self.along is None else "forward"

    def value(self, name: str, observable: Observable, evidence: Evidence, delta: Leaves) -> float | None:
        """Return δF₁ of an observable; None in reverse mode for one whose ∇F was not taken."""
        if self.along is not None:
            return float(evidence.first_order(observable))
        return float(tree.dot(self.gradients[name], delta)) if name in self.gradients else None

    def scaled(self, c: float) -> FirstOrder:
        """Return the same for `c·Δθ`; ∇F does not know which way it will be asked along."""
        if self.along is None:
            return self
        seconds = {name: c * c * second for name, second in self.seconds.items()}
        orders = None if self.orders is None else scaled_orders(self.orders, c)
        return self._replace(along=self.along.scaled(c), seconds=seconds, orders=orders)

    def second(self, name: str, observable: Observable, evidence: Evidence) -> float | None:
        """Return δF₂ of an observable; None where no second order was asked for."""
        if self.along is None:
            return None
        if name in self.seconds:
            return self.seconds[name]
        if self.along.curvatures is not None:
            return float(evidence.second_order(observable))
        if not bool(engine.fields(engine.cotangents(evidence.of(observable), self.along.scores)).any()):
            # a divergence: D²F = f″[ṡ, ṡ] + f′·s̈, and f′ = 0 at the anchor
            flat = self.along._replace(curvatures=engine.each(torch.zeros_like, self.along.scores))
            return float(evidence._replace(along=flat).second_order(observable))
        return None


def first_order(measurement: Measurement, params: Params, delta: Leaves, rounding: Leaves | None = None) -> FirstOrder:
    """Return the anchor's scores and the first order along the delta, in forward mode where the model allows.

    With `rounding` forward mode gives the tangents along it in the same pass: two more e in place of three.

    Raises:
        ForwardModeError: If the model has no forward derivative and forward mode, a path or order 2 was asked for.
    """
    options = measurement.options
    if options.mode != "reverse":
        try:
            found = _forward(measurement, params, delta, rounding)
        except ForwardModeError as error:
            if options.degree == 2 or options.method == "path":
                wanted = "order=2" if options.degree == 2 else "method='path'"
                raise error.but(f"{error.hint}, and leave out {wanted}, which needs one") from error
            if options.mode == "forward":
                raise
            measurement.messages.note("reverse mode", f"reverse mode was used: {error}")
        else:
            measurement.messages.about_the_copy(measurement.passes.policy.checks)
            return found
    found = _reverse(measurement, params)
    measurement.messages.about_the_copy(measurement.passes.policy.checks)
    return found


def first_orders(measurement: Measurement, params: Params, deltas: Sequence[Leaves]) -> list[FirstOrder]:
    """Return the first order along each of several deltas: one forward pass with a tangent each, or one ∇F for all.

    Raises:
        ForwardModeError: As `first_order`.
    """
    options = measurement.options
    if len(deltas) > 1 and options.degree == 1 and options.mode != "reverse":
        passes, choices = _watching(measurement)
        try:
            several = passes.directional_of_many(params, deltas, f"E, forward mode along {len(deltas)} steps")
        except ForwardModeError:
            pass  # what it means is decided where a single delta meets it
        else:
            found_of = engine.arithmetic(measurement.passes.policy, params)
            measurement.messages.notes += _kernels(found_of)
            measurement.messages.about_the_copy(measurement.passes.policy.checks)
            return [FirstOrder(along.scores, along, {}, found_of.eps, choices=choices) for along in several]
    found: list[FirstOrder] = []
    for delta in deltas:
        # ∇F does not know along which delta it will be asked
        shared = found and found[0].along is None
        found.append(found[0] if shared else first_order(measurement, params, delta))
    return found


def _forward(measurement: Measurement, params: Params, delta: Leaves, rounding: Leaves | None = None) -> FirstOrder:
    (passes, choices), seconds = _watching(measurement), {}
    arithmetic = engine.arithmetic(measurement.passes.policy, params)
    beside = None
    if measurement.options.degree == 1:
        along, beside = _along(passes, params, delta, rounding)
    else:
        along, off = curved(passes, params, delta, arithmetic.eps, "auto")
        if along.curvatures is None:
            measurement.messages.note(
                "forward over reverse",
                f"the second order was taken forward over reverse: nested forward mode was off by {off:.1e}",
            )
            seconds = {
                n: second_by_reverse(passes, params, delta, o, along) for n, o in measurement.observables.items()
            }
    measurement.messages.notes += _kernels(arithmetic)
    return FirstOrder(along.scores, along, {}, arithmetic.eps, seconds, choices, beside)


def _along(
    passes: Passes, params: Params, delta: Leaves, rounding: Leaves | None
) -> tuple[engine.Directional, engine.Directional | None]:
    """Return the tangents along the delta, and those along its rounding from the same pass, where vmap runs the model.

    Raises:
        RuntimeError: What a model raises of its own.
    """
    if rounding is not None:
        try:
            both = passes.directional_of_many(params, [delta, rounding], "E, forward mode, and rounding")
        except RuntimeError as error:
            if not without_batching_rule(error):
                raise
        else:
            return both[0], both[1]
    return passes.directional(params, delta, "E, forward mode"), None


def _kernels(arithmetic: engine.Arithmetic) -> list[Note]:
    """Say which kernels stood in for the policy's own."""
    attention = [_OWN_FORM] if arithmetic.fused_attention else []
    return attention + ([_ONE_BY_ONE] if arithmetic.grouped_experts else [])


def _reverse(measurement: Measurement, params: Params) -> FirstOrder:
    found: dict[str, engine.Gradient] = {}
    passes, choices = _watching(measurement)
    for name, observable in measurement.observables.items():

        def f(scores: TokenScores, rollouts: Rollouts, o: Observable = observable) -> tuple[Tensor, dict[str, Tensor]]:
            return o(scores, engine.detached(scores), rollouts), {}

        found[name] = passes.gradient(f, params, "E, reverse mode")
    scores = next(iter(found.values())).scores
    eps = engine.arithmetic(measurement.passes.policy, params).eps
    return FirstOrder(scores, None, {name: g.gradient for name, g in found.items()}, eps, choices=choices)


def _watching(measurement: Measurement) -> tuple[Passes, Choices]:
    choices = Choices(measurement.passes)
    return watched(measurement.passes, choices), choices
