"""The plain words and numbers of a sweep, for terminals, notebooks, titles and logs."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING

from funcprobe.measurement.readings import Reading, is_lost
from funcprobe.results.probe_words import is_stored_narrower, storage_of
from funcprobe.results.sweep_law import CLOSE, Law, close_at, law_of, remainder_fit, subtraction_error

if TYPE_CHECKING:
    from funcprobe.results.sweep import Fit, SweepResult

#: A step moves in proportion where its slope is within this much of the order that leads.
STRAIGHT = 0.05


def headline_of(sweep: SweepResult, name: str | None = None) -> str:
    """Return the answer in one sentence: in proportion to the learning rate or not, and how far first order reaches.

    Raises:
        InputError: If there is no such observable.
    """
    readings, law, what = sweep.readings(name), law_of(sweep, name), label_of(sweep, name)
    if law.fit is None:
        return _without_slope(sweep, name, law)
    inside = [(lr, r) for lr, r in zip(sweep.lrs, readings, strict=True) if lr <= law.up_to * (1 + 1e-9)]
    inside = [(lr, r) for lr, r in inside if not r.is_lost] or inside
    reach = f"From lr {lr_text(inside[0][0])} to {lr_text(inside[-1][0])}"
    moves = _moves([r.change for _, r in inside], law, fit_text(law.fit))
    vague = all(r.bars and r.bars["change"].low <= 0 <= r.bars["change"].high for _, r in inside)
    said = "; the interval of ΔF holds 0 at all of them" if vague else ""
    return f"{reach} {what} {moves}{said}; {_verdict(sweep, name, law)}."


def table_of(sweep: SweepResult, name: str | None = None) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return (headings, a row for every learning rate) of one observable, all of it text.

    The prediction is δF₁, or δF₂ for what has no first order; ESS is of the sequence weights, in sequences.

    Raises:
        InputError: If there is no such observable.
    """
    sign = "₁" if law_of(sweep, name).lead == 1 else "₂"
    rows: list[tuple[str, ...]] = []
    for point, reading in zip(sweep.points, sweep.readings(name), strict=True):
        predicted = reading.first_order if sign == "₁" else reading.second_order
        by = f"path ({reading.nodes})" if reading.method == "path" else reading.method
        said = (lr_text(point.lr), _change(reading), "" if predicted is None else f"{predicted:+.4e}")
        end = (by, f"{point.health.ess_sequence:.1f}")
        rows.append((*said, _share(predicted, reading.change), *_other(sweep, reading), *end))
    return ("lr", "ΔF", f"δF{sign}", f"δF{sign}/ΔF", *_other_heading(sweep), "by", "ESS"), rows


def remarks_of(sweep: SweepResult) -> list[str]:
    """Return what should be read below the tables, about the main observable: one line each."""
    return [
        *_errors(sweep),
        *_stored_apart(sweep),
        *_remainder(sweep),
        *_scale(sweep),
        *_lost(sweep),
        *_optimistic(sweep),
    ]


def context_of(sweep: SweepResult) -> str:
    """Return the sizes of both batches, in two lines."""
    e, u = sweep.evaluation, sweep.update_batch
    return (
        f"E: {e.sequences} sequences, {e.tokens} tokens, {e.prompts} prompts\n"
        f"U: {u.sequences} sequences, {u.tokens} tokens, {u.prompts} prompts"
    )


def summary_of(sweep: SweepResult) -> str:
    """Return the whole sweep as text: a sentence and a table for every observable, then what should be known."""
    parts = [headline_of(sweep), context_of(sweep), ""]
    for number, name in enumerate(sweep.observables):
        parts += [*([headline_of(sweep, name)] if number else []), caption_of(sweep, name), *_aligned(sweep, name), ""]
    return "\n".join([*parts, *remarks_of(sweep), *(f"Warning: {text}" for text in sweep.warnings)]).rstrip()


def html_of(sweep: SweepResult) -> str:
    """Return the whole sweep as HTML tables, for notebooks."""
    parts = [f"<p>{html.escape(headline_of(sweep))}</p>"]
    for name in sweep.observables:
        headings, rows = table_of(sweep, name)
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in headings)
        body = "".join(
            f"<tr>{''.join(f'<td><code>{html.escape(cell)}</code></td>' for cell in row)}</tr>" for row in rows
        )
        parts.append(f"<table><caption>{html.escape(caption_of(sweep, name))}</caption><tr>{head}</tr>{body}</table>")
    parts += [f"<p>{html.escape(text)}</p>" for text in remarks_of(sweep)]
    return "".join([*parts, *(f"<p><b>Warning.</b> {html.escape(text)}</p>" for text in sweep.warnings)])


