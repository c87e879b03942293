"""A result for the terminal: one sentence, the numbers, every estimator side by side, what should be known."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import IO, TYPE_CHECKING, Any

from funcprobe.errors import missing_extra
from funcprobe.results.probe import ProbeResult
from funcprobe.results.probe_words import is_stored_narrower, rows_of, storage_of
from funcprobe.results.sweep import SweepResult

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

#: The names under which a table lists the integrands and weightings of the entropy family.
WORDS = {
    "rao_blackwell": "Rao–Blackwell",
    "surprisal": "surprisal",
    "per_decision": "per decision",
    "sequence": "sequence",
}


def print_summary(result: ProbeResult, file: IO[str] | None = None) -> None:
    """Print the summary to a file, standard output by default: colours on a terminal only, 80 columns when piped.

    Raises:
        MissingExtraError: If rich is not installed.
    """
    show(partial(summary, result), file)


def summary_text(result: ProbeResult, width: int = 80) -> str:
    """Return the summary as plain text of at most `width` columns.

    Raises:
        MissingExtraError: If rich is not installed.
    """
    return as_text(partial(summary, result), width)


def show(render: Callable[[], RenderableType], file: IO[str] | None = None) -> None:
    """Print what `render` returns to a file, standard output by default: colours on a terminal only.

    Raises:
        MissingExtraError: If rich is not installed.
    """
    file = sys.stdout if file is None else file
    if file.isatty():
        console(file).print(render())
    else:
        file.write(as_text(render, int(os.environ.get("COLUMNS") or 80)))


def as_text(render: Callable[[], RenderableType], width: int = 80) -> str:
    """Return what `render` returns as plain text of at most `width` columns.

    Raises:
        MissingExtraError: If rich is not installed.
    """
    buffer = io.StringIO()
    console(buffer, width).print(render())  # console first: it says what is missing
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def console(file: IO[str], width: int | None = None) -> Console:
    """Return a rich console that colours nothing but a terminal, and invents no highlights.

    Raises:
        MissingExtraError: If rich is not installed.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        missing = missing_extra("rich", "app", "printing a summary")
        raise missing from error
    return Console(file=file, width=width, highlight=False, markup=False, force_terminal=file.isatty())


def summary(result: ProbeResult) -> RenderableType:
    """Return the summary as something rich can print; it reads in ten seconds."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    warnings = [Text.assemble(("Warning: ", "bold yellow"), text) for text in result.warnings]
    moved = [Text(f"  {norm:.3e}  {name}", "dim") for name, norm in result.top[:3]]
    tail = [Text("most moved, by ‖Δθ‖₂", "dim"), *moved, Text("")] if moved else []
    return Group(
        Text(headline(result), "bold"),
        Text(_context(result), "dim"),
        Padding(_numbers(result), (1, 0)),
        _family(result),
        Padding(Group(*tail, Text(cost_of(result), "dim"), *warnings), (1, 0)),
    )


def headline(result: ProbeResult) -> str:
    """Return the answer as a sentence or two: how far it moved, and whether first order said so."""
    what = "the entropy" if result.observable in result.family else result.observable
    if result.change == 0:
        moved = f"leaves {what} at {result.before:.6g} {result.unit}"
    else:
        verb = "raises" if result.change > 0 else "lowers"
        share = f" ({abs(result.change / result.before):.2%})" if result.before else ""
        moved = f"{verb} {what} by {abs(result.change):.3g} {result.unit}{share}"
    return f"One step at lr {result.lr:g} {moved}. {_verdict(result)}{_as_stored(result)}"


def _as_stored(result: ProbeResult) -> str:
    """Say what the other of the two steps does, where storing θ′ sets it apart from θ + Δθ."""
    main = result.main
    if main.exact is None or main.stored is None or not is_stored_narrower(result):
        return ""
    value = main.stored if main.of_delta else main.exact
    who = f"As stored in {storage_of(result)} the step" if main.of_delta else "The exact update, unrounded,"
    verb = "raises" if value > 0 else "lowers"
    return f" {who} {f'{verb} it by {abs(value):.3g}' if value else 'leaves it where it is'}."


def _verdict(result: ProbeResult) -> str:
    if result.change == 0:
        return f"First order predicts {result.first_order:+.3g}."
    share = result.first_order / result.change
    if share < 0:
        return f"First order predicts the other direction: {result.first_order:+.3g}."
    if abs(share - 1) < 0.0005:
        return "First order predicts all of it."
    return f"First order predicts {share:.1%} of it."


def _context(result: ProbeResult) -> str:
    e, u = result.evaluation, result.update_batch
    return (
        f"E: {e.sequences} sequences, {e.tokens} tokens, {e.prompts} prompts\n"
        f"U: {u.sequences} sequences, {u.tokens} tokens, {u.prompts} prompts"
    )


def _numbers(result: ProbeResult) -> RenderableType:
    table = bare_table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in rows_of(result):
        weight = "bold" if name.startswith(("measured", "predicted")) else ""
        table.add_row(name, value, style=weight)
    return table


def _family(result: ProbeResult) -> RenderableType:
    table = bare_table(show_header=True)
    table.add_column("estimator", no_wrap=True)
    for heading in ("measured ΔF", "predicted δF₁", "δF₁/ΔF"):
        table.add_column(heading, justify="right", no_wrap=True)
    unit = None
    for name, estimate in result.family.items():
        integrand, weighting, per, *_ = name.split("/")
        if per != unit:
            table.add_row(f"nats per {per}", style="dim")
            unit = per
        slope = "" if estimate.first_order is None else f"{estimate.first_order:+.4e}"
        ratio = (
            ""
            if estimate.first_order is None or not estimate.change
            else f"{estimate.first_order / estimate.change:.4f}"
        )
        mark = "›" if name == result.observable else " "
        table.add_row(
            f"{mark} {WORDS[integrand]}, {WORDS[weighting]}",
            f"{estimate.change:+.4e}",
            slope,
            ratio,
            style="bold" if mark == "›" else "",
        )
    return table


def bare_table(**options: Any) -> Any:
    """Return a rich table without lines."""
    from rich.table import Table

    return Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", **options)


def cost_of(result: ProbeResult | SweepResult) -> str:
    """Return how the numbers were made: mode, precision, device, parameters, seconds."""
    place, seconds = result.environment, sum(result.timings.values())
    stored = f" stored in {storage_of(result)}" if is_stored_narrower(result) else ""
    return (
        f"First order in {result.mode} mode, {place.get('dtype', '')}{stored} on {place.get('device', '')}, "
        f"{place.get('parameters', 0):,} trainable parameters, {seconds:.1f} s"
    )
