"""`funcprobe sweep`: one gradient, many learning rates, a table and pictures; killed, it goes on from there."""

from __future__ import annotations

import math
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from funcprobe.analysis.sweep import check_lrs, sweep
from funcprobe.cli.command import Beside, Command, told
from funcprobe.cli.config import Config
from funcprobe.cli.options import Option
from funcprobe.cli.prepare import prepared
from funcprobe.cli.progress import Bars
from funcprobe.data.atomic import put_aside
from funcprobe.data.numbers import number, whole
from funcprobe.errors import FuncprobeWarning, InputError
from funcprobe.estimators.by_name import observable_names
from funcprobe.parallel.phases import phase
from funcprobe.parallel.world import world
from funcprobe.results.journal import OTHER_JOURNAL
from funcprobe.results.sweep import SweepResult

#: Learning rates of a sweep at most.
MOST = 10_000

S = TypeVar("S", bound=SweepResult)
T = TypeVar("T")

DESCRIPTION = """\
Do at many learning rates what `run` does at one: the gradient on U is taken
once, and a few derivatives on E serve all learning rates, where the optimizer
moves in proportion to them; else each costs a scoring pass. Shows where the
step is linear, and where that ends. Killed half-way, the same command goes on
from what was done."""

EPILOG = """\
example:
  funcprobe sweep config.yaml --lrs 1e-8:1e-4:9      # nine, spread by factors
  funcprobe sweep config.yaml --lrs 1e-6,2e-6,4e-6 --output my-sweep

The configuration is that of `run`, whose keys may be given here as well (see
`funcprobe run --help`); lr, rounding, top_k and keep_delta belong to a run and
are not looked at. Results go to OUTPUT-sweep."""


def parse_lrs(text: str) -> list[float]:
    """Return the learning rates in `FIRST:LAST:COUNT`, evenly spread by factors, or in a comma-separated list.

    Raises:
        InputError: If no sweep can be made of the rates.
        ValueError: If the text is neither.

    Example:
        >>> parse_lrs("1e-6, 3e-6")
        [1e-06, 3e-06]
    """
    if ":" not in text:
        lrs = [number(part) for part in text.split(",") if part.strip()]
    else:
        first, last, count = text.split(":")
        lrs = _spread(number(first), number(last), whole(count, 2, MOST))
    check_lrs(lrs)
    if len(lrs) > MOST:
        raise ValueError(f"at most {MOST} learning rates")
    return lrs


def _spread(first: float, last: float, count: int) -> list[float]:
    """Return `count` numbers between two, evenly spread by factors; decimal powers come out as they are written.

    Raises:
        ValueError: If there are no two ends.
        InputError: If one of them is no learning rate.
    """
    if count < 2:
        raise ValueError("a range has two ends at least")
    check_lrs([first, last])
    low, high = math.log10(first), math.log10(last)
    return [first, *(float(f"{10 ** (low + (high - low) * k / (count - 1)):.6g}") for k in range(1, count - 1)), last]


def journal_of(config: Config) -> Path:
    """Return the file beside the output in which finished learning rates are kept until all are done."""
    return config.output.with_name(f"{config.output.name}.unfinished.jsonl")


def with_journal(config: Config, measure: Callable[[Path], T]) -> T:
    """Return a measurement with the journal beside the output; forced, that of another sweep is put aside for it.

    Raises:
        InputError: If the journal is another sweep's, and not forced; or as `measure`.
    """
    journal = journal_of(config)
    try:
        return measure(journal)
    except InputError as error:
        if error.kind != OTHER_JOURNAL or not config.force:
            raise
    with phase("putting a journal aside"):
        aside = put_aside(journal) if world().is_first else journal
    warnings.warn(
        f"{journal.name} belonged to another sweep, or was damaged; it was kept as {aside.name}.",
        FuncprobeWarning,
        stacklevel=2,
    )
    return measure(journal)


def _do(config: Config, options: Namespace, bars: Bars) -> SweepResult:
    ready = prepared(config, bars)

    def measure(journal: Path) -> SweepResult:
        return sweep(
            ready.update,
            ready.evaluation,
            options.lrs,
            config.observables,
            chunk=options.chunk,
            journal=journal,
            progress=bars,
            **config.options("rounding", "top_k", "keep_delta"),
        )

    return with_journal(config, measure)


def save_csv(result: SweepResult, folder: Path) -> None:
    """Write the long form of the table."""
    result.to_frame().to_csv(folder / "sweep.csv", index=False)


#: Beside those of the first observable one of every other.
FIGURES = frozenset({"sweep", "remainder", *(f"sweep-{name}" for name in observable_names())})

LRS = Option(
    "lrs",
    "FIRST:LAST:COUNT",
    "the learning rates, or a list with commas",
    read=parse_lrs,
    expected=f"FIRST:LAST:COUNT, such as 1e-8:1e-4:9, or numbers and commas, at most {MOST:,}",
    required=True,
)
CHUNK = Option(
    "chunk",
    "N",
    "score N learning rates in one pass: pays with LoRA, takes N times the memory",
    default=1,
    read=lambda text: whole(text, 1, MOST),
    expected=f"how many learning rates go together, from 1 to {MOST:,}",
)

COMMAND = Command(
    name="sweep",
    description=DESCRIPTION,
    epilog=lambda: EPILOG,
    done="swept",
    do=_do,
    warned=told,
    options=(LRS, CHUNK),
    suffix="-sweep",
    figures=FIGURES,
    beside=(Beside(frozenset({"sweep.csv"}), save_csv),),
    unfinished=journal_of,
    when_interrupted="; the same command goes on from the learning rates that are done",
)
