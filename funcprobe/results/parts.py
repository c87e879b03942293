"""`Parts`: the parts of one update's δF₁ by parameter, prompt and token, their sums, and the tables made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from funcprobe.attribution.conditioning import Concentration
from funcprobe.attribution.influence import Influence
from funcprobe.attribution.parameter_parts import PARAMETER_TABLES, LeafName, LeafPart, read_name, rolled_up
from funcprobe.attribution.part_bars import PartBars
from funcprobe.attribution.token_parts import TokenParts
from funcprobe.attribution.token_tables import TOKEN_TABLES, Columns
from funcprobe.errors import InputError
from funcprobe.measurement.evidence import NOISE
from funcprobe.measurement.readings import Reading
from funcprobe.results.probe import ProbeResult

Batch = Literal["batch", "evaluation"]

TABLES = (*TOKEN_TABLES, "parameters", *PARAMETER_TABLES, "ledger", "influence")


@dataclass(frozen=True)
class Parts:
    """The parts of one update's δF₁, in the observable's unit.

    Every table's contributions sum to δF₁, the probe's `first_order`, up to `completeness_error`: the leaves' do, the
    evaluation tokens' do, and so do the batch tokens' with momentum and weight decay (and "rest", in the Jacobian
    form), which is what `ledger` holds.
    """

    probe: ProbeResult  #: the update itself: ΔF measured, δF₁ predicted, with error bars
    observable: str  #: the name, among the probe's readings, of the observable that is attributed
    form: str  #: "additive" or "jacobian"
    leaves: tuple[LeafPart, ...]  #: every parameter leaf
    evaluation: TokenParts | None  #: tokens of E; None where nothing was measured
    batch: TokenParts  #: tokens of U
    influence: Influence | None = None  #: batch sequences on evaluation rows, where it was asked for
    vocabulary: dict[int, str] | None = None  #: the text of token ids; None where no tokenizer was given
    bars: PartBars = field(default_factory=dict)  #: error bars of parts, by table and row, of those asked for
    concentrations: tuple[Concentration, ...] = ()  #: single entries in the sequences of U that contribute most

    def __post_init__(self) -> None:
        """Check that the observable is among the probe's.

        Raises:
            InputError: If it is not.
        """
        if self.observable not in self.probe.readings:
            known = ", ".join(self.probe.readings)
            raise InputError(f"The probe has no reading of the observable '{self.observable}'; it has {known}.")

    @property
    def reading(self) -> Reading:
        """The reading of the observable that is attributed."""
        return self.probe.readings[self.observable]

    @property
    def unit(self) -> str:
        """The observable's unit, such as "nats per token"."""
        return self.reading.unit

    @property
    def first_order(self) -> float:
        """δF₁: the whole, from the forward-mode pass over E; where nothing was measured, from ∇F and Δθ."""
        return self.reading.first_order

    @cached_property
    def ledger(self) -> dict[str, float]:
        """Contributions of gradient on U, momentum and weight decay; in the Jacobian form the gradient and "rest"."""
        parts = {"gradient on U": self.batch.sum()}
        if self.form == "additive":
            parts["momentum"] = math.fsum(part.momentum for part in self.leaves)
            parts["weight decay"] = math.fsum(part.decay for part in self.leaves)
        else:  # of trees and not of tokens, so that the tokens are still held against something
            parts["rest"] = math.fsum(part.rest for part in self.leaves)
        return parts

    @cached_property
    def completeness(self) -> dict[str, float]:
        """How far each sum of parts is from δF₁, relative to Σ|parts|; 0 where all parts are rounding of F."""
        parts = [part.contribution for part in self.leaves]
        offsets = [value for row, value in self.ledger.items() if row != "gradient on U"]
        sums = {"parameters": (math.fsum(parts), math.fsum(map(abs, parts)))}
        if self.evaluation is not None:
            sums["evaluation tokens"] = (self.evaluation.sum(), self.evaluation.magnitude())
        rows = self.batch.magnitude() + math.fsum(map(abs, offsets))
        sums["batch tokens"] = (sum(self.ledger.values()), rows)
        whole = self.first_order
        noise = NOISE * abs(self.reading.before)
        return {name: abs(total - whole) / size if size > noise else 0.0 for name, (total, size) in sums.items()}

    @property
    def completeness_error(self) -> float:
        """The largest of `completeness`: rounding, about 1e-15 in float64 and 1e-6 in float32."""
        return max(self.completeness.values())

    @property
    def cancellation(self) -> float:
        """The size of the parts of U relative to their sum, Σ|tokens of U| / |δF₁|; infinite where they leave 0."""
        return self.batch.magnitude() / abs(self.first_order) if self.first_order else math.inf

    def tokens_of(self, of: Batch) -> TokenParts:
        """Return the parts of the tokens of U, or of E.

        Raises:
            InputError: If there is no such batch, or nothing was measured on E.
        """
        if of not in ("batch", "evaluation"):
            raise InputError(f"Unknown batch {of!r}; expected 'batch' (U) or 'evaluation' (E).")
        if of == "batch":
            return self.batch
        if self.evaluation is None:
            raise InputError("Tokens of E are parts of a measurement; call attribute(...) without measure=False.")
        return self.evaluation

    def columns(self, table: str = "tokens", of: Batch = "batch") -> Columns:
        """Return a table as plain columns; see `to_frame`.

        Raises:
            InputError: If there is no such table or batch, or it was not asked for.
        """
        self.tokens_of(of)
        if table in TOKEN_TABLES:
            found = TOKEN_TABLES[table](self.tokens_of(of), self.vocabulary)
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
    return columns | {f"batch {j}": influence.matrix[:, j].numpy() for j in range(influence.matrix.shape[1])}
