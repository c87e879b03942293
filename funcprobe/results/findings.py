"""`Findings`: everything that was measured for a diagnosis, from which its answers are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from funcprobe.errors import InputError
from funcprobe.estimators.uncertainty import Bar
from funcprobe.measurement.drawn import Drawn, Ratios
from funcprobe.measurement.readings import Reading
from funcprobe.results.any_lr import CurveResult
from funcprobe.results.attribution import Attribution
from funcprobe.results.comparison import Comparison
from funcprobe.results.probe import ProbeResult
from funcprobe.results.provenance import Provenance


class LargestStep(NamedTuple):
    """The largest learning rate that keeps the bounds of a step that is not too large."""

    lr: float
    limited_by: str | None  #: what the next larger one breaks; None where even the end of the curve keeps them


class Answer(NamedTuple):
    """One question of a diagnosis with its answer."""

    question: str
    verdict: str  #: by the rules
    sentence: str  #: the numbers that it was read from, with their bars
    advice: str  #: one thing to try
    number: Bar | None = None  #: the number that the verdict turns on, where it has a bar


@dataclass(frozen=True)
class Findings:
    """Everything that was measured of an update; the rest is None, and `missing` says why."""

    attribution: Attribution | None  #: which parts of the step moved the observable
    alone: ProbeResult | None  #: the probe, where there is no attribution to hold it
    curve: CurveResult | None  #: the change at learning rates around the update's own
    largest: LargestStep | None  #: on that curve
    comparison: Comparison | None  #: the update beside its variants
    ess: float  #: effective sample of E at θ′, as a share, by the weights that the observable uses
    drawn: dict[str, Drawn]  #: how "E" and "U" were drawn, of those that are known
    ratios: Ratios | None  #: of U, where it has old log-probabilities
    missing: dict[str, str]  #: why there is no attribution, curve or comparison
    left_out: dict[str, str]  #: why a variant was not compared

    def __post_init__(self) -> None:
        """Check that there is a probe.

        Raises:
            InputError: If there is none.
        """
        if self.attribution is None and self.alone is None:
            raise InputError("A diagnosis holds a probe, alone or within an attribution, and this one has neither.")

    @property
    def probe(self) -> ProbeResult:
        """The update, measured and predicted."""
        found = self.alone if self.attribution is None else self.attribution.probe
        assert found is not None  # checked when it was made
        return found

    @property
    def main(self) -> Reading:
        """The reading of the main observable."""
        return self.probe.main

    @property
    def provenance(self) -> Provenance:
        """How the numbers were made: the probe's."""
        return self.probe.provenance
