"""Error bars of parts: what a part of the step moved is a direction, and its contribution is δF along that direction.

In the additive form every part has a piece of Δθ of its own: the leaves of a layer, the momentum, `scale ⊙ g_j` for the
gradient of a part of U. Forward mode along that piece gives tangents of E's scores, hence the same jackknife over the
prompts of E that δF₁ itself has. A row costs a tangent of E (2 forward passes, many rows sharing the third), a row of U
its gradient besides.

Estimand: the contribution as a functional of E's distribution, at a fixed step; not how it would vary with another U.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter

import torch
from torch import Tensor

from funcprobe import engine
from funcprobe.analysis.evidence import Evidence
from funcprobe.analysis.inquiry import Inquiry
from funcprobe.analysis.parameter_parts import PARAMETER_TABLES, read_name
from funcprobe.data.rollouts import take
from funcprobe.errors import InputError, NumericsError
from funcprobe.estimators.uncertainty import Bar, bar, replicates
from funcprobe.training.response import offsets_of, respond
from funcprobe.training.step import Step
from funcprobe.types import Microbatch, OptState, Params, Rollouts, TokenScores

#: Tables whose rows can have bars.
BARRED = ("ledger", "parameters", *PARAMETER_TABLES, "prompts", "sequences")

#: Bars by table and row: a row goes by its label, prompts and sequences of U by their number.
PartBars = dict[str, dict[str, Bar]]


def check_bars_of(tables: Collection[str], form: str, bars: str | None) -> None:
    """Refuse early bars that cannot be made.

    Raises:
        InputError: If a table is unknown, there are no bars at all, or the form is not additive.
    """
    if isinstance(tables, str) or (unknown := [table for table in tables if table not in BARRED]):
        found = tables if isinstance(tables, str) else unknown[0]
        raise InputError(f"bars_of names {found!r}; expected a list of tables among {', '.join(BARRED)}.")
    if tables and bars is None:
        raise InputError("bars_of can do nothing with bars=None; leave one of them out.")
    if tables and form == "jacobian":
        raise InputError("bars_of needs the additive form, in which every part is a piece of Δθ; use form='additive'.")


@dataclass(frozen=True)
class Pieces:
    """A step in the additive form, from which the piece of Δθ that belongs to each row of a table is made."""

    step: Step
    params: Params
    opt_state: OptState
    gradient: Params  #: of the loss, before clipping
    update: Params  #: Δθ
    lr: float | None
    prepared: Rollouts  #: U, with advantages
    on_update: TokenScores  #: cotangents of the loss on U
    microbatch: Microbatch

    def of(self, table: str) -> Iterator[tuple[str, Params]]:
        """Yield (label, piece of Δθ) for every row; one exists at a time."""
        if table == "ledger":
            yield "gradient on U", self._moved_by(self.gradient)
            yield from offsets_of(self.step, self.params, self.opt_state, self.gradient, self.lr).items()
        elif table in ("prompts", "sequences"):
            for label, rows in self._rows(table):
                yield label, self._moved_by(self._gradient_of(rows))
        else:
            label_of = PARAMETER_TABLES.get(table)
            labels = {n: n if label_of is None else label_of(read_name(n)) for n in self.update}
            for label in dict.fromkeys(found for found in labels.values() if found is not None):
                yield label, {n: u if labels[n] == label else torch.zeros_like(u) for n, u in self.update.items()}

    def _rows(self, table: str) -> Iterator[tuple[str, Tensor]]:
        if table == "sequences":
            yield from ((str(j), torch.tensor([j])) for j in range(len(self.prepared.ids)))
            return
        for group in self.prepared.group_ids.unique().tolist():
            yield str(group), (self.prepared.group_ids == group).nonzero().flatten()

    def _gradient_of(self, rows: Tensor) -> Params:
        part = take(self.prepared, rows)
        c = engine.rows_of(self.on_update, rows, part)
        stats = self.step.objective.stats
        return engine.pull_back(
            c, self.step.policy, self.params, part, as_training=True, stats=stats, microbatch=self.microbatch
        )

    def _moved_by(self, gradient: Params) -> Params:
        """Return `scale ⊙ g_j`: the map from gradients to steps is diagonal, so it is its own transpose."""
        given = self.step, self.params, self.opt_state, self.gradient
        return respond(*given, gradient, self.lr, "additive").direction


def part_bars(asked: Inquiry, evidence: Evidence, pieces: Pieces, tables: Collection[str], chunk: int) -> PartBars:
    """Return the bars of every row of some tables; a table is left out, with a note, where "auto" finds there are none.

    Raises:
        InputError: If a method that was asked for by name cannot be used.
        NumericsError: The same for a replicate that is not finite.
    """
    found: PartBars = {}
    for table in tables:
        labels: list[str] = []
        along: list[engine.Directional] = []
        rows = pieces.of(table)
        while together := list(islice(rows, chunk)):
            labels += [label for label, _ in together]
            several = [piece for _, piece in together]
            along += asked.passes.directional_of_many(pieces.params, several, f"E along {table}")
        try:
            found[table] = _bars(asked, evidence, labels, along)
        except (InputError, NumericsError) as error:
            if asked.options.bars != "auto":
                raise
            asked.said.notes.append(f"no error bars of {table}: {error}")
    return found


def _bars(asked: Inquiry, evidence: Evidence, labels: list[str], along: list[engine.Directional]) -> dict[str, Bar]:
    """Return the bar of `δF` along every row's piece of Δθ, from replicates over prompts that all rows share."""
    options, observable = asked.options, asked.main[1]
    each = [evidence._replace(along=row) for row in along]

    def quantities(a: Tensor) -> Tensor:
        return torch.stack([row.first_order(observable, a) for row in each])

    cells = 2 * len(each) * evidence.rollouts.completion_mask.numel()
    method = "auto" if options.bars is None else options.bars
    with asked.passes.clock("error bars"):
        generator = torch.Generator().manual_seed(options.seed)
        sampled = replicates(quantities, evidence.rollouts, method, generator=generator, cells=cells)
    return {label: bar(sampled, itemgetter(k), options.level) for k, label in enumerate(labels)}
