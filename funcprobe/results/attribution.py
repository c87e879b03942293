"""`Attribution`: the parts of one update's δF₁, told, kept, and read as tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

from funcprobe.attribution.token_tables import Columns, correlations, movers
from funcprobe.errors import InputError
from funcprobe.results.attribution_words import blocks_of
from funcprobe.results.blocks import Block
from funcprobe.results.column_units import units_of
from funcprobe.results.datatree import (
    Groups,
    influence_group,
    outcome_groups,
    parts_group,
    prompts_of,
    table_group,
    tree_of,
)
from funcprobe.results.frames import Library, frame_of
from funcprobe.results.parts import Batch, Parts
from funcprobe.results.provenance import Provenance
from funcprobe.results.result import Result
from funcprobe.results.storage import Kind

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow
    from xarray import DataTree

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

    @overload
    def to_frame(self, table: str = ..., of: Batch = ..., *, library: Literal["pandas"] = ...) -> pandas.DataFrame: ...

    @overload
    def to_frame(self, table: str = ..., of: Batch = ..., *, library: Literal["polars"]) -> polars.DataFrame: ...

    @overload
    def to_frame(self, table: str = ..., of: Batch = ..., *, library: Literal["arrow"]) -> pyarrow.Table: ...

    def to_frame(self, table: str = "tokens", of: Batch = "batch", *, library: Library = "pandas") -> Any:
        """Return a table as a frame of "pandas", "polars" or "arrow".

        "tokens", "sequences", "prompts" and "positions" are tables of a batch: U, or E with `of="evaluation"`.
        "parameters", "layers", "kinds", "modules" and "pairs" (LoRA factors of one module) are those of the parameters,
        "ledger" is the step in a few rows, and "influence" the matrix, a row for every evaluation sequence or prompt.
        Tables that `bars_of` named have the standard error of every contribution, and the ends of its interval.

        Raises:
            InputError: If there is no such table, batch or library, or the table was not asked for.
            MissingExtraError: If the library is not installed.
        """
        return self._frame(self.columns(table, of), library)

    def movers(
        self, count: int = 10, table: str = "tokens", of: Batch = "batch"
    ) -> tuple[pandas.DataFrame, pandas.DataFrame]:
        """Return the rows of a table that raise the observable most, and those that lower it most.

        Raises:
            InputError: If there is no such table or batch, its rows have no contribution, or count is below 0.
            MissingExtraError: If pandas is not installed.
        """
        columns = self.columns(table, of)
        if "contribution" not in columns:
            raise InputError(f"A row of the table {table!r} has no one contribution to be put in order by.")
        up, down = movers(columns, count)
        return self._frame(up), self._frame(down)

    def correlations(self, table: str = "tokens", of: Batch = "batch") -> pandas.DataFrame:
        """Return how contributions of tokens or sequences go with log-probability, entropy, advantage, length, ...

        Raises:
            InputError: If the table is another one.
            MissingExtraError: If pandas is not installed.
        """
        if table not in _AGAINST:
            raise InputError(f"Correlations are taken of 'tokens' or 'sequences', and {table!r} was asked for.")
        return self._frame(correlations(self.columns(table, of), _AGAINST[table]))

    def _frame(self, columns: Columns, library: Library = "pandas") -> Any:
        return frame_of(columns, library, units_of(columns, self.unit))

    def to_datatree(self) -> DataTree:
        """Return the probe and the parts of its δF₁ as an `xarray.DataTree`; `results.datatree` lists its groups.

        Raises:
            MissingExtraError: If xarray is not installed.
        """
        return tree_of(self._groups(), self.kind, self.provenance)

    def _groups(self) -> Groups:
        tokens = {of: x for of, x in (("batch", self.batch), ("evaluation", self.evaluation)) if x is not None}
        prompts = prompts_of(tokens["evaluation"].rollouts) if "evaluation" in tokens else None
        groups = outcome_groups([self.probe.outcome], {}, prompts)
        groups |= {of: parts_group(x, self.unit) for of, x in tokens.items()}
        groups["parameters"] = table_group(self.columns("parameters"), "parameter", self.unit)
        groups["ledger"] = table_group(self.columns("ledger"), "part", self.unit)
        if self.influence is not None:
            groups["influence"] = influence_group(self.influence, self.unit)
        return groups

    def blocks(self) -> tuple[Block, ...]:
        """Return the blocks of an attribution: the answer, the step in rows, the largest parts, correlations."""
        return blocks_of(self)
