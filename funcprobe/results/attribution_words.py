"""The plain words and numbers of an attribution, for terminals, notebooks and logs."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from funcprobe.attribution.token_tables import Columns, movers
from funcprobe.results.probe_words import with_error

if TYPE_CHECKING:
    from funcprobe.results.attribution import Attribution

#: How many rows of a table a summary shows either way.
SHOWN = 3


def ledger_rows(attribution: Attribution) -> list[tuple[str, str]]:
    """Return the whole and its parts as (what, value) rows."""
    reading, bars = attribution.result.readings[attribution.observable], attribution.bars.get("ledger", {})
    return [
        ("measured   ΔF", with_error(reading.change, reading.bars.get("change"))),
        ("predicted  δF₁", with_error(reading.first_order, reading.bars.get("first_order"))),
        *(
            (f"  by {row}", f"{with_error(value, bars.get(row))}  ({share(value, reading.first_order)})")
            for row, value in attribution.ledger.items()
        ),
        ("parts − whole", f"{attribution.completeness_error:.1e} of Σ|parts|"),
    ]


def ways_rows(attribution: Attribution) -> list[tuple[str, str]]:
    """Return which way evaluation tokens moved: by visiting other states, or by entropies of their own."""
    words = {"logp": "through the states visited", "entropy": "through entropies there"}
    whole = attribution.first_order
    return [
        (words.get(name, f"through {name}"), f"{float(x.sum()):+.6e}  ({share(float(x.sum()), whole)})")
        for name, x in attribution.evaluation.through.items()
        if bool(x.any())
    ]


def share(part: float, whole: float) -> str:
    """Return a part as a share of the whole.

    Example:
        >>> share(-1.0, -4.0), share(1.0, 0.0)
        ('25.0 %', 'of nothing')
    """
    return f"{part / whole + 0.0:.1%}".replace("%", " %") if whole else "of nothing"  # + 0.0: no "-0.0 %"


def mover_rows(columns: Columns, label: str, count: int = SHOWN) -> list[tuple[str, float]]:
    """Return (label, contribution) of the rows that move most, those that lower first."""
    up, down = movers(columns, count)
    return [
        (str(what), float(x)) for rows in (down, up) for what, x in zip(rows[label], rows["contribution"], strict=True)
    ]


def token_label(columns: Columns, k: int) -> str:
    """Return where a token stands, for people."""
    return f"{columns['text'][k]!r} at {columns['position'][k]} of sequence {columns['sequence'][k]}"


def summary_of(attribution: Attribution) -> str:
    """Return the text of `Attribution.summary`."""
    e, u = attribution.result.evaluation, attribution.result.update_batch
    rows = [*ledger_rows(attribution), *ways_rows(attribution)]
    width = max(len(name) for name, _ in rows)
    lines = [
        f"{attribution.result.readings[attribution.observable].observable}, {attribution.unit} "
        f"({attribution.form} form)",
        f"E: {e.sequences} sequences, {e.tokens} tokens   U: {u.sequences} sequences, {u.tokens} tokens",
        "",
        *(f"  {name:<{width}}  {value}" for name, value in rows),
    ]
    for heading, found in sections(attribution):
        lines += ["", heading, *(f"  {value:+.3e}  {label}" for label, value in found)]
    said = [f"Warning: {text}" for text in attribution.result.warnings]
    return "\n".join([*lines, *([""] if said else []), *said])


def sections(attribution: Attribution) -> list[tuple[str, list[tuple[str, float]]]]:
    """Return the largest movers of layers, update tokens and update prompts, under a heading each."""
    tokens = attribution.columns("tokens")
    labelled = {**tokens, "label": [token_label(tokens, k) for k in range(len(tokens["token"]))]}
    found = [
        ("layers", mover_rows(attribution.columns("layers"), "layer")),
        ("tokens of U", mover_rows(labelled, "label")),
    ]
    prompts = attribution.columns("prompts")
    if len(prompts["prompt"]) > 1:
        named = [f"prompt {p}: {text}" for p, text in zip(prompts["prompt"], prompts["text"], strict=True)]
        found.append(("prompts of U", mover_rows({**prompts, "label": named}, "label")))
    return found


def html_of(attribution: Attribution) -> str:
    """Return the ledger as a small HTML table, for notebooks."""
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td style='text-align:right'><code>{html.escape(value)}</code></td></tr>"
        for name, value in [*ledger_rows(attribution), *ways_rows(attribution)]
    )
    caption = f"{attribution.observable}, {attribution.unit}, {attribution.form} form"
    return f"<table><caption>{html.escape(caption)}</caption>{cells}</table>"
