"""`Window`: one line of a run's ledger, from one generation of rollouts to a later one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from funcprobe.attribution.parameter_parts import LeafPart
from funcprobe.errors import Note
from funcprobe.estimators.importance import WeightHealth
from funcprobe.measurement.readings import Reading
from funcprobe.results.provenance import BatchCounts


class MovedToken(NamedTuple):
    """One token of U and its contribution to δF₁."""

    step: int  #: optimizer step that it took part in
    sequence: int  #: row of U
    prompt: int  #: group id
    position: int  #: among the completion's tokens
    token: int  #: id
    text: str  #: as the tokenizer decodes it; the id where there is none
    contribution: float
    advantage: float | None


class MovedPrompt(NamedTuple):
    """The rollouts of one prompt in U and their contribution to δF₁."""

    step: int
    prompt: int  #: group id
    sequences: int
    tokens: int
    contribution: float
    text: str


@dataclass(frozen=True)
class Opened:
    """The gradient part of one step's δF₁, opened down to the prompts and tokens of its batch U."""

    step: int
    whole: float  #: Σ over tokens of U
    given: float  #: ⟨∇F, scale ⊙ g⟩ of the gradient that the trainer really used: the same, where the objective is its
    off: float  #: ‖g of the objective − g used‖ / ‖g used‖
    clipped: float | None  #: share of U's tokens whose ratio is clipped; None where the objective does not say
    tokens: tuple[MovedToken, ...]  #: the largest, either way
    prompts: tuple[MovedPrompt, ...]


@dataclass(frozen=True)
class Window:
    """The effect of the optimizer steps between two generations of rollouts, looked back at from the second.

    Numbers are in the observables' units and signed forward: ΔF = F(after the steps) − F(before them).
    """

    number: int
    first: int  #: the first optimizer step in it
    last: int  #: the last one
    generations: int  #: batches of rollouts that its steps were taken on
    readings: Mapping[str, Reading]  #: by the name of the observable; the first is the one that is split
    split: Mapping[str, float]  #: parts of the first one's δF₁, which they sum to
    layers: Mapping[str, LeafPart]  #: the same by layer
    health: WeightHealth
    lr: float | None  #: of the last step
    delta_norm: float  #: ‖Δθ‖₂ of the whole window
    grad_norm: float | None  #: of the last step's gradient, as it reached the optimizer
    mismatch: float  #: worst ‖θ′ − our θ′‖/‖Δθ‖ of the leaves checked, beyond rounding: 0 where the steps are ours
    sampler_gap: float | None  #: mean |Δ log p| between the sampler and the anchor on E, nats per token
    evaluation: BatchCounts  #: size of E
    seconds: float  #: spent on this window by the ledger
    opened: tuple[Opened, ...] = ()
    trainer: Mapping[str, float] = field(default_factory=dict)  #: what the trainer logged of its steps
    warnings: tuple[Note, ...] = ()

    @property
    def main(self) -> Reading:
        """The reading of the first observable."""
        return next(iter(self.readings.values()))

    @property
    def error(self) -> float:
        """The standard error of the first observable's ΔF; NaN where there is none."""
        bar = self.main.bars.get("change")
        return math.nan if bar is None else bar.error

    @property
    def remainder(self) -> float:
        """The first observable's ΔF less the rows of its split: by how much the steps are not linear."""
        return self.main.change - math.fsum(self.split.values())

    @property
    def completeness(self) -> float:
        """How far the rows are from δF₁, relative to their size: rounding of two ways to one number."""
        size = math.fsum(map(abs, self.split.values()))
        return abs(math.fsum(self.split.values()) - self.main.first_order) / size if size else 0.0


@dataclass(frozen=True)
class Lost:
    """Steps of which nothing is known, and why."""

    first: int
    last: int
    reason: str


@dataclass(frozen=True)
class Mark:
    """The values of the observables at one moment, on rollouts drawn for nothing else."""

    step: int  #: optimizer steps taken before it
    values: Mapping[str, float]
    errors: Mapping[str, float]  #: standard errors over prompts; NaN where there are none
    evaluation: BatchCounts