def caption_of(sweep: SweepResult, name: str | None = None) -> str:
    """Return the name of an observable and its unit, once where they are one word.

    Raises:
        InputError: If there is no such observable.
    """
    what, unit = label_of(sweep, name).removeprefix("the "), sweep.readings(name)[0].unit
    return what if what == unit else f"{what}, {unit}"


def label_of(sweep: SweepResult, name: str | None = None) -> str:
    """Return what an observable is called within a sentence: "the entropy", or the name it was given.

    Raises:
        InputError: If there is no such observable.
    """
    reading = sweep.readings(name)[0]
    name = sweep.observables[0] if name is None else name
    member = reading.observable.split("/")[0] in ("rao_blackwell", "surprisal")
    return "the entropy" if member and name in ("entropy", reading.observable) else name


def lr_text(lr: float, digits: int = 3) -> str:
    """Return a learning rate in the shortest scientific form.

    Example:
        >>> lr_text(0.00031622), lr_text(1e-9), lr_text(0.00031461, 2)
        ('3.16e-4', '1e-9', '3.1e-4')
    """
    mantissa, exponent = f"{lr:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def fit_text(fit: Fit) -> str:
    """Return a slope with its error, as many digits as that leaves, and R²."""
    slope, error = fit.slope.value, fit.slope.error
    if not math.isfinite(error):
        return f"slope {slope:.4f}, R² {fit.r_squared:.6f}"
    digits = 6 if error == 0 else min(6, max(2, -math.floor(math.log10(error))))
    return f"slope {slope:.{digits}f} ± {error:.{digits}f}, R² {fit.r_squared:.6f}"


def _without_slope(sweep: SweepResult, name: str | None, law: Law) -> str:
    readings, what = sweep.readings(name), label_of(sweep, name)
    moved = [(lr, r) for lr, r in zip(sweep.lrs, readings, strict=True) if r.change and not r.is_lost]
    where = "every learning rate" if len(readings) > 1 else f"lr {lr_text(sweep.lrs[0])}"
    if not moved and any(r.is_lost for r in readings):
        return f"At {where} the change of {what} is lost in float error; {_verdict(sweep, name, law)}."
    if not moved:
        return f"At {where} {what} stays at {readings[0].before:.6g} {readings[0].unit}."
    lr, r = moved[-1]
    moves = f"{'rises' if r.change > 0 else 'falls'} by {abs(r.change):.3g} {r.unit}"
    said = f"first order predicts {r.first_order / r.change:.1%} of it, " if r.first_order else ""
    return (
        f"At lr {lr_text(lr)} {what} {moves} ({said}a slope needs two learning rates that move it); "
        f"{_verdict(sweep, name, law)}."
    )


def _moves(changes: list[float], law: Law, slope: str) -> str:
    """Say which way, and whether as straight as the order that leads."""
    assert law.fit is not None
    if min(changes) < 0 < max(changes):
        return f"changes its direction (|ΔF|: {slope})"
    verb = "rises" if max(changes) > 0 else "falls"
    how = ["in proportion to the learning rate", "with the square of the learning rate"][law.lead - 1]
    straight = abs(law.fit.slope.value - law.lead) <= STRAIGHT
    return f"{verb}{'' if straight else ', but not'} {how} ({slope})"


def _verdict(sweep: SweepResult, name: str | None, law: Law) -> str:
    """Say how far the leading order reaches: by the second order, or, without one, by what was found."""
    until = sweep.linear_until_lr(name) if law.lead == 1 else None
    if until is None:
        return _found_close(sweep, name, law)
    if math.isinf(until):
        return "its second order is 0"
    off = [
        (lr, r)
        for lr, r in zip(sweep.lrs, sweep.readings(name), strict=True)
        if lr <= until and r.nonlinearity > 2 * CLOSE
    ]
    if off:
        lr, r = off[-1]
        return (
            f"by its second order, first order is within 5 % up to lr {lr_text(until, 2)}, but it misses "
            f"{r.nonlinearity:.0%} at lr {lr_text(lr)}"
        )
    beside = ", below what was swept" if until < sweep.lrs[0] else ""
    beside = ", beyond what was swept" if until > sweep.lrs[-1] else beside
    return f"first order is within 5 % up to lr {lr_text(until, 2)}{beside}"


def _found_close(sweep: SweepResult, name: str | None, law: Law) -> str:
    order, close, count = ["first", "second"][law.lead - 1], close_at(sweep, name), len(sweep.lrs)
    if law.lead == 2 and all(r.second_order is None for r in sweep.readings(name)):
        return "its first order is 0, and the second was not asked for"
    if all(r.is_lost for r in sweep.readings(name)):
        return f"how close {order} order is to it cannot be told"
    if len(close) == count:
        return f"{order} order is within 5 % of it at every learning rate"
    if not close:
        return f"{order} order is within 5 % of it at no learning rate"
    return f"{order} order is within 5 % of it at {len(close)} of {count} learning rates, up to lr {lr_text(close[-1])}"


