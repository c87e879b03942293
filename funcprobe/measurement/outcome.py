"""`Outcome`: the effect of one update on observables; every result is made of one or of several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from funcprobe.errors import Note
from funcprobe.estimators.importance import WeightHealth
from funcprobe.estimators.uncertainty import Bar
from funcprobe.measurement.readings import Reading, Sampled
from funcprobe.measurement.routing import Routing


@dataclass(frozen=True)
class Outcome:
    """The effect of one update on observables on held-out rollouts, measured and predicted."""

    readings: Mapping[str, Reading]  #: by the name of the observable; the first one is the main one
    exchange: Mapping[str, Bar]  #: "a per b": ΔF of the main observable per ΔF of another
    health: WeightHealth  #: effective sample sizes and Pareto k̂
    lr: float | None  #: the learning rate of the update; None for one that was given as Δθ
    delta_norm: float  #: ‖Δθ‖₂, accumulated in float64
    rounding_ratio: float  #: ‖(θ′ − θ) − Δθ‖₂ / ‖Δθ‖₂
    unmoved: float  #: fraction of entries that Δθ would move and the storage dtype does not
    rounding: float | None  #: ⟨∇F, (θ′ − θ) − Δθ⟩ of the main observable; None where negligible, or not computed
    info: Mapping[str, float]  #: loss, grad_norm, clip_coefficient and what the objective reported
    routing: Routing | None = None  #: tokens that change experts on the way; None for a model that has none
    #: replicates over prompts, where there are error bars
    sampled: Sampled | None = field(default=None, repr=False, compare=False)
    warnings: tuple[Note, ...] = ()  #: what should be known before the numbers are used
    notes: tuple[Note, ...] = ()  #: what was decided on the way

    @property
    def main(self) -> Reading:
        """The reading of the main observable."""
        return next(iter(self.readings.values()))
