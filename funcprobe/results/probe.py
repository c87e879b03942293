"""`ProbeResult`: what one probe found, frozen; it can be read, printed, saved and loaded."""

from __future__ import annotations

import dataclasses
import html
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from funcprobe.data.atomic import fresh_directory, write_arrays
from funcprobe.errors import InputError
from funcprobe.estimators.importance import WeightHealth
from funcprobe.estimators.uncertainty import Bar
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.readings import Reading, bar_from_dict
from funcprobe.measurement.routing import Routing
from funcprobe.results.probe_words import rows_of, summary_of
from funcprobe.types import Estimate, Json, Params

#: Raised when a field changes its meaning.
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class ProbeResult:
    """How far one step moved observables on held-out rollouts, measured and predicted.

    `change` is measured by importance sampling; `first_order = ⟨∇F, Δθ⟩`; `remainder = change − first_order` holds
    everything beyond first order, the sampling noise that both share having cancelled; `rounding = ⟨∇F, (θ′ − θ) −
    Δθ⟩` is what storing θ′ in its dtype adds: part of a change measured by difference, and not of one by path.
    """

    outcome: Outcome  #: what the update did to each observable, and how healthy the weights are
    provenance: Provenance  #: how the numbers were made
    top: tuple[tuple[str, float], ...] = ()  #: leaves of largest ‖Δθ‖₂, with it
    family: dict[str, Estimate] = field(default_factory=dict)  #: every member of the entropy family on the same scores
    delta: Params | None = field(default=None, compare=False)  #: Δθ on request: name-keyed, CPU, float32
    evidence: Evidence | None = field(default=None, compare=False, repr=False)  #: scores on request; not saved

    @property
    def readings(self) -> Mapping[str, Reading]:
        """What the update did to each observable; the first one is the main one."""
        return self.outcome.readings

    @property
    def exchange(self) -> Mapping[str, Bar]:
        """ΔF of the main observable per ΔF of another, by "a per b"."""
        return self.outcome.exchange

    @property
    def health(self) -> WeightHealth:
        """Effective sample sizes and Pareto k̂."""
        return self.outcome.health

    @property
    def lr(self) -> float | None:
        """The learning rate that was used; None for an update that was given as Δθ."""
        return self.outcome.lr

    @property
    def warnings(self) -> tuple[Note, ...]:
        """What should be known before the numbers are used."""
        return self.outcome.warnings

    @property
    def notes(self) -> tuple[Note, ...]:
        """What was decided on the way."""
        return self.outcome.notes

    @property
    def main(self) -> Reading:
        """The reading of the first observable."""
        return next(iter(self.readings.values()))

    @property
    def observable(self) -> str:
        """Name of the main observable."""
        return self.main.observable

    @property
    def unit(self) -> str:
        """Its unit, "nats per token" by default."""
        return self.main.unit

    @property
    def before(self) -> float:
        """F(θ)."""
        return self.main.before

    @property
    def after(self) -> float:
        """F(θ′)."""
        return self.main.after

    @property
    def change(self) -> float:
        """ΔF, measured."""
        return self.main.change

    @property
    def first_order(self) -> float:
        """δF₁, predicted."""
        return self.main.first_order

    @property
    def remainder(self) -> float:
        """ΔF − δF₁."""
        return self.main.remainder

    @property
    def second_order(self) -> float | None:
        """δF₂ = ½ D²F[Δθ, Δθ], with `order=2`."""
        return self.main.second_order

    @property
    def nonlinearity(self) -> float:
        """|ΔF − δF₁| / |ΔF|: how much of the measured change first order misses; infinite where nothing changed."""
        return self.main.nonlinearity

    @property
    def crossover_lr(self) -> float | None:
        """The learning rate at which |δF₂| = |δF₁|, with `order=2`; steps of one gradient are linear in it."""
        return None if self.main.crossover is None else self.lr * self.main.crossover

    @property
    def linear_until_lr(self) -> float | None:
        """The learning rate up to which first order is within 5 %, a twentieth of the crossover; with `order=2`."""
        return None if self.crossover_lr is None else self.crossover_lr / 20

    def summary(self) -> str:
        """Return a text that reads in ten seconds: the change, the prediction, and how far to trust them."""
        return summary_of(self)

    def to_dict(self) -> Json:
        """Return everything but Δθ as JSON-safe values, with `schema_version`."""
        plain: dict[str, Any] = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("update", "family", "evidence")
        }
        plain["readings"] = {name: reading.to_dict() for name, reading in self.readings.items()}
        plain["exchange"] = {name: found._asdict() for name, found in self.exchange.items()}
        plain["family"] = {name: estimate._asdict() for name, estimate in self.family.items()}
        plain["health"] = self.health._asdict()
        plain["routing"] = None if self.routing is None else self.routing._asdict()
        plain["evaluation"], plain["update_batch"] = self.evaluation._asdict(), self.update_batch._asdict()
        return {"schema_version": SCHEMA_VERSION, **json_safe(plain)}

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the folder `path`, whole or not at all: `result.json`, and `update.safetensors` where Δθ was kept.

        Raises:
            InputError: If the folder exists and `overwrite` is false.
        """
        with fresh_directory(path, overwrite=overwrite) as folder:
            self.write_into(folder)
        return Path(path)

    def write_into(self, folder: Path) -> None:
        """Write the result's files into an existing folder."""
        (folder / "result.json").write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")
        if self.delta is not None:
            write_arrays(self.delta, folder / "update.safetensors")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ProbeResult:
        """Read what `save` wrote.

        Raises:
            InputError: If there is no result at `path`, or it has another schema version.
        """
        return _load(cls, Path(path))

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td>{html.escape(name)}</td><td style='text-align:right'><code>{html.escape(value)}</code></td></tr>"
            for name, value in rows_of(self)
        )
        said = "".join(f"<p><b>Warning.</b> {html.escape(w)}</p>" for w in self.warnings)
        return (
            f"<table><caption>{html.escape(self.observable)}, {html.escape(self.unit)}</caption>{cells}</table>{said}"
        )


