"""`Validation`: the effect of dropping the tokens that a method of attribution ranks first, and redoing the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from funcprobe.attribution.trials import ENDS, Agreement, Chance, Drop, End
from funcprobe.errors import InputError, Note, percent
from funcprobe.results.blocks import Block, Column, Figure, Row, Sentence, Table
from funcprobe.results.frames import Tabular
from funcprobe.results.provenance import BatchCounts, Provenance
from funcprobe.results.result import Measured
from funcprobe.results.storage import Kind
from funcprobe.results.words import closing, counted, sizes_of
from funcprobe.types import Json


@dataclass(frozen=True)
class Validation(Tabular, Measured):
    """Re-steps without the tokens, or prompts, of U that each method ranks lowest or highest, on an E of their own."""

    kind: ClassVar[Kind] = "validation"

    observable: str  #: the name of F
    dropped: Literal["tokens", "prompts"]
    base: float  #: ΔF of the whole step on E
    drops: tuple[Drop, ...]  #: by method, end and share
    chance: tuple[Chance, ...]  #: by share
    agreements: dict[str, Agreement]  #: by method
    fit: BatchCounts  #: size of the rollouts that the rankings were made on
    subsets: int  #: random halves of the prompts that were stepped with
    provenance: Provenance  #: how the numbers were made
    notes: tuple[Note, ...] = ()  #: what was decided on the way
    warnings: tuple[Note, ...] = ()  #: to be known before the numbers are used

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the methods, in the order that was asked for."""
        return tuple(self.agreements)

    @property
    def shares(self) -> tuple[float, ...]:
        """The shares that were dropped."""
        return tuple(c.share for c in self.chance)

    def effect(self, method: str, end: End, share: float) -> float:
        """Return ΔF of the re-step minus ΔF of the whole step: above 0 where the dropped lowered F.

        Raises:
            InputError: If there is no such method, end or share.
        """
        for drop in self.drops:
            if (drop.method, drop.end, drop.share) == (method, end, share):
                return drop.effect
        raise InputError(
            f"There is no drop of share {share} at the {end} end of '{method}'; the methods are "
            f"{', '.join(self.methods)}, the shares {', '.join(f'{s:g}' for s in self.shares)}."
        )

    def rows(self) -> list[Json]:
        """Return the long form: a row for every method, end and share, with the random drops of the same share."""
        chance = {c.share: c for c in self.chance}
        return [
            {**drop._asdict(), "base": self.base, "random": chance[drop.share].mean, "sd": chance[drop.share].sd}
            for drop in self.drops
        ]

    def blocks(self) -> tuple[Block, ...]:
        """Return the blocks of a validation: effects by method and share at both ends, agreements, cautions."""
        base = f"Δ{self.observable} of the whole step is {self.base:+.3e} on rollouts that no ranking saw."
        return (
            Sentence(base, "strong"),
            *(self._effects(end) for end in ENDS),
            self._agreements(),
            *sizes_of(self.provenance),
            Sentence(f"Rankings: {counted(self.fit)}", "quiet"),
            *closing(self.provenance, self.notes, self.warnings),
            Figure("validation"),
        )

    def _effects(self, end: End) -> Table:
        headings = (Column(percent(s, 1), "right", "broken") for s in self.shares)
        rows = [Row((m, *(f"{self.effect(m, end, s):+.2e}" for s in self.shares))) for m in self.methods]
        random = Row(("random", *(f"{c.mean:+.2e} ± {c.sd:.1e}" for c in self.chance)), "quiet")
        caption = f"Change of Δ{self.observable} without the share of {self.dropped} ranked {end} (random: ± one draw):"
        return Table((Column("method", narrow="broken"), *headings), (*rows, random), caption)

    def _agreements(self) -> Table:
        columns = (Column("method", narrow="broken"), Column("one prompt left out, R", "right", "broken"))
        last = Column(f"{self.subsets} halves of the prompts, rank correlation", "right", "broken")
        rows = tuple(Row((m, f"{a.left_out:+.3f}", f"{a.datamodel:+.3f}")) for m, a in self.agreements.items())
        return Table((*columns, last), rows, "Sums of scores against re-steps:")
