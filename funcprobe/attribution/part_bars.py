"""Error bars of parts: the Δθ of a part of the step is a direction, and its contribution is δF along that direction.

In the additive form every part has a piece of Δθ of its own: the leaves of a layer, the momentum, `scale ⊙ g_j` for the
gradient of a part of U. Forward mode along that piece gives tangents of E's scores, hence the same jackknife over the
prompts of E that δF₁ itself has. A row costs a tangent of E (2 forward passes, many rows sharing the third), a row of U
its gradient besides.

Estimand: the contribution as a functional of E's distribution, at a fixed step; not how it would vary with another U.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from operator import itemgetter

import torch
from torch import Tensor

from funcprobe import engine
from funcprobe.attribution.parameter_parts import PARAMETER_TABLES
from funcprobe.attribution.step_parts import StepParts
from funcprobe.errors import InputError, NumericsError
from funcprobe.estimators.uncertainty import Bar, bar
from funcprobe.measurement.evidence import NOISE, Evidence
from funcprobe.measurement.measurement import Measurement
from funcprobe.measurement.readings import WEIGHTLESS, resampled

#: Tables whose rows can have bars.
BARRED = ("ledger", "parameters", *PARAMETER_TABLES, "prompts", "sequences")

#: Rows that share a forward-mode pass where nothing else is asked for.
TOGETHER = 8

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
        raise InputError(
            "bars_of needs the additive form, in which every part is a piece of Δθ; leave it out, or use "
            "form='additive' with SGD, Adam or AdamW."
        )


def part_bars(
    measurement: Measurement, evidence: Evidence, parts: StepParts, tables: Collection[str], chunk: int | None
) -> PartBars:
    """Return the bars of every row of some tables; a table is left out, with a note, where "auto" finds there are none.

    Raises:
        InputError: If a method that was asked for by name cannot be used.
        NumericsError: The same for a replicate that is not finite.
    """
    found: PartBars = {}
    chunk = TOGETHER if chunk is None else chunk
    for table in tables:
        rows, bars = parts.pieces(table), dict[str, Bar]()
        try:
            while together := dict(islice(rows, chunk)):
                along = measurement.passes.directional_of_many(
                    parts.params, list(together.values()), f"E along {table}"
                )
                bars |= _bars(measurement, evidence, list(together), along, chunk)
        except (InputError, NumericsError) as error:
            if measurement.options.bars != "auto":
                raise
            measurement.messages.note("no bars", f"no error bars of {table}: {error}")
            continue
        moved = [row for row in bars.values() if abs(row.value) > evidence.noise(measurement.main[1])]
        if moved and all(row.error <= NOISE * abs(row.value) for row in moved):
            measurement.messages.note("no bars", f"no error bars of {table}: {WEIGHTLESS}")
            continue
        found[table] = bars
    return found


def _bars(
    measurement: Measurement, evidence: Evidence, labels: list[str], along: list[engine.Directional], chunk: int
) -> dict[str, Bar]:
    """Return the bar of `δF` along every row's piece of Δθ, from replicates over prompts that all rows share."""
    options, observable = measurement.options, measurement.main[1]
    each = [evidence._replace(along=row) for row in along]

    def quantities(a: Tensor) -> Tensor:
        return torch.stack([row.first_order(observable, a) for row in each])

    cells = 2 * chunk * evidence.rollouts.completion_mask.numel()  # of a whole chunk: one method for a table
    method = "auto" if options.bars is None else options.bars
    named = [f"The contribution of '{label}'" for label in labels]
    with measurement.passes.clock("error bars"):
        generator = torch.Generator().manual_seed(options.seed)  # anew, so that all rows see one resampling
        sampled = resampled(quantities, evidence.rollouts, method, named, cells, generator)
    return {label: bar(sampled, itemgetter(k), options.level) for k, label in enumerate(labels)}
