"""The words of a run's books: who moved the entropy, whether the books close, which windows did most."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from funcprobe.errors import percent
from funcprobe.results.blocks import Block, Column, Figure, Remark, Row, Sentence, Table
from funcprobe.results.ledger_sums import Closing, Sums
from funcprobe.results.window import Window
from funcprobe.results.words import counted

#: Windows, tokens and prompts that a text shows.
SHOWN = 3

#: Steps that are off by more from our own are said to be others: rounding of kernels is a thousandth of it.
OTHER_STEP = 1e-3


def blocks_of(books: Sums) -> Iterator[Block]:
    """Yield the blocks of a run's books, the answer first."""
    if not books.windows:
        yield Sentence("No window is in the books yet: one closes when the second generation of rollouts arrives.")
        yield from _remarks(books)
        return
    yield Sentence(_headline(books), "strong")
    yield Sentence(_sizes(books.windows), "quiet")
    yield _split(books)
    yield Figure("ledger")
    for closing in books.closing.values():
        yield Sentence(_closing(closing, _unit(books.windows, closing.observable)))
    yield _most(books)
    for window in books.most(SHOWN):
        yield from opened_blocks(window)
    yield from _remarks(books)


def _headline(books: Sums) -> str:
    total, main = books.total(), books.windows[0].main
    steps = f"Over {_steps(books.windows)}"
    if not total.change:
        return f"{steps} {books.main} did not move."
    verb = "rose" if total.change > 0 else "fell"
    bar = f" ± {total.error:.1g}" if math.isfinite(total.error) else ""
    name, part = max(books.split.items(), key=lambda item: abs(item[1]))
    return (
        f"{steps} {books.main} {verb} by {abs(total.change):.4g}{bar} {main.unit}. The largest part is "
        f"{_sentence(name)}: {part:+.4g} ({percent(part / total.change, 0)} of it)."
    )


def _steps(windows: Sequence[Window]) -> str:
    count = sum(window.last - window.first + 1 for window in windows)
    return f"{count} optimizer steps in {len(windows)} windows"


def _sizes(windows: Sequence[Window]) -> str:
    seconds = math.fsum(window.seconds for window in windows)
    return f"E of the last window: {counted(windows[-1].evaluation)}. The ledger took {seconds:.1f} s of the run."


def _split(books: Sums) -> Table:
    total, main = books.total(), books.windows[0].main
    rows = [Row((_sentence(name), f"{value:+.6e}", _share(value, total.change))) for name, value in books.split.items()]
    bar = f" ± {total.error:.1e}" if math.isfinite(total.error) else ""
    whole = Row(("measured  Σ ΔF", f"{total.change:+.6e}{bar}", _share(total.change, total.change)), "strong")
    columns = (Column(), Column("sum", "right"), Column("of ΔF", "right"))
    return Table(columns, (whole, *rows), f"{books.main} ({main.observable}), {main.unit}, summed over windows")


def _sentence(name: str) -> str:
    words = {"steps": "the steps, whose parts are not known", "remainder": "remainder, of second order and above"}
    return words.get(name, name)


def _share(value: float, whole: float) -> str:
    return percent(value / whole, 1) if whole else ""


def _closing(closing: Closing, unit: str) -> str:
    within = abs(closing.error) / closing.error_bar if closing.error_bar else math.inf
    seen = f"{closing.seen:+.4e} ± {closing.seen_error:.1e} {unit}"
    where = f"from step {closing.start.step} to {closing.end.step}"
    told = (
        f"The books of {closing.observable}: the windows sum to {closing.total.change:+.4e} ± "
        f"{closing.total.error:.1e}; {where} the values at its ends differ by {seen}. Closing error "
        f"{closing.error:+.1e}, {within:.1f} standard errors"
    )
    missing = f"; {closing.missing} steps in between are in no window" if closing.missing else ""
    return f"{told}{missing}."


def _most(books: Sums) -> Table:
    columns = ("steps", "ΔF", "gradient on U", "momentum", "weight decay", "remainder", "lr", "ESS")
    rows = tuple(Row(_cells(window)) for window in books.most(SHOWN))
    made = (Column(columns[0]), *(Column(name, "right") for name in columns[1:]))
    return Table(made, rows, "the windows in which it moved most")


def _cells(window: Window) -> tuple[str, ...]:
    parts = [window.split.get(name) for name in ("gradient on U", "momentum", "weight decay")]
    bar = f" ± {window.error:.0e}" if math.isfinite(window.error) else ""
    ess = window.health.ess_prefix_min / window.health.ess_base
    return (
        f"{window.first}–{window.last}" if window.last > window.first else f"{window.first}",
        f"{window.main.change:+.2e}{bar}",
        *("" if part is None else f"{part:+.2e}" for part in parts),
        f"{window.remainder:+.2e}",
        "" if window.lr is None else f"{window.lr:.3g}",
        percent(ess, 0),
    )


def opened_blocks(window: Window) -> Iterator[Block]:
    """Yield the largest prompts and tokens of the steps that were opened."""
    for opened in window.opened:
        clipped = "" if not opened.clipped else f"; {percent(opened.clipped)} of its tokens were clipped"
        caption = f"step {opened.step}: tokens of U that did most, of {opened.whole:+.2e} in all{clipped}"
        largest = sorted(opened.tokens, key=lambda token: -abs(token.contribution))[: 2 * SHOWN]
        rows = tuple(
            Row(
                (
                    f"{token.contribution:+.2e}",
                    f"sequence {token.sequence}, position {token.position}",
                    token.text,
                    "" if token.advantage is None else f"{token.advantage:+.2f}",
                )
            )
            for token in largest
        )
        columns = (
            Column("share", "right"),
            Column("where"),
            Column("token", narrow="cut"),
            Column("advantage", "right"),
        )
        yield Table(columns, rows, caption)


def _unit(windows: Sequence[Window], name: str) -> str:
    return next((w.readings[name].unit for w in windows if name in w.readings), "")


def _remarks(books: Sums) -> Iterator[Remark]:
    """Yield the cautions beside the numbers: steps in no window, steps that are not ours, warnings."""
    for lost in books.lost[:SHOWN]:
        yield Remark("warning", f"Steps {lost.first} to {lost.last} are in no window: {lost.reason}")
    if len(books.lost) > SHOWN:
        yield Remark("warning", f"{len(books.lost) - SHOWN} more stretches of steps are in no window.")
    if others := [window for window in books.windows if window.mismatch > OTHER_STEP]:
        worst = max(window.mismatch for window in others)
        yield Remark(
            "warning",
            f"In {len(others)} windows (such as that of step {others[0].first}) the trainer's step is another than the "
            f"optimizer's of its gradient, by up to {percent(worst)} of a leaf's step; the parts are those of ours, "
            "and what is left stands under rounding and rest.",
        )
    for text, count in _repeated(books.windows).items():
        yield Remark("warning", f"{text} (in {count} of {len(books.windows)} windows)" if count > 1 else text)


def _repeated(windows: Sequence[Window]) -> Mapping[str, int]:
    """Return the first warning of every kind, with the number of windows that have one of it."""
    first: dict[str, str] = {}
    count: dict[str, int] = {}
    for window in windows:
        for note in {note.kind: note for note in window.warnings}.values():
            first.setdefault(note.kind, str(note).rstrip("."))
            count[note.kind] = count.get(note.kind, 0) + 1
    return {first[kind]: count[kind] for kind in first}
