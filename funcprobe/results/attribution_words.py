"""The words of an attribution: the answer, the step in a few rows, the largest parts, and correlations."""

from __future__ import annotations

from math import isnan

from funcprobe.attribution.token_tables import Columns, correlations, movers
from funcprobe.errors import percent
from funcprobe.results.blocks import Block, Column, Figure, Row, Sentence, Table, pairs
from funcprobe.results.parts import Parts
from funcprobe.results.probe_words import MEASURED, PREDICTED, headline_of
from funcprobe.results.words import closing, sizes_of, with_error

#: How many rows of a table are shown either way.
SHOWN = 3

#: The symbols of the table of correlations.
CORRELATIONS = "Correlations: r is Pearson's, of values; ρ is Spearman's, of ranks"

#: What contributions of U are held against: the words, and the column of tokens and of sequences that holds it.
_BESIDE = (
    ("advantage", "advantage", "advantage"),
    ("log-probability", "logp", "mean_logp"),
    ("entropy", "entropy", "mean_entropy"),
    ("position, or length", "position", "length"),
    ("reward", "reward", "reward"),
    ("cov_pg", "cov_pg", "cov_pg"),
    ("cov_npg", "cov_npg", "cov_npg"),
    ("discriminant", "discriminant", "discriminant"),
)


def blocks_of(parts: Parts) -> tuple[Block, ...]:
    """Return an attribution in blocks; it reads in ten seconds."""
    probe = parts.probe
    rows = [*ledger_rows(parts), *ways_rows(parts)]
    return (
        Sentence(headline_of(probe.outcome, probe.provenance, probe.family), "strong"),
        Sentence(led_by(parts), "strong"),
        *sizes_of(probe.provenance),
        Sentence(f"{parts.unit}, {parts.form} form; shares are of δF₁", "quiet"),
        pairs(rows, (MEASURED, PREDICTED), f"{parts.reading.observable}, {parts.unit}"),
        *(movers_table(parts, table) for table in ("layers", "prompts", "tokens")),
        correlation_table(parts),
        *closing(probe.provenance, probe.notes, probe.warnings),
        *map(Figure, ("layers", "kinds", "tokens", "prompts")),
        *([Figure("influence")] if parts.influence is not None else []),
    )


def led_by(parts: Parts) -> str:
    """Return which part of the step did it, in a sentence."""
    whole = parts.first_order
    if not whole:
        return "Its parts sum to nothing."
    ledger = sorted(((name, x) for name, x in parts.ledger.items() if x), key=lambda pair: -abs(pair[1]))
    return "Of δF₁: " + ", ".join(f"{name} {share(x, whole)}" for name, x in ledger) + "."


def ledger_rows(parts: Parts) -> list[tuple[str, str]]:
    """Return the whole and its parts as (name, value) rows."""
    reading, bars = parts.reading, parts.bars.get("ledger", {})
    measured = [(MEASURED, with_error(reading.change, reading.bars.get("change")))] if reading.is_measured else []
    return [
        *measured,
        (PREDICTED, with_error(reading.first_order, reading.bars.get("first_order"))),
        *(
            (f"  by {row}", f"{with_error(value, bars.get(row))}  ({share(value, reading.first_order)})")
            for row, value in parts.ledger.items()
        ),
        ("parts − whole", f"{parts.completeness_error:.1e} of Σ|parts|"),
        ("Σ|tokens of U| / |δF₁|", f"{parts.cancellation:.3g}"),
        *(
            ("largest entry of a sequence", f"{percent(row.share)} of sequence {row.sequence}, in {row.leaf}")
            for row in sorted(parts.concentrations, key=lambda row: -row.share)[:1]
        ),
    ]


def ways_rows(parts: Parts) -> list[tuple[str, str]]:
    """Return which way evaluation tokens moved: by visiting other states, or by entropies of their own."""
    words = {"logp": "through the states visited", "entropy": "through entropies there"}
    whole = parts.first_order
    return (
        []
        if parts.evaluation is None
        else [
            (words.get(name, f"through {name}"), f"{float(x.sum()):+.6e}  ({share(float(x.sum()), whole)})")
            for name, x in parts.evaluation.through.items()
            if bool(x.any())
        ]
    )


def share(part: float, whole: float) -> str:
    """Return a part as a share of the whole.

    Example:
        >>> share(-1.0, -4.0), share(1.0, 0.0)
        ('25.0 %', 'of nothing')
    """
    return percent(part / whole + 0.0) if whole else "of nothing"  # + 0.0: no "-0.0 %"


def movers_table(parts: Parts, table: str) -> Table:
    """Return the rows of a table that lower most, and under them those that raise most."""
    columns = parts.columns(table)
    up, down = movers(columns, SHOWN)
    barred = "error" in columns
    rows = []
    for some in (down, up):
        for k, x in enumerate(some["contribution"]):
            error = [f"{some['error'][k]:.1e}"] if barred else []
            rows.append(Row((f"{x:+.3e}", *error, share(float(x), parts.first_order), _label(table, some, k))))
    numbers = [Column(heading, "right") for heading in ("contribution", *(["±"] if barred else []), "share")]
    whose = f"{table}{'' if table == 'layers' else ' of U'} that moved it most"
    return Table((*numbers, Column(whose, narrow="cut")), tuple(rows) or (Row(("none",)),))


def correlation_table(parts: Parts) -> Table:
    """Return how contributions of U go with their tokens' and sequences' own numbers."""
    found = {of: _coefficients(parts.columns(of)) for of in ("tokens", "sequences")}
    rows = []
    for words, *names in _BESIDE:
        cells = [found[of].get(name) for of, name in zip(found, names, strict=True)]
        if any(cell is not None for cell in cells):
            rows.append(Row((words, *(text for cell in cells for text in _pair(cell)))))
    numbers = (Column(f"{of} {which}", "right") for of in found for which in ("r", "ρ"))
    return Table((Column("contribution of U goes with", narrow="cut"), *numbers), tuple(rows), CORRELATIONS)


def _label(table: str, rows: Columns, k: int) -> str:
    if table == "layers":
        return str(rows["layer"][k])
    if table == "prompts":
        return f"prompt {rows['prompt'][k]}: {rows['text'][k]}"
    return f"at {rows['position'][k]} of sequence {rows['sequence'][k]}: “{rows['text'][k]}”"


def _coefficients(columns: Columns) -> dict[str, tuple[float, float]]:
    """Return {column: (Pearson's r, Spearman's ρ)} of contributions with every column that holds numbers."""
    names = [name for row in _BESIDE for name in row[1:]]
    found = correlations(columns, list(dict.fromkeys(names)))
    return dict(zip(found["with"], zip(found["pearson"], found["spearman"], strict=True), strict=True))


def _pair(cell: tuple[float, float] | None) -> tuple[str, str]:
    if cell is None:
        return "", ""
    r, rho = ("constant" if isnan(x) else f"{x:+.2f}" for x in cell)
    return r, rho
