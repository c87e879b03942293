"""`SweepResult`: one gradient, many learning rates; what was measured at each, and the laws that they follow."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from funcprobe.data.atomic import fresh_directory
from funcprobe.errors import InputError
from funcprobe.estimators.uncertainty import Bar, bar
from funcprobe.measurement.readings import Reading, Sampled, is_lost
from funcprobe.results.frames import frame_of
from funcprobe.results.probe import BatchCounts, json_safe
from funcprobe.types import Json

if TYPE_CHECKING:
    from pandas import DataFrame

#: Raised when a field changes its meaning.
SCHEMA_VERSION = 1


class Fit(NamedTuple):
    """A line through (log η, log |y|), by least squares."""

    slope: Bar  #: with its error over prompts; infinite where no replicates were kept
    r_squared: float
    points: int  #: that took part


class ScaleCheck(NamedTuple):
    """How much larger everything is at one learning rate than at another; in the linear regime all ratios are equal."""

    lr: float  #: ratio of the learning rates
    delta_norm: float  #: of ‖Δθ‖₂
    first_order: float  #: of δF₁
    change: float  #: of ΔF


@dataclass(frozen=True)
class SweepResult:
    """How observables move with the learning rate of one step, from one gradient on U and one derivative on E."""

    points: tuple[Outcome, ...]  #: by rising learning rate
    mode: str  #: how the first order was taken: "forward" or "reverse"
    evaluation: BatchCounts
    update_batch: BatchCounts
    step: dict[str, float]  #: loss, grad_norm and what the objective reported
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    timings: dict[str, float]  #: seconds by phase, of this call
    environment: Json

    @property
    def lrs(self) -> tuple[float, ...]:
        """The learning rates, rising."""
        return tuple(point.lr for point in self.points)

    @property
    def observables(self) -> tuple[str, ...]:
        """The names of the observables, the main one first."""
        return tuple(self.points[0].readings)

    def readings(self, name: str | None = None) -> list[Reading]:
        """Return the readings of one observable, by default the main one, at every learning rate.

        Raises:
            InputError: If there is no such observable.
        """
        name = self.observables[0] if name is None else name
        if name not in self.observables:
            raise InputError(f"The sweep has no observable '{name}'; it has {', '.join(self.observables)}.")
        return [point.readings[name] for point in self.points]

    def crossover_lr(self, name: str | None = None) -> float | None:
        """Return the learning rate at which |δF₂| = |δF₁|; None without a second order.

        It is read off the smallest learning rate, for an optimizer that moves in proportion to it.

        Raises:
            InputError: If there is no such observable.
        """
        at = self.readings(name)[0].crossover
        return None if at is None else at * self.points[0].lr

    def linear_until_lr(self, name: str | None = None) -> float | None:
        """Return the learning rate up to which first order is within 5 %: a twentieth of the crossover.

        Raises:
            InputError: If there is no such observable.
        """
        at = self.crossover_lr(name)
        return None if at is None else at / 20

    def slope(self, name: str | None = None, *, up_to: float = math.inf) -> Fit:
        """Return the line through log |ΔF| against log η: slope 1 where the step is linear.

        A change that is lost in float error takes no part.

        Raises:
            InputError: If there is no such observable, or fewer than two learning rates up to `up_to` changed it.
        """
        return self._fit(name, "change", up_to)

    def remainder_slope(self, name: str | None = None, *, up_to: float = math.inf) -> Fit:
        """Return the line through log |ΔF − δF₁| against log η: slope 2 where the second order leads.

        A remainder whose float error is known, and above a tenth of it, takes no part.

        Raises:
            InputError: If there is no such observable, or fewer than two learning rates up to `up_to` left a remainder.
        """
        return self._fit(name, "remainder", up_to)

    def scale_check(self, low: float | None = None, high: float | None = None, name: str | None = None) -> ScaleCheck:
        """Return the ratios between two learning rates of the sweep, by default its smallest and largest.

        By default those at which ΔF is lost in float error are passed over, where there are others.

        Raises:
            InputError: If there is no such observable or learning rate.
        """
        known = [lr for lr, r in zip(self.lrs, self.readings(name), strict=True) if not r.is_lost] or self.lrs
        ends = [self._index(known[0] if low is None else low), self._index(known[-1] if high is None else high)]
        (p, q), (r, s) = [self.points[i] for i in ends], [self.readings(name)[i] for i in ends]
        return ScaleCheck(
            q.lr / p.lr,
            _ratio(q.delta_norm, p.delta_norm),
            _ratio(s.first_order, r.first_order),
            _ratio(s.change, r.change),
        )

    def rows(self) -> list[Json]:
        """Return the long form: a row for every learning rate, observable and quantity, with its error bar."""
        return [
            {"lr": point.lr, "observable": name, "quantity": what, "value": value, "unit": unit, **errors}
            for point in self.points
            for name, reading in point.readings.items()
            for what, value, unit, errors in _quantities(reading)
        ]

    def to_frame(self) -> DataFrame:
        """Return the long form as a pandas frame.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        return frame_of(self.rows())

    def summary(self) -> str:
        """Return a text: how the main observable goes with the learning rate, a line each, and what to know."""
        from funcprobe.results.sweep_words import summary_of

        return summary_of(self)

    def _repr_html_(self) -> str:
        from funcprobe.results.sweep_words import html_of

        return html_of(self)

    def to_dict(self) -> Json:
        """Return everything as JSON-safe values, with `schema_version`."""
        plain: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain["points"] = [point.to_dict() for point in self.points]
        plain["evaluation"], plain["update_batch"] = self.evaluation._asdict(), self.update_batch._asdict()
        return {"schema_version": SCHEMA_VERSION, **json_safe(plain)}

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the folder `path` with `sweep.json`, whole or not at all.

        Raises:
            InputError: If the folder exists and `overwrite` is false.
        """
        with fresh_directory(path, overwrite=overwrite) as folder:
            self.write_into(folder)
        return Path(path)

    def write_into(self, folder: Path) -> None:
        """Write the result's file into an existing folder."""
        (folder / "sweep.json").write_text(json.dumps(self.to_dict(), allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SweepResult:
        """Read what `save` wrote.

        Raises:
            InputError: If there is no sweep at `path`, it is damaged, or it has another schema version.
        """
        file = Path(path) / "sweep.json"
        if not file.is_file():
            raise InputError(f"{path} holds no sweep.json; expected a folder that SweepResult.save or a sweep wrote.")
        try:
            plain = json.loads(file.read_text())
            version = plain.pop("schema_version", None)
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{file} is not a whole sweep ({error}); the file is damaged.") from error
        if version != SCHEMA_VERSION:
            raise InputError(f"{file} has schema version {version}; this funcprobe reads {SCHEMA_VERSION}.")
        try:
            built = {
                "points": tuple(Outcome.from_dict(point) for point in plain["points"]),
                "evaluation": BatchCounts(**plain["evaluation"]),
                "update_batch": BatchCounts(**plain["update_batch"]),
                "warnings": tuple(plain["warnings"]),
                "notes": tuple(plain["notes"]),
            }
            return cls(**{**plain, **built})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file} is not a whole sweep ({error}); the file is damaged.") from error

    def _index(self, lr: float) -> int:
        near = [i for i, own in enumerate(self.lrs) if math.isclose(own, lr, rel_tol=1e-9)]
        if not near:
            raise InputError(f"The sweep has no learning rate {lr:g}; it has {', '.join(f'{x:g}' for x in self.lrs)}.")
        return near[0]

    def _fit(self, name: str | None, what: Literal["change", "remainder"], up_to: float) -> Fit:
        name = self.observables[0] if name is None else name
        readings = self.readings(name)
        values = [getattr(reading, what) for reading in readings]
        used = [i for i, value in enumerate(values) if self.lrs[i] <= up_to * (1 + 1e-9) and value != 0.0]
        used = [i for i in used if not readings[i].is_lost]
        if what == "remainder":  # at small learning rates there is always one that float error has eaten
            used = [i for i in used if not is_lost(values[i], readings[i].error)]
        if len(used) < 2:
            raise InputError(
                f"A slope needs two learning rates at which the {what} of '{name}' is known and not 0, and there are "
                f"{len(used)} up to {up_to:g}; sweep more of them."
            )
        x = torch.tensor([self.lrs[i] for i in used], dtype=torch.float64).log()
        y = torch.tensor([abs(values[i]) for i in used], dtype=torch.float64).log()
        slope, r_squared = _line(x, y)
        sampled = [s for i in used if (s := self.points[i].sampled) is not None and what in readings[i].bars]
        if len(sampled) < len(used):  # in reverse mode the derivative has no replicates, and so the remainder none
            return Fit(Bar(float(slope), math.inf, -math.inf, math.inf), float(r_squared), len(used))
        first, width = sampled[0].columns[name], sampled[0].width

        def slope_of(q: Tensor) -> Tensor:
            columns = [q[first + j * width : first + j * width + 2] for j in range(len(used))]
            each = [c[0] - c[1] if what == "remainder" else c[0] for c in columns]
            return _line(x, torch.stack(each).abs().log())[0]

        level = readings[used[0]].bars[what].level
        return Fit(bar(Sampled.join(sampled), slope_of, level), float(r_squared), len(used))


def _line(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return (slope, R²) of the least-squares line through (x, y)."""
    x, y = x - x.mean(), y - y.mean()
    slope = (x * y).sum() / (x * x).sum()
    return slope, 1 - ((y - slope * x) ** 2).sum() / (y * y).sum()


def _quantities(reading: Reading) -> list[tuple[str, float, str, Json]]:
    known = {
        "change": reading.change,
        "first_order": reading.first_order,
        "second_order": reading.second_order,
        "remainder": reading.remainder,
        "ratio": reading.ratio,
        "subtraction": reading.subtraction,
        "exact": reading.exact,
        "stored": reading.stored,
    }
    rows = []
    for what, value in known.items():
        found = reading.bars.get(what)
        errors = {"error": math.nan, "low": math.nan, "high": math.nan}
        if found is not None:
            errors = {"error": found.error, "low": found.low, "high": found.high}
        unit = "1" if what == "ratio" else reading.unit
        rows += [] if value is None else [(what, value, unit, errors)]
    return rows


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan
