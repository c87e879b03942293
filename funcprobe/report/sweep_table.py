"""A sweep for the terminal: one sentence, a row a learning rate, what should be known."""

from __future__ import annotations

from functools import partial
from typing import IO, TYPE_CHECKING

from funcprobe.report.terminal import as_text, bare_table, cost_of, show
from funcprobe.results.sweep import SweepResult
from funcprobe.results.sweep_words import caption_of, context_of, headline_of, remarks_of, table_of

if TYPE_CHECKING:
    from rich.console import RenderableType


def print_sweep(sweep: SweepResult, file: IO[str] | None = None) -> None:
    """Print the sweep to a file, standard output by default: colours on a terminal only, 80 columns when piped.

    Raises:
        MissingExtraError: If rich is not installed.
    """
    show(partial(rendered, sweep), file)


def sweep_text(sweep: SweepResult, width: int = 80) -> str:
    """Return the sweep as plain text of at most `width` columns.

    Raises:
        MissingExtraError: If rich is not installed.
    """
    return as_text(partial(rendered, sweep), width)


def rendered(sweep: SweepResult) -> RenderableType:
    """Return the sweep as something rich can print: the main observable first, and every other in the same form."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    main, *others = sweep.observables
    below = [Text(text) for text in remarks_of(sweep)]
    below += [Text(f"Note: {text}", "dim") for text in sweep.notes]
    below += [Text(cost_of(sweep), "dim")]
    below += [Text.assemble(("Warning: ", "bold yellow"), text) for text in sweep.warnings]
    return Group(
        Text(headline_of(sweep, main), "bold"),
        Text(context_of(sweep), "dim"),
        Padding(_table(sweep, main), (1, 0)),
        *(Group(Text(headline_of(sweep, name)), Padding(_table(sweep, name), (1, 0))) for name in others),
        *below,
    )


def _table(sweep: SweepResult, name: str) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    headings, rows = table_of(sweep, name)
    table = bare_table(show_header=True)
    for heading in headings:
        # of all cells only ΔF ± its error can be broken, between the two, where columns are few
        table.add_column(heading, justify="right" if heading == "ESS" else "left", no_wrap=heading != "ΔF")
    for row in rows:
        table.add_row(*row)
    return Group(Text(caption_of(sweep, name), "dim"), table)
