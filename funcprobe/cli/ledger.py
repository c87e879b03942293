"""`funcprobe ledger`: the books of a run, from the lines that its ledger has written so far."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from funcprobe.cli.command import PlainCommand
from funcprobe.cli.options import Argument, Option
from funcprobe.data.atomic import fresh_directory
from funcprobe.data.paths import path_of
from funcprobe.report.figures import save_figures
from funcprobe.report.ledger_page import ledger_page
from funcprobe.report.terminal import print_result, text_of
from funcprobe.results.books import Books
from funcprobe.results.ledger_lines import FILE

DESCRIPTION = """\
Sum up the ledger of a run: how far the entropy moved over all windows, measured
on the rollouts that the run drew anyway, and how much of it was the gradient on
its batches, momentum, weight decay. A run in progress may be read at any time."""

EPILOG = """\
example:
  funcprobe ledger runs/grpo                 the text
  funcprobe ledger runs/grpo --output books  and a page, a figure, a table

RUN_DIR is the folder of the ledger (it holds ledger.jsonl), or one that holds
it as `ledger`: the output_dir of a TRL trainer with a LedgerCallback."""


def _call(given: Namespace) -> None:
    folder = path_of(given.run)
    inside = folder / "ledger"
    books = Books.read(inside if (inside / FILE).is_file() and not (folder / FILE).is_file() else folder)
    print_result(books)
    if given.output is None:
        return
    output = Path(given.output)
    with fresh_directory(output, overwrite=given.force) as fresh:
        books.write_into(fresh)
        save_figures(books, fresh)
        ledger_page(books, fresh / "ledger.html")
        books.to_frame().to_csv(fresh / "windows.csv", index=False)
        (fresh / "summary.txt").write_text(text_of(books), encoding="utf-8")
    print(f"Results: {output}")


COMMAND = PlainCommand(
    name="ledger",
    description=DESCRIPTION,
    call=_call,
    arguments=(Argument("run", "RUN_DIR", "the folder of a ledger, or of a run that keeps one"),),
    options=(
        Option("output", "DIR", "where page, figure and table are written (default: nowhere)"),
        Option("force", "", "replace DIR if an earlier command wrote it", default=False, flag=True),
    ),
    epilog=EPILOG,
)
