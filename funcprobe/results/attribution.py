"""`Attribution`: the parts of one update's δF₁, told, kept, and read as tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from funcprobe.attribution.token_tables import correlations, movers
from funcprobe.errors import InputError
from funcprobe.results.attribution_words import blocks_of
from funcprobe.results.blocks import Block
from funcprobe.results.frames import frame_of
from funcprobe.results.parts import Batch, Parts
from funcprobe.results.provenance import Provenance
from funcprobe.results.result import Result
from funcprobe.results.storage import Kind

if TYPE_CHECKING:
    from pandas import DataFrame

#: What contributions are correlated with, of tokens and of sequences.
_AGAINST = {
    "tokens": ("logp", "entropy", "advantage", "position", "cov_pg", "cov_npg", "discriminant"),
    "sequences": ("mean_logp", "mean_entropy", "advantage", "reward", "length", "cov_pg", "cov_npg", "discriminant"),
}


@dataclass(frozen=True)
class Attribution(Parts, Result):
    """Which parameters, prompts and tokens moved an observable in one update, in the observable's unit.

    Every table's contributions sum to δF₁, the probe's `first_order`, up to `completeness_error`: the leaves' do, the
    evaluation tokens' do, and so do the batch tokens' with momentum and weight decay (and "rest", in the Jacobian
    form), which is what `ledger` holds.
    """

    kind: ClassVar[Kind] = "attribution"

    @property
    def provenance(self) -> Provenance:
        """How the numbers were made: the probe's."""
        return self.probe.provenance

    def to_frame(self, table: str = "tokens", of: Batch = "batch") -> DataFrame:
        """Return a table as a pandas frame.

        "tokens", "sequences", "prompts" and "positions" are tables of a batch: U, or E with `of="evaluation"`.
        "parameters", "layers", "kinds", "modules" and "pairs" (LoRA factors of one module) are those of the parameters,
        "ledger" is the step in a few rows, and "influence" the matrix, a row for every evaluation sequence or prompt.
        Tables that `bars_of` named have the standard error of every contribution, and the ends of its interval.

        Raises:
            InputError: If there is no such table or batch, or it was not asked for.
            MissingExtraError: If pandas is not installed.
        """
        return frame_of(self.columns(table, of))

    def movers(self, count: int = 10, table: str = "tokens", of: Batch = "batch") -> tuple[DataFrame, DataFrame]:
        """Return the rows of a table that raise the observable most, and those that lower it most.

        Raises:
            InputError: If there is no such table or batch, its rows have no contribution, or count is below 0.
            MissingExtraError: If pandas is not installed.
        """
        columns = self.columns(table, of)
        if "contribution" not in columns:
            raise InputError(f"A row of the table {table!r} has no one contribution to be put in order by.")
        up, down = movers(columns, count)
        return frame_of(up), frame_of(down)

    def correlations(self, table: str = "tokens", of: Batch = "batch") -> DataFrame:
        """Return how contributions of tokens or sequences go with log-probability, entropy, advantage, length, ...

        Raises:
            InputError: If the table is another one.
            MissingExtraError: If pandas is not installed.
        """
        if table not in _AGAINST:
            raise InputError(f"Correlations are taken of 'tokens' or 'sequences', and {table!r} was asked for.")
        return frame_of(correlations(self.columns(table, of), _AGAINST[table]))

    def blocks(self) -> tuple[Block, ...]:
        """Return the blocks of an attribution: the answer, the step in rows, the largest parts, correlations."""
        return blocks_of(self)
