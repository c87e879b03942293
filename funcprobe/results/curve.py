"""`Curve`: one update at many learning rates; the measured change at each, and the laws that it follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from funcprobe.errors import InputError
from funcprobe.estimators.uncertainty import Bar, bar
from funcprobe.measurement.outcome import Outcome
from funcprobe.measurement.readings import Reading, Sampled, is_lost
from funcprobe.results.provenance import Provenance
from funcprobe.types import Json


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
class Curve:
    """How observables move with the learning rate of one update."""

    points: tuple[Outcome, ...]  #: by rising learning rate
    provenance: Provenance  #: how the numbers were made

    @property
    def lrs(self) -> tuple[float, ...]:
        """The learning rates, rising."""
        return tuple(lr_of(point) for point in self.points)

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
        return None if at is None else at * self.lrs[0]

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

        A remainder whose float error is known, and above a tenth of it or of ΔF, takes no part.

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
            lr_of(q) / lr_of(p),
            _ratio(q.delta_norm, p.delta_norm),
            _ratio(s.first_order, r.first_order),
            _ratio(s.change, r.change),
        )

    def rows(self) -> list[Json]:
        """Return the long form: a row for every learning rate, observable and quantity, with its error bar."""
        return rows_of(self.points)

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
            used = [i for i in used if not is_lost(values[i], readings[i].float_error)]
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


def lr_of(point: Outcome) -> float:
    """Return the learning rate of a point, which every point of a curve has."""
    assert point.lr is not None
    return point.lr


def _line(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return (slope, R²) of the least-squares line through (x, y)."""
    x, y = x - x.mean(), y - y.mean()
    slope = (x * y).sum() / (x * x).sum()
    return slope, 1 - ((y - slope * x) ** 2).sum() / (y * y).sum()


def rows_of(points: Sequence[Outcome]) -> list[Json]:
    """Return a row for every outcome, observable and quantity, with its error bar; NaN where it has none."""
    return [
        {"lr": point.lr, "observable": name, "quantity": what, "value": value, "unit": unit, **errors}
        for point in points
        for name, reading in point.readings.items()
        for what, value, unit, errors in _quantities(reading)
    ]


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
