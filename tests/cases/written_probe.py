"""A result written by hand: the report sees values, never a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from funcprobe.errors import Note
from funcprobe.estimators.importance import WeightHealth
from funcprobe.estimators.observables import entropy_family
from funcprobe.measurement.outcome import Outcome
from funcprobe.measurement.readings import Reading
from funcprobe.results.probe import ProbeResult
from funcprobe.results.provenance import BatchCounts, Provenance
from funcprobe.types import Estimate


def family(scale: float = 1.0) -> dict[str, Estimate]:
    """Eight estimates, each with its own change; per sequence about five times as large as per token."""
    found = {}
    for number, member in enumerate(entropy_family()):
        size = 5.0 if member.per == "sequence" else 1.0
        change = -scale * size * (1.0 + number / 10) * 1e-3
        found[member.name] = Estimate(1.5 * size, 1.5 * size + change, change, change * (0.97 + number / 100))
    return found


def outcome(members: Mapping[str, Estimate] | None = None, **changes: Any) -> Outcome:
    """Return an outcome whose main observable is the default member of the family, with some fields changed."""
    name = "rao_blackwell/per_decision/token"
    member = (members or family())[name]
    assert member.first_order is not None
    reading = Reading(name, "nats per token", member.before, member.change, member.first_order)
    own = {field: changes.pop(field) for field in tuple(changes) if field in Reading._fields}
    values: dict[str, Any] = {
        "readings": {name: reading._replace(**own)},
        "exchange": {},
        "health": WeightHealth(250.0, 251.0, 253.0, 249.0, 100.0, 200.0, 256.0, 0.31, 1.2, 0.4, 0.0, 0.1),
        "lr": 2e-6,
        "delta_norm": 0.0123,
        "rounding_ratio": 1e-5,
        "unmoved": 0.25,
        "rounding": None,
        "info": {"loss": 0.5},
    }
    return Outcome(**{**values, **changes})


def provenance(**changes: Any) -> Provenance:
    """Return a provenance, with some fields changed."""
    values: dict[str, Any] = {
        "evaluation": BatchCounts(256, 5000, 32),
        "batch": BatchCounts(128, 2500, 16),
        "mode": "forward",
        "environment": {"dtype": "float32", "device": "cpu", "parameters": 12345},
        "timings": {"gradient on U": 2.0, "E at θ′": 1.5},
    }
    return Provenance(**{**values, **changes})


def result(**changes: Any) -> ProbeResult:
    """Return a result with some fields changed, of whichever of its parts they are."""
    made = {f: changes.pop(f) for f in tuple(changes) if f in Provenance.__dataclass_fields__}
    own = {f: changes.pop(f) for f in tuple(changes) if f in ProbeResult.__dataclass_fields__}
    values: dict[str, Any] = {
        "outcome": outcome(own.get("family"), **changes),
        "provenance": provenance(**made),
        "top": (("model.layers.0.mlp.up_proj.weight", 0.01), ("model.norm.weight", 0.001)),
        "family": family(),
    }
    return ProbeResult(**{**values, **own})


def warned(*texts: str, kind: str = "test") -> tuple[Note, ...]:
    """Return texts as warnings or notes."""
    return tuple(Note(kind, text) for text in texts)
