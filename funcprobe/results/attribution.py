"""`Attribution`: the parts of one step's δF₁, frozen; they can be read as tables, printed, saved, loaded and drawn."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from funcprobe.attribution.influence import Influence
from funcprobe.attribution.parameter_parts import PARAMETER_TABLES, LeafName, LeafPart, read_name, rolled_up
from funcprobe.attribution.part_bars import PartBars
from funcprobe.attribution.token_parts import TokenParts
from funcprobe.attribution.token_tables import TOKEN_TABLES, Columns, correlations, movers
from funcprobe.errors import InputError
from funcprobe.measurement.evidence import NOISE
from funcprobe.results import attribution_file
from funcprobe.results.frames import frame_of
from funcprobe.results.probe import ProbeResult

if TYPE_CHECKING:
    from pandas import DataFrame

Batch = Literal["update", "evaluation"]

TABLES = (*TOKEN_TABLES, "parameters", *PARAMETER_TABLES, "ledger", "influence")

#: What contributions are correlated with, of tokens and of sequences.
_AGAINST = {
    "tokens": ("logp", "entropy", "advantage", "position", "cov_pg", "cov_npg", "discriminant"),
    "sequences": ("mean_logp", "mean_entropy", "advantage", "reward", "length", "cov_pg", "cov_npg", "discriminant"),
}


@dataclass(frozen=True)
class Attribution:
    """Which parameters, prompts and tokens moved an observable in one step, in the observable's unit.

    Every table's contributions sum to δF₁, the result's `first_order`, up to `completeness_error`: the leaves' do, the
    evaluation tokens' do, and so do the update tokens' with momentum and weight decay (and "rest", in the Jacobian
    form), which is what `ledger` holds.
    """

    result: ProbeResult  #: the step itself: ΔF measured, δF₁ predicted, with error bars
    observable: str  #: the name, among the result's readings, of what is attributed
    form: str  #: "additive" or "jacobian"
    leaves: tuple[LeafPart, ...]  #: every parameter leaf
    evaluation: TokenParts  #: tokens of E
    update: TokenParts  #: tokens of U
    influence: Influence | None = None  #: update sequences on evaluation rows, where it was asked for
    vocabulary: dict[int, str] | None = None  #: the text of token ids; None where no tokenizer was given
    bars: PartBars = field(default_factory=dict)  #: error bars of parts, by table and row, of those asked for

    @property
    def unit(self) -> str:
        """The observable's unit, such as "nats per token"."""
        return self.result.readings[self.observable].unit

    @property
    def first_order(self) -> float:
        """δF₁: the whole, from the forward-mode pass over E."""
        return self.result.readings[self.observable].first_order

    @cached_property
    def ledger(self) -> dict[str, float]:
        """What the gradient on U, momentum and weight decay did; in the Jacobian form the gradient and "rest"."""
        found = {"gradient on U": self.batch.sum()}
        if self.form == "additive":
            found["momentum"] = math.fsum(part.momentum for part in self.leaves)
            found["weight decay"] = math.fsum(part.decay for part in self.leaves)
        else:  # of trees and not of tokens, so that the tokens are still held against something
            found["rest"] = math.fsum(part.rest for part in self.leaves)
        return found

    @cached_property
    def completeness(self) -> dict[str, float]:
        """How far each sum of parts is from δF₁, relative to Σ|parts|; 0 where all parts are rounding of F."""
        parts = [part.contribution for part in self.leaves]
        offsets = [value for row, value in self.ledger.items() if row != "gradient on U"]
        sums = {
            "parameters": (math.fsum(parts), math.fsum(map(abs, parts))),
            "evaluation tokens": (self.evaluation.sum(), self.evaluation.magnitude()),
            "update tokens": (sum(self.ledger.values()), self.batch.magnitude() + math.fsum(map(abs, offsets))),
        }
        whole = self.first_order
        noise = NOISE * abs(self.result.readings[self.observable].before)
        return {name: abs(total - whole) / size if size > noise else 0.0 for name, (total, size) in sums.items()}

    @property
    def completeness_error(self) -> float:
        """The largest of `completeness`: rounding, about 1e-15 in float64 and 1e-6 in float32."""
        return max(self.completeness.values())

    def columns(self, table: str = "tokens", of: Batch = "update") -> Columns:
        """Return a table as plain columns; see `to_frame`.

        Raises:
            InputError: If there is no such table or batch, or it was not asked for.
        """
        if of not in ("update", "evaluation"):
            raise InputError(f"Unknown batch {of!r}; expected 'update' (U) or 'evaluation' (E).")
        if table in TOKEN_TABLES:
            found = TOKEN_TABLES[table](getattr(self, of), self.vocabulary)
            return found if of == "evaluation" else self._barred(table, found, table[:-1])
        if table == "ledger":
            found = {"part": list(self.ledger), "contribution": list(self.ledger.values())}
            return self._barred(table, found, "part")
        if table == "parameters":
            return self._barred(table, _parameter_columns(self.leaves), "name")
        if table in PARAMETER_TABLES:
            return self._barred(table, _rolled_columns(table, self.leaves), table[:-1])
        if table == "influence":
            return _influence_columns(self.influence)
        raise InputError(f"There is no table {table!r}; the tables are {', '.join(TABLES)}.")

    def _barred(self, table: str, columns: Columns, label: str) -> Columns:
        """Return the columns with error, low and high beside the contribution, where the table has bars."""
        if table not in self.bars:
            return columns
        rows = [self.bars[table][str(row)] for row in columns[label]]
        found: Columns = {}
        for name, values in columns.items():
            found[name] = values
            if name == "contribution":
                found |= {end: [getattr(row, end) for row in rows] for end in ("error", "low", "high")}
        return found

    def to_frame(self, table: str = "tokens", of: Batch = "update") -> DataFrame:
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

    def movers(self, count: int = 10, table: str = "tokens", of: Batch = "update") -> tuple[DataFrame, DataFrame]:
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

    def correlations(self, table: str = "tokens", of: Batch = "update") -> DataFrame:
        """Return how contributions of tokens or sequences go with log-probability, entropy, advantage, length, ...

        Raises:
            InputError: If the table is another one.
            MissingExtraError: If pandas is not installed.
        """
        if table not in _AGAINST:
            raise InputError(f"Correlations are taken of 'tokens' or 'sequences', and {table!r} was asked for.")
        return frame_of(correlations(self.columns(table, of), _AGAINST[table]))

    def summary(self) -> str:
        """Return a text that reads in ten seconds: the ledger, the largest movers, and how complete it is."""
        from funcprobe.results.attribution_words import summary_of

        return summary_of(self)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the folder `path`, whole or not at all: `result.json`, `attribution.json`, `attribution.safetensors`.

        Raises:
            InputError: If the folder exists and `overwrite` is false.
        """
        return attribution_file.save(self, path, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Attribution:
        """Read what `save` wrote.

        Raises:
            InputError: If there is no attribution at `path`, or it has another schema version.
        """
        return cls(**attribution_file.load(path))

    def _repr_html_(self) -> str:
        from funcprobe.results.attribution_words import html_of

        return html_of(self)


def _parameter_columns(leaves: tuple[LeafPart, ...]) -> Columns:
    names = [read_name(part.name) for part in leaves]
    return {
        "name": [part.name for part in leaves],
        **{field: [getattr(name, field) for name in names] for field in LeafName._fields},
        **_leaf_columns(leaves),
    }


def _rolled_columns(table: str, leaves: tuple[LeafPart, ...]) -> Columns:
    rows = rolled_up(leaves, PARAMETER_TABLES[table])
    return {table[:-1]: list(rows), **_leaf_columns(tuple(rows.values()))}


def _leaf_columns(parts: tuple[LeafPart, ...]) -> Columns:
    fields = ("contribution", "gradient", "momentum", "decay", "rest", "norm", "size")
    return {field: [getattr(part, field) for part in parts] for field in fields}


def _influence_columns(influence: Influence | None) -> Columns:
    if influence is None:
        raise InputError("This attribution has no influence matrix; call attribute(..., influence='prompts').")
    columns: dict[str, Any] = {influence.by[:-1]: influence.rows.numpy()}
    return columns | {f"update {j}": influence.matrix[:, j].numpy() for j in range(influence.matrix.shape[1])}
