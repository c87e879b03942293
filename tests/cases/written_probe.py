"""A result written by hand: the report sees values, never a model."""

from __future__ import annotations

from typing import Any

from funcprobe.estimators.importance import WeightHealth
from funcprobe.estimators.observables import entropy_family
from funcprobe.measurement.readings import Reading
from funcprobe.results.probe import BatchCounts, ProbeResult
from funcprobe.types import Estimate


def family(scale: float = 1.0) -> dict[str, Estimate]:
    """Eight estimates, each with its own change; per sequence about five times as large as per token."""
    found = {}
    for number, member in enumerate(entropy_family()):
        size = 5.0 if member.per == "sequence" else 1.0
        change = -scale * size * (1.0 + number / 10) * 1e-3
        found[member.name] = Estimate(1.5 * size, 1.5 * size + change, change, change * (0.97 + number / 100))
    return found


def result(**changes: Any) -> ProbeResult:
    """Return a result whose observable is the default member, with some fields changed."""
    members = changes.pop("family", family())
    name = "rao_blackwell/per_decision/token"
    member = members[name]
    assert member.first_order is not None
    reading = Reading(name, "nats per token", member.before, member.change, member.first_order)
    own = {field: changes.pop(field) for field in tuple(changes) if field in Reading._fields}
    main = reading._replace(**own)
    values: dict[str, Any] = {
        "readings": {name: main},
        "exchange": {},
        "mode": "forward",
        "rounding": None,
        "rounding_ratio": 1e-5,
        "delta_norm": 0.0123,
        "lr": 2e-6,
        "unmoved": 0.25,
        "top": (("model.layers.0.mlp.up_proj.weight", 0.01), ("model.norm.weight", 0.001)),
        "family": members,
        "health": WeightHealth(250.0, 251.0, 253.0, 249.0, 100.0, 200.0, 256.0, 0.31, 1.2, 0.4, 0.0, 0.1),
        "step": {"loss": 0.5},
        "evaluation": BatchCounts(256, 5000, 32),
        "update_batch": BatchCounts(128, 2500, 16),
        "warnings": (),
        "notes": (),
        "timings": {"gradient on U": 2.0, "E at θ′": 1.5},
        "environment": {"dtype": "float32", "device": "cpu", "parameters": 12345},
    }
    return ProbeResult(**{**values, **changes})
