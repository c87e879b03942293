"""An attribution for the terminal: one sentence, the step in a few rows, who moved it most, what it goes with."""

from __future__ import annotations

from functools import partial
from typing import IO, TYPE_CHECKING

import numpy as np

from funcprobe.attribution.token_tables import Columns, correlations, movers
from funcprobe.report.terminal import as_text, bare_table, cost_of, headline, show
from funcprobe.results.attribution import Attribution
from funcprobe.results.attribution_words import SHOWN, ledger_rows, share, ways_rows
from funcprobe.results.visible_text import visible

if TYPE_CHECKING:
    from rich.console import RenderableType

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


def print_attribution(attribution: Attribution, file: IO[str] | None = None) -> None:
    """Print it to a file, standard output by default: colours on a terminal only, 80 columns when piped.

    Raises:
        MissingExtraError: If rich is not installed.
    """
    show(partial(rendered, attribution), file)


def attribution_text(attribution: Attribution, width: int = 80) -> str:
    """Return it as plain text of at most `width` columns.

    Raises:
        MissingExtraError: If rich is not installed.
    """
    return as_text(partial(rendered, attribution), width)


def rendered(attribution: Attribution) -> RenderableType:
    """Return it as something rich can print; it reads in ten seconds."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    result = attribution.result
    below = [Text(f"Note: {text}", "dim") for text in result.notes]
    below += [Text(cost_of(result), "dim")]
    below += [Text.assemble(("Warning: ", "bold yellow"), text) for text in result.warnings]
    return Group(
        Text(headline(result), "bold"),
        Text(_led(attribution), "bold"),
        Text(_context(attribution), "dim"),
        Padding(_numbers(attribution), (1, 0)),
        *(Padding(_movers(attribution, what), (0, 0, 1, 0)) for what in ("layers", "prompts", "tokens")),
        Padding(_correlations(attribution), (0, 0, 1, 0)),
        *below,
    )


def _led(attribution: Attribution) -> str:
    """Return which part of the step did it, in a sentence."""
    whole, ledger = attribution.first_order, attribution.ledger
    if not whole:
        return "Its parts sum to nothing."
    parts = sorted(((name, x) for name, x in ledger.items() if x), key=lambda pair: -abs(pair[1]))
    return "Of δF₁: " + ", ".join(f"{name} {share(x, whole)}" for name, x in parts) + "."


def _context(attribution: Attribution) -> str:
    e, u = attribution.result.evaluation, attribution.result.update_batch
    return (
        f"E: {e.sequences} sequences, {e.tokens} tokens, {e.prompts} prompts\n"
        f"U: {u.sequences} sequences, {u.tokens} tokens, {u.prompts} prompts\n"
        f"{attribution.unit}, {attribution.form} form; shares are of δF₁"
    )


def _numbers(attribution: Attribution) -> RenderableType:
    table = bare_table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in [*ledger_rows(attribution), *ways_rows(attribution)]:
        table.add_row(name, value, style="bold" if name.startswith(("measured", "predicted")) else "")
    return table


def _movers(attribution: Attribution, what: str) -> RenderableType:
    """Return the rows of a table that lower most, and under them those that raise most."""
    columns = attribution.columns(what)
    up, down = movers(columns, SHOWN)
    table = bare_table(show_header=True)
    table.add_column("contribution", justify="right", no_wrap=True)
    if barred := "error" in columns:
        table.add_column("±", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column(
        f"{what}{'' if what == 'layers' else ' of U'} that moved it most", no_wrap=True, overflow="ellipsis"
    )
    for rows in (down, up):
        for k, x in enumerate(rows["contribution"]):
            error = [f"{rows['error'][k]:.1e}"] if barred else []
            table.add_row(f"{x:+.3e}", *error, share(float(x), attribution.first_order), _label(what, rows, k))
    if not table.row_count:
        table.add_row("none")
    return table


def _label(what: str, rows: Columns, k: int) -> str:
    if what == "layers":
        return str(rows["layer"][k])
    text = visible(rows["text"][k])
    if what == "prompts":
        return f"prompt {rows['prompt'][k]}: {text}"
    place = f"{rows['position'][k]} of sequence {rows['sequence'][k]}"
    return f"at {place}: “{text}”"


def _correlations(attribution: Attribution) -> RenderableType:
    """Return how contributions of U go with what a plot would show, by tokens and by sequences."""
    found = {of: _rho(attribution.columns(of)) for of in ("tokens", "sequences")}
    table = bare_table(show_header=True)
    table.add_column("contribution of U goes with", no_wrap=True)
    for of in found:
        for which in ("r", "ρ"):
            table.add_column(f"{of} {which}", justify="right", no_wrap=True)
    for words, *names in _BESIDE:
        cells = [found[of].get(name) for of, name in zip(found, names, strict=True)]
        if any(cell is not None for cell in cells):
            table.add_row(words, *(text for cell in cells for text in _pair(cell)))
    return table


def _rho(columns: Columns) -> dict[str, tuple[float, float]]:
    """Return {column: (Pearson's r, Spearman's ρ)} of contributions with every column that holds numbers."""
    names = [name for row in _BESIDE for name in row[1:]]
    found = correlations(columns, list(dict.fromkeys(names)))
    return dict(zip(found["with"], zip(found["pearson"], found["spearman"], strict=True), strict=True))


def _pair(cell: tuple[float, float] | None) -> tuple[str, str]:
    return ("", "") if cell is None else tuple("constant" if np.isnan(x) else f"{x:+.2f}" for x in cell)  # type: ignore[return-value]
