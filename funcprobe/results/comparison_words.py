"""The words of a comparison: a row for every update, its difference from the baseline, and cautions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from funcprobe.estimators.uncertainty import Bar
from funcprobe.measurement.outcome import Outcome
from funcprobe.measurement.readings import Reading
from funcprobe.results.blocks import Block, Column, Figure, Remark, Row, Sentence, Table
from funcprobe.results.paired import difference
from funcprobe.results.provenance import Provenance
from funcprobe.results.words import cost_of, sizes_of, with_error


def blocks_of(
    outcomes: Mapping[str, Outcome], provenance: Provenance, level: float, notes: Sequence[str]
) -> tuple[Block, ...]:
    """Return a comparison in blocks: its table, the paired differences, and cautions."""
    differences = differences_of(outcomes, provenance, level)
    readings = next(iter(outcomes.values())).readings
    units = ", ".join(f"{name} in {reading.unit}" for name, reading in readings.items())
    prompts = provenance.evaluation.prompts
    lost = any(reading.is_lost for outcome in outcomes.values() for reading in outcome.readings.values())
    known = "lost: the float error of ΔF is above a tenth of it, and nothing follows from it"
    return (
        table_of(outcomes),
        *([differences] if differences.rows else []),
        Sentence(f"{units}; ± one standard error over {prompts} prompts, differences paired by prompt"),
        *sizes_of(provenance),
        *([Sentence(known)] if lost else []),
        *(Remark("note", str(text)) for text in notes),
        Sentence(cost_of(provenance), "quiet"),
        *(Remark("warning", str(text), name) for name, outcome in outcomes.items() for text in outcome.warnings),
        Figure("comparison"),
        *([Figure("differences")] if differences.rows else []),
    )


def table_of(outcomes: Mapping[str, Outcome]) -> Table:
    """Return the changes by update: ΔF and δF₁ of the first observable, ΔF of the others, with standard errors."""
    main, *others = next(iter(outcomes.values())).readings
    headings = (f"{main} ΔF", "δF₁", *(f"{name} ΔF" for name in others))
    rows = []
    for name, outcome in outcomes.items():
        reading = outcome.readings[main]
        predicted = _short(reading.first_order, reading.bars.get("first_order"))
        rows.append(Row((name, _change(reading), predicted, *(_change(outcome.readings[o]) for o in others))))
    return _table("update", headings, rows)


def differences_of(outcomes: Mapping[str, Outcome], provenance: Provenance, level: float) -> Table:
    """Return how much more every other update changes each observable than the baseline does, paired by prompt."""
    (baseline, base), *others = outcomes.items()
    rows = []
    for name, outcome in others:
        found = [difference(outcome, base, o, mode=provenance.mode, level=level) for o in base.readings]
        rows.append(Row((name, *(_short(bar.value, bar) for bar in found))))
    return _table(f"minus '{baseline}'", tuple(f"{name} ΔF" for name in base.readings), rows)


def _table(first: str, headings: Sequence[str], rows: Sequence[Row]) -> Table:
    numbers = (Column(heading, "right", "broken") for heading in headings)
    return Table((Column(first, narrow="broken"), *numbers), tuple(rows))


def _change(reading: Reading) -> str:
    return _short(reading.change, reading.bars.get("change")) + (" (lost)" if reading.is_lost else "")


def _short(value: float, found: Bar | None) -> str:
    return with_error(value, found, digits=3)
