"""A sweep in blocks: a sentence and a table for every observable, then cautions."""

from __future__ import annotations

from collections.abc import Sequence

from funcprobe.results.blocks import Block, Column, Figure, Row, Sentence, Table
from funcprobe.results.curve import Curve
from funcprobe.results.sweep_numbers import remarks_of, table_of
from funcprobe.results.sweep_words import caption_of, headline_of
from funcprobe.results.words import closing, sizes_of


def blocks_of(curve: Curve, notes: Sequence[str], warnings: Sequence[str]) -> tuple[Block, ...]:
    """Return a sweep in blocks, the main observable first and every other in the same form."""
    main, *others = curve.observables
    further: list[Block] = []
    for name in others:
        further += [Sentence(headline_of(curve, name)), numbers_of(curve, name), Figure("sweep", name)]
    return (
        Sentence(headline_of(curve, main), "strong"),
        *sizes_of(curve.provenance),
        numbers_of(curve, main),
        Figure("sweep"),
        Figure("remainder"),
        *further,
        *(Sentence(text) for text in remarks_of(curve)),
        *closing(curve.provenance, notes, warnings),
    )


def numbers_of(curve: Curve, name: str | None = None) -> Table:
    """Return the table of one observable.

    Raises:
        InputError: If there is no such observable.
    """
    headings, rows = table_of(curve, name)
    # of all cells only ΔF ± its error can be broken, between the two, where space is short
    columns = [
        Column(heading, "right" if heading == "ESS" else "left", "broken" if heading == "ΔF" else "whole")
        for heading in headings
    ]
    return Table(tuple(columns), tuple(Row(row) for row in rows), caption_of(curve, name))
