"""From scores to numbers: the effect of one step on each observable, with its error bar and its method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe.engine.kernels import without_batching_rule
from funcprobe.errors import InputError, NumericsError
from funcprobe.estimators.importance import WeightHealth
from funcprobe.estimators.uncertainty import Bar, Quantities, Replicates, bar, promise_broken, replicates
from funcprobe.measurement.cautions import ess_fraction
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.measurement import Measurement
from funcprobe.measurement.options import BarMethod
from funcprobe.types import Observable, Rollouts

#: A number is lost where its float error is above this fraction of it.
LOST = 0.1

#: Why an observable whose replicates do not vary has no bar.
WEIGHTLESS = "the observable does not use rollouts.weight, so it has no error bar"


class Reading(NamedTuple):
    """The effect of one step on one observable."""

    observable: str  #: its name
    unit: str
    before: float  #: F(θ)
    change: float  #: ΔF, measured; NaN where it was not
    first_order: float  #: δF₁, predicted
    second_order: float | None = None  #: δF₂ = ½ D²F[Δθ, Δθ], where it was asked for
    method: str = "difference"  #: "difference" of two evaluations, "path" integral, "values" on a curve, or "none"
    nodes: int = 0  #: of the path
    float_error: float | None = None  #: arithmetic error of the change, not sampling error; None if not estimated
    subtraction: float | None = None  #: F(θ′) − F(θ) by two evaluations at the stored θ′, where they were made
    bars: Mapping[str, Bar] = {}
    caveats: tuple[str, ...] = ()  #: why the bars are optimistic
    exact: float | None = None  #: ΔF of θ + Δθ, where rounding of θ′ sets the two apart by over 1 % of Δθ
    stored: float | None = None  #: ΔF of θ′ as stored, likewise; the change is one of them
    of_delta: bool = False  #: whether the change is that of θ + Δθ, and not that of θ′ as stored

    @property
    def is_measured(self) -> bool:
        """Whether ΔF was measured, and not only predicted."""
        return self.method != "none"

    @property
    def after(self) -> float:
        """F(θ′)."""
        return self.before + self.change

    @property
    def remainder(self) -> float:
        """ΔF − δF₁."""
        return self.change - self.first_order

    @property
    def ratio(self) -> float:
        """δF₁/ΔF."""
        return self.first_order / self.change if self.change else math.nan

    @property
    def is_lost(self) -> bool:
        """Whether the change is known to be mostly float error: nothing follows from it."""
        return not self.change == self.first_order == 0.0 and is_lost(self.change, self.float_error)

    @property
    def nonlinearity(self) -> float:
        """|ΔF − δF₁| / |ΔF|: how much of the measured change first order misses.

        Infinite where nothing changed, and NaN where ΔF is lost in float error.
        """
        if self.is_lost:
            return math.nan
        return abs(self.remainder) / abs(self.change) if self.change else math.inf if self.remainder else 0.0

    @property
    def crossover(self) -> float | None:
        """The multiple of this step at which |δF₂| = |δF₁|; None without a second order, or where nothing moves."""
        if self.second_order is None or (self.first_order == 0.0 and self.second_order == 0.0):
            return None
        return abs(self.first_order / self.second_order) if self.second_order else math.inf


def is_lost(value: float, error: float | None) -> bool:
    """Return whether the float error of a number is known, and above a tenth of it.

    Example:
        >>> is_lost(1e-6, 2e-7), is_lost(1e-6, 5e-8), is_lost(1e-6, None)
        (True, False, False)
    """
    return error is not None and error > LOST * abs(value)


class Sampled(NamedTuple):
    """Replicates over prompts of all that was read: columns of three an observable (ΔF, δF₁, δF₂)."""

    replicates: Replicates
    columns: Mapping[str, int]  #: name of the observable -> its first column

    @property
    def width(self) -> int:
        """The number of columns of one step."""
        return len(self.replicates.estimate)

    @classmethod
    def join(cls, several: Sequence[Sampled]) -> Replicates:
        """Return the columns of several steps on the same rollouts, side by side."""
        parts = [sampled.replicates for sampled in several]
        estimate = torch.cat([part.estimate for part in parts])
        return parts[0]._replace(estimate=estimate, values=torch.cat([part.values for part in parts], dim=1))

    def bar(self, name: str, what: str, level: float) -> Bar:
        """Return the bar of "change", "first_order", "second_order", "remainder" or "ratio" of an observable."""
        k = self.columns[name]
        functions = {
            "change": lambda q: q[k],
            "first_order": lambda q: q[k + 1],
            "second_order": lambda q: q[k + 2],
            "remainder": lambda q: q[k] - q[k + 1],
            "ratio": lambda q: q[k + 1] / q[k],
        }
        return bar(self.replicates, functions[what], level)

    def exchange(self, cost: str, gain: str, level: float) -> Bar:
        """Return the bar of ΔF(cost) / ΔF(gain)."""
        i, j = self.columns[cost], self.columns[gain]
        return bar(self.replicates, lambda q: q[i] / q[j], level)


def sample(
    evidence: Evidence,
    observables: Mapping[str, Observable],
    method: BarMethod,
    generator: torch.Generator | None = None,
    orders: Replicates | None = None,
) -> Sampled:
    """Return ΔF, δF₁ and δF₂ of every observable, resampled over the prompts of E; no model is run.

    δF₁ is 0 in reverse mode and δF₂ where no curvature was taken: those columns carry no bar. `orders` are the columns
    of `sample_orders`, where they are known.

    Raises:
        InputError: If E has fewer than two prompts, or an observable cannot be resampled.
        NumericsError: If something is not finite without one of the prompts; the message names both.
        RuntimeError: What an observable raises of its own.
    """

    def quantities(a: Tensor) -> Tensor:
        return torch.stack([evidence.change(o, a) for o in observables.values()])

    orders = sample_orders(evidence, observables, method, generator_like(generator)) if orders is None else orders
    labels = [f"The change of '{name}'" for name in observables]
    changes = resampled(quantities, evidence.rollouts, method, labels, _cells(evidence, observables), generator)
    columns = {name: 3 * k for k, name in enumerate(observables)}
    estimate, values = (
        torch.cat([x.unsqueeze(-1), y.unflatten(-1, (-1, 2))], dim=-1).flatten(-2)
        for x, y in ((changes.estimate, orders.estimate), (changes.values, orders.values))
    )
    return Sampled(changes._replace(estimate=estimate, values=values), columns)


def sample_orders(
    evidence: Evidence,
    observables: Mapping[str, Observable],
    method: BarMethod,
    generator: torch.Generator | None = None,
) -> Replicates:
    """Return δF₁ and δF₂ of every observable, two columns each, resampled over the prompts of E; no model is run.

    Raises:
        InputError: If E has fewer than two prompts, or an observable cannot be resampled.
        NumericsError: If something is not finite without one of the prompts; the message names both.
        RuntimeError: What an observable raises of its own.
    """
    second = evidence.along is not None and evidence.along.curvatures is not None

    def quantities(a: Tensor) -> Tensor:
        zero, found = a.sum() * 0.0, list[Tensor]()
        for o in observables.values():
            if second:
                found += evidence.orders(o, a)
            else:
                found += [zero if evidence.along is None else evidence.first_order(o, a), zero]
        return torch.stack(found)

    labels = [f"The {what} of '{name}'" for name in observables for what in ("first order", "second order")]
    return resampled(quantities, evidence.rollouts, method, labels, _cells(evidence, observables), generator)


def scaled_orders(orders: Replicates, c: float) -> Replicates:
    """Return δF₁ and δF₂ of c times the step: the first goes with c, the second with its square."""
    factors = torch.tensor([c, c * c], dtype=torch.float64).repeat(len(orders.estimate) // 2)
    return orders._replace(estimate=orders.estimate * factors, values=orders.values * factors)


def generator_like(generator: torch.Generator | None) -> torch.Generator | None:
    """Return a generator in the same state, so that two functions are resampled alike."""
    return None if generator is None else generator.clone_state()


def _cells(evidence: Evidence, observables: Mapping[str, Observable]) -> int:
    """Return how many score entries ΔF, δF₁ and δF₂ touch, by which a method is chosen for all of them."""
    second = evidence.along is not None and evidence.along.curvatures is not None
    return evidence.rollouts.completion_mask.numel() * (2 + 2 * second) * len(observables)


def resampled(
    quantities: Quantities,
    rollouts: Rollouts,
    method: BarMethod,
    labels: Sequence[str],
    cells: int,
    generator: torch.Generator | None = None,
) -> Replicates:
    """Return replicates over prompts of some quantities, which errors call by their labels.

    Raises:
        InputError: If E has fewer than two prompts, or an observable cannot be resampled.
        NumericsError: If something is not finite without one of the prompts; the message names both.
        RuntimeError: What an observable raises of its own.
    """
    try:
        return replicates(quantities, rollouts, method, generator=generator, cells=cells)
    except NumericsError as error:
        if not isinstance(error.quantity, int):
            raise
        raise NumericsError(
            f"{labels[error.quantity]} is {error.found} {error.expected}, so it has no error bar; check the scores, or "
            "what the quantity divides by."
        ) from None
    except RuntimeError as error:
        if not without_batching_rule(error):
            raise
        raise InputError(
            "An observable looks at the values of its weights (an if, or .item()), so it cannot be resampled; write it "
            "with torch.where, or ask for no bars."
        ) from error


def with_bars(
    measurement: Measurement,
    readings: Mapping[str, Reading],
    sampled: Sampled,
    evidence: Evidence,
    healths: Mapping[str, WeightHealth],
) -> dict[str, Reading]:
    """Return the readings with their bars, and with the reasons why these are optimistic."""
    names = ["change"]
    if evidence.along is not None:
        names += ["first_order", "remainder", "ratio"]
        names += ["second_order"] if evidence.along.curvatures is not None else []
    done = {}
    for name, reading in readings.items():
        bars = {what: sampled.bar(name, what, measurement.options.level) for what in names}
        fraction = ess_fraction(healths[name], measurement.observables[name])
        broken = promise_broken(sampled.replicates.prompts, fraction, measurement.independent)
        if reading.change == reading.first_order == 0.0:
            bars = {}
        elif bars["change"].error == 0.0 and reading.change != 0.0:
            bars, broken = {}, (WEIGHTLESS,)
        done[name] = reading._replace(bars=bars, caveats=broken)
    return done