def _load(cls: type[ProbeResult], folder: Path) -> ProbeResult:
    file = folder / "result.json"
    if not file.is_file():
        raise InputError(f"{folder} holds no result.json; expected a folder that ProbeResult.save or a run wrote.")
    try:
        plain = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file} is not JSON ({error}); the file is damaged.") from error
    version = plain.pop("schema_version", None) if isinstance(plain, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(f"{file} has schema version {version}; this funcprobe reads {SCHEMA_VERSION}.")
    names = {f.name for f in dataclasses.fields(cls)} - {"update", "evidence"}
    plain.setdefault("routing", None)  # results had none before mixtures of experts were watched
    plain.setdefault("checks", [])  # nor did they tell of the copy
    if plain.keys() != names:
        raise InputError(f"{file} has other fields than a result: {sorted(plain.keys() ^ names)}; the file is damaged.")
    try:
        plain["readings"] = {name: Reading.from_dict(reading) for name, reading in plain["readings"].items()}
        plain["exchange"] = {name: bar_from_dict(found) for name, found in plain["exchange"].items()}
        plain["family"] = {name: Estimate(**estimate) for name, estimate in plain["family"].items()}
        plain["health"] = WeightHealth(**plain["health"])
        plain["evaluation"], plain["update_batch"] = (
            BatchCounts(**plain["evaluation"]),
            BatchCounts(**plain["update_batch"]),
        )
        plain["routing"] = None if plain["routing"] is None else Routing(**plain["routing"])
        plain["top"] = tuple((name, norm) for name, norm in plain["top"])
        for name in ("warnings", "notes", "checks"):
            plain[name] = tuple(plain[name])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file} is not a whole result ({error}); the file is damaged.") from error
    kept = folder / "update.safetensors"
    return cls(**plain, update=load_file(kept) if kept.is_file() else None)


def json_safe(value: Any) -> Any:
    """Return plain JSON: tuples become lists, and numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(k): json_safe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(v) for v in value]
    if isinstance(value, float) and value - value != 0.0:
        return None
    return value
