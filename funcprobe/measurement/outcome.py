"""`Outcome`: what one update did to observables; every result is made of one or of several."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from funcprobe.errors import Note
from funcprobe.estimators.importance import WeightHealth
from funcprobe.estimators.uncertainty import Bar
from funcprobe.measurement.readings import Reading, Sampled, bar_from_dict
from funcprobe.measurement.routing import Routing
from funcprobe.types import Json


@dataclass(frozen=True)
class Outcome:
    """What one update did to observables on held-out rollouts, measured and predicted."""

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
    sampled: Sampled | None = field(default=None, repr=False)  #: replicates over prompts, where there are error bars
    warnings: tuple[Note, ...] = ()  #: what should be known before the numbers are used
    notes: tuple[Note, ...] = ()  #: what was decided on the way

    @property
    def main(self) -> Reading:
        """The reading of the main observable."""
        return next(iter(self.readings.values()))

    def to_dict(self) -> Json:
        """Return the fields as plain values."""
        plain: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain["readings"] = {name: reading.to_dict() for name, reading in self.readings.items()}
        plain["exchange"] = {name: found._asdict() for name, found in self.exchange.items()}
        plain["health"] = self.health._asdict()
        plain["sampled"] = None if self.sampled is None else self.sampled.to_dict()
        plain["routing"] = None if self.routing is None else self.routing._asdict()
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Outcome:
        """Return what `to_dict` was called on."""
        sampled, routing = plain["sampled"], plain["routing"]
        built = {
            "readings": {name: Reading.from_dict(reading) for name, reading in plain["readings"].items()},
            "exchange": {name: bar_from_dict(found) for name, found in plain["exchange"].items()},
            "health": WeightHealth(**plain["health"]),
            "sampled": None if sampled is None else Sampled.from_dict(sampled),
            "warnings": tuple(plain["warnings"]),
            "notes": tuple(plain["notes"]),
            "routing": None if routing is None else Routing(**routing),
        }
        return cls(**{**plain, **built})