def _apart(sweep: SweepResult) -> list[Reading]:
    """Return the readings whose θ′ as stored is another step than θ + Δθ, where a run stores what it computes wider."""
    if not is_stored_narrower(sweep):
        return []
    return [r for point in sweep.points for r in point.readings.values() if r.stored is not None]


def _other_heading(sweep: SweepResult) -> tuple[str, ...]:
    """Return the name of the column beside ΔF, where there are two of them."""
    apart = _apart(sweep)
    if not apart:
        return ()
    return (f"as stored in {storage_of(sweep)}",) if apart[0].of_delta else ("exact update",)


def _other(sweep: SweepResult, reading: Reading) -> tuple[str, ...]:
    if not _apart(sweep):
        return ()
    value = reading.stored if reading.of_delta else reading.exact
    return ("" if value is None else f"{value:+.4e}",)


def _stored_apart(sweep: SweepResult) -> list[str]:
    apart = [p for p, r in zip(sweep.points, sweep.readings(), strict=True) if r.stored is not None]
    if not apart:
        return []
    what = "the exact update" if apart[0].readings[sweep.observables[0]].of_delta else "θ′ as stored"
    low, high = min(p.rounding_ratio for p in apart), max(p.rounding_ratio for p in apart)
    return [
        f"ΔF is that of {what}: at {len(apart)} of {len(sweep.points)} learning rates, up to lr "
        f"{lr_text(apart[-1].lr)}, storing θ′ in {storage_of(sweep)} loses {low:.0%} to {high:.0%} of ‖Δθ‖."
    ]


def _change(reading: Reading) -> str:
    found = reading.bars.get("change")
    bar = "" if found is None else f" ± {found.error:.1e}{'*' if reading.caveats else ''}"
    return f"{reading.change:+.4e}{bar}{' (lost)' if reading.is_lost else ''}"


def _share(predicted: float | None, change: float) -> str:
    if predicted is None or not change:
        return ""
    share = predicted / change
    return f"{share:.4f}" if share == 0 or 1e-3 <= abs(share) < 1e3 else f"{share:.1e}"


def _aligned(sweep: SweepResult, name: str) -> list[str]:
    headings, rows = table_of(sweep, name)
    widths = [max(len(cell) for cell in column) for column in zip(headings, *rows, strict=True)]
    return ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in (headings, *rows)]


def _errors(sweep: SweepResult) -> list[str]:
    found = any(reading.bars for point in sweep.points for reading in point.readings.values())
    return [f"± is one standard error over {sweep.evaluation.prompts} prompts."] if found else []


def _remainder(sweep: SweepResult) -> list[str]:
    fit = remainder_fit(sweep) if law_of(sweep).lead == 1 else None
    if fit is None:
        return []
    return [f"Remainder ΔF − δF₁: {fit_text(fit)}, from {fit.points} learning rates; 2 is where second order leads."]


def _scale(sweep: SweepResult) -> list[str]:
    up_to = law_of(sweep).up_to * (1 + 1e-9)
    known = [lr for lr, r in zip(sweep.lrs, sweep.readings(), strict=True) if not r.is_lost]
    inside = [lr for lr in known if lr <= up_to] or known
    if len(inside) < 2:
        return []
    low, high = inside[0], inside[-1]
    found = sweep.scale_check(low, high)
    growths = {"‖Δθ‖": found.delta_norm, "δF₁": found.first_order, "ΔF": found.change}
    said = ", ".join(f"{what} {growth / found.lr:.4f}" for what, growth in growths.items() if math.isfinite(growth))
    return [f"Scale check, lr {lr_text(low)} to {lr_text(high)}, growth as a multiple of the learning rate's: {said}."]


def _lost(sweep: SweepResult) -> list[str]:
    readings = sweep.readings()
    if _apart(sweep):
        return []  # subtractions were made at θ′ as stored, which is another step
    if all(subtraction_error(r) is None for r in readings):  # a sweep by an older version
        unknown = sweep.mode == "reverse"
        return ["In reverse mode ΔF is a subtraction, whose float error is not estimated."] if unknown else []
    lost = [lr for lr, r in zip(sweep.lrs, readings, strict=True) if is_lost(r.change, subtraction_error(r))]
    if not lost:
        return []
    where = f"{len(lost)} of {len(readings)} learning rates, up to lr {lr_text(lost[-1])}"
    return [f"Subtracting two evaluations is off by more than 10 % of ΔF at {where}."]


def _optimistic(sweep: SweepResult) -> list[str]:
    found: dict[str, list[float]] = {}
    for point in sweep.points:
        for text in dict.fromkeys(caveat for r in point.readings.values() for caveat in r.caveats):
            found.setdefault(text, []).append(point.lr)
    return [f"* Error bar optimistic from lr {lr_text(lrs[0])}: {text}." for text, lrs in found.items()]
