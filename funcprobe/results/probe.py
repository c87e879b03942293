"""`ProbeResult`: one update's outcome on held-out rollouts, and how it was come by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from funcprobe.errors import Note
from funcprobe.estimators.importance import WeightHealth
from funcprobe.estimators.uncertainty import Bar
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.outcome import Outcome
from funcprobe.measurement.readings import Reading
from funcprobe.measurement.routing import Routing
from funcprobe.results.blocks import Block
from funcprobe.results.codec import NOT_KEPT
from funcprobe.results.curve import rows_of
from funcprobe.results.datatree import evidence_group, outcome_groups, prompts_of, tree_of
from funcprobe.results.frames import Tabular
from funcprobe.results.probe_words import blocks_of
from funcprobe.results.provenance import Provenance
from funcprobe.results.result import Measured
from funcprobe.results.storage import Kind
from funcprobe.types import Estimate, Json, Params

if TYPE_CHECKING:
    from xarray import DataTree


@dataclass(frozen=True)
class ProbeResult(Tabular, Measured):
    """How far one step moved observables on held-out rollouts, measured and predicted.

    `change` is measured by importance sampling; `first_order = ⟨∇F, Δθ⟩`; `remainder = change − first_order` holds
    everything beyond first order, the sampling noise that both share having cancelled; `rounding = ⟨∇F, (θ′ − θ) −
    Δθ⟩` is what storing θ′ in its dtype adds: part of a change measured by difference, and not of one by path.
    """

    kind: ClassVar[Kind] = "probe"

    outcome: Outcome  #: what the update did to each observable, and how healthy the weights are
    provenance: Provenance  #: how the numbers were made
    top: tuple[tuple[str, float], ...] = ()  #: leaves of largest ‖Δθ‖₂, with it
    family: dict[str, Estimate] = field(default_factory=dict)  #: every member of the entropy family on the same scores
    delta: Params | None = field(default=None, compare=False)  #: Δθ on request: name-keyed, CPU, float32
    evidence: Evidence | None = field(default=None, compare=False, repr=False, metadata=NOT_KEPT)  #: scores on request

    @property
    def readings(self) -> Mapping[str, Reading]:
        """The effect of the update on each observable; the first one is the main one."""
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
    def delta_norm(self) -> float:
        """‖Δθ‖₂."""
        return self.outcome.delta_norm

    @property
    def rounding(self) -> float | None:
        """⟨∇F, (θ′ − θ) − Δθ⟩; None where negligible, or not computed."""
        return self.outcome.rounding

    @property
    def rounding_ratio(self) -> float:
        """‖(θ′ − θ) − Δθ‖₂ / ‖Δθ‖₂."""
        return self.outcome.rounding_ratio

    @property
    def unmoved(self) -> float:
        """Fraction of entries that Δθ would move and the storage dtype does not."""
        return self.outcome.unmoved

    @property
    def info(self) -> Mapping[str, float]:
        """Loss, grad_norm, clip_coefficient and the objective's own statistics."""
        return self.outcome.info

    @property
    def routing(self) -> Routing | None:
        """Tokens that change experts on the way; None for a model that has none."""
        return self.outcome.routing

    @property
    def warnings(self) -> tuple[Note, ...]:
        """The cautions to be known before the numbers are used."""
        return self.outcome.warnings

    @property
    def notes(self) -> tuple[Note, ...]:
        """The decisions that were made on the way."""
        return self.outcome.notes

    @property
    def main(self) -> Reading:
        """The reading of the first observable."""
        return self.outcome.main

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
        at = self.main.crossover
        return None if at is None or self.lr is None else self.lr * at

    @property
    def linear_until_lr(self) -> float | None:
        """The learning rate up to which first order is within 5 %, a twentieth of the crossover; with `order=2`."""
        return None if self.crossover_lr is None else self.crossover_lr / 20

    def rows(self) -> list[Json]:
        """Return the long form: a row for every observable and quantity, with its error bar."""
        return rows_of([self.outcome])

    def to_datatree(self) -> DataTree:
        """Return observables, replicates over prompts and kept scores as an `xarray.DataTree`.

        `results.datatree` lists its groups.

        Raises:
            MissingExtraError: If xarray is not installed.
        """
        groups = outcome_groups(
            [self.outcome], {}, None if self.evidence is None else prompts_of(self.evidence.rollouts)
        )
        if self.evidence is not None:
            groups["scores"] = evidence_group(self.evidence)
        return tree_of(groups, self.kind, self.provenance)

    def blocks(self) -> tuple[Block, ...]:
        """Return the blocks of a probe: the answer, the numbers, every estimator side by side, and cautions."""
        return blocks_of(self.outcome, self.provenance, self.family, self.top)
