"""Figures of a sweep: the measured change at every learning rate, and the straight lines of theory through it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from funcprobe.report.canvas import legend_outside, new_axes
from funcprobe.report.lr_marks import Mark, draw_beside, draw_crosses, draw_marks, draw_rings, marks_of
from funcprobe.results.curve import Curve, Fit
from funcprobe.results.sweep_law import law_of, remainder_fit
from funcprobe.results.sweep_words import fit_text, label_of, lr_text
from funcprobe.results.words import is_stored_narrower, storage_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Of the lines: lighter than what was measured, in grey as well.
_GREY = "0.35"

#: Learning rates at which a line is drawn: a dip between two of them would be lost.
_STEPS = 801

#: The crossover is shown where it is at most so many times the largest learning rate.
_NEAR = 30.0


def plot_sweep(sweep: Curve, name: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw |ΔF| against the learning rate, both on log scales, with first- and second-order predictions.

    Triangles are measured, upward where ΔF > 0, dark where by a path or a curve through values and light where by
    difference, with their intervals over prompts (dashed where known to be optimistic, down to the lower edge where
    they hold 0). Rings are the subtraction of two evaluations where a path was used instead; crossed is what float
    error holds more than a tenth of. Squares are θ′ as stored in a narrower dtype, where that is another step than
    θ + Δθ. δF₁ goes with η and δF₂ with η². Upright lines stand where first order ends to be within 5 %, and where
    |δF₂| = |δF₁|. The title gives the slope of the line through log |ΔF| and its R², over the learning rates of
    `law_of`.

    Raises:
        InputError: If there is no such observable.
        MissingExtraError: If matplotlib is not installed.
    """
    readings, law = sweep.readings(name), law_of(sweep, name)
    ax = new_axes() if ax is None else ax
    marks = marks_of(sweep, name, "change")
    narrower, each = is_stored_narrower(sweep.provenance), list(zip(sweep.lrs, readings, strict=True))
    rings = [] if narrower else [(lr, r) for lr, r in each if r.method == "path"]
    others = [(lr, r.stored if r.of_delta else r.exact) for lr, r in each if narrower]
    beside = [(lr, value) for lr, value in others if value is not None]
    span = _span(sweep, name)
    _frame(ax, span, marks, [r.subtraction for _, r in rings if r.subtraction is not None] + [v for _, v in beside])
    _predictions(ax, sweep, name, span)
    draw_marks(ax, marks, "ΔF")
    draw_rings(ax, rings, str(sweep.provenance.environment.get("dtype", "float")))
    draw_beside(ax, beside, f"as stored in {storage_of(sweep.provenance)}" if readings[0].of_delta else "exact update")
    draw_crosses(ax, marks, rings)
    _ends(ax, sweep, name)
    _words(ax, sweep, name, "|ΔF|", _slope(sweep, law.fit, law.up_to))
    return ax


def plot_remainder(sweep: Curve, name: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw |ΔF − δF₁| against the learning rate, both on log scales, with |δF₂| and a line of slope 2.

    Marks are as in `plot_sweep`. What is crossed takes no part in the slope that the title gives (see `remainder_fit`).

    Raises:
        InputError: If there is no such observable.
        MissingExtraError: If matplotlib is not installed.
    """
    ax = new_axes() if ax is None else ax
    marks, span = marks_of(sweep, name, "remainder"), _span(sweep, name)
    _frame(ax, span, marks, [])
    if sweep.readings(name)[0].second_order is not None:
        eta = _etas(span)
        second = np.abs(_scaled(sweep, name, eta, "second_order", 2))
        ax.plot(eta, second, "--", color=_GREY, linewidth=1.2, zorder=1, label="second order |δF₂|")
    _guide(ax, marks, span)
    draw_marks(ax, marks, "ΔF − δF₁")
    draw_crosses(ax, marks, [], ",\nnot in the slope")
    _words(ax, sweep, name, "|ΔF − δF₁|", _slope(sweep, remainder_fit(sweep, name), law_of(sweep, name).up_to))
    return ax


def _span(sweep: Curve, name: str | None) -> tuple[float, float]:
    """Return the learning rates that the figure shows, the crossover among them where it is near."""
    low, high = sweep.lrs[0], sweep.lrs[-1]
    crossover = sweep.crossover_lr(name)
    if crossover is not None and high < crossover <= _NEAR * high:
        high = crossover
    margin = max(1.5, (high / low) ** 0.04, math.sqrt(30 * low / high))  # a decade and a half at least
    return low / margin, high * margin


def _frame(ax: Axes, span: tuple[float, float], marks: list[Mark], others: list[float]) -> None:
    """Set scales and limits: numbers that float error left are inside, others and ends of intervals where not far."""
    firm = [m for m in marks if not m.lost] or marks
    sizes = [x for m in firm for x in (abs(m.value), m.high) if 0 < x < math.inf]
    low, high = (min(sizes), max(sizes)) if sizes else (0.1, 1.0)
    near = [abs(m.value) for m in marks if abs(m.value) > 1e-6 * low]
    near += [x for x in (*(m.low for m in marks), *map(abs, others)) if x > 1e-2 * low]
    low, high = min([low, *near]), max([high, *near])
    margin = max(2.0, (high / low) ** 0.06, math.sqrt(1000 * low / high))
    ax.set(xscale="log", yscale="log", xlim=span, ylim=(low / margin, high * margin))
    ax.grid(True, color="0.92", linewidth=0.6)
    ax.set_axisbelow(True)
    for axis in (ax.xaxis, ax.yaxis):  # both hold a power of ten; labels between those run into one another
        axis.set_minor_formatter("")
    if not sizes:
        ax.text(0.5, 0.5, "0 at every learning rate", transform=ax.transAxes, ha="center")


def _predictions(ax: Axes, sweep: Curve, name: str | None, span: tuple[float, float]) -> None:
    eta = _etas(span)
    first = _scaled(sweep, name, eta, "first_order", 1)
    if first.any():
        ax.plot(eta, np.abs(first), "--", color=_GREY, linewidth=1.2, zorder=1, label="first order |δF₁|")
    if sweep.readings(name)[0].second_order is not None:
        both = first + _scaled(sweep, name, eta, "second_order", 2)
        label = "first + second order\n|δF₁ + δF₂|" if first.any() else "second order |δF₂|"
        if both.any():
            ax.plot(eta, np.abs(both), "-", color=_GREY, linewidth=1.2, zorder=1, label=label)


def _scaled(sweep: Curve, name: str | None, eta: NDArray[np.float64], field: str, power: int) -> NDArray[np.float64]:
    """Return a prediction of order `power` at any learning rate: it is a multiple of ηᵖ, the same at every point."""
    multiples = [getattr(r, field) / lr**power for lr, r in zip(sweep.lrs, sweep.readings(name), strict=True)]
    # where an optimizer does not move in proportion to η, the multiple changes from point to point
    return eta**power * np.interp(np.log(eta), np.log(sweep.lrs), multiples)


def _guide(ax: Axes, marks: list[Mark], span: tuple[float, float]) -> None:
    """Draw a line of slope 2 above the number of the largest learning rate, where it hides nothing."""
    through = next((m for m in reversed(marks) if m.value and not m.lost), None)
    if through is not None:
        eta = _etas(span)
        y = 5 * abs(through.value) * (eta / through.lr) ** 2
        ax.plot(eta, y, ":", color="0.6", linewidth=1.2, zorder=1, label="slope 2, to compare")


def _ends(ax: Axes, sweep: Curve, name: str | None) -> None:
    """Draw upright lines where first order ends; one that is off the figure stands in the legend alone."""
    ends = {
        "linear within 5 % up to": (sweep.linear_until_lr(name), (0, (6, 2, 1, 2))),
        "crossover |δF₂| = |δF₁| at": (sweep.crossover_lr(name), (0, (1, 1.5))),
    }
    for what, (lr, dash) in ends.items():
        if lr is None or not 0 < lr < math.inf:
            continue
        low, high = ax.get_xlim()
        style: dict[str, Any] = {"color": "0.2", "linestyle": dash, "linewidth": 1.1, "zorder": 2}
        if low < lr < high:
            ax.axvline(lr, label=f"{what}\nη = {lr_text(lr, 2)}", **style)
        else:
            ax.plot([], [], label=f"{what}\nη = {lr_text(lr, 2)}, off the figure", **style)


def _slope(sweep: Curve, fit: Fit | None, up_to: float) -> str:
    if fit is None:
        return "a slope takes two learning rates"
    last = max(lr for lr in sweep.lrs if lr <= up_to * (1 + 1e-9))
    missing = "" if any(r.float_error is not None for r in sweep.readings()) else "\nfloat error not estimated"
    return f"{fit_text(fit)}, from {fit.points} learning rates up to {lr_text(last)}{missing}"


def _words(ax: Axes, sweep: Curve, name: str | None, symbol: str, slope: str) -> None:
    count, what = len(sweep.points), label_of(sweep, name).removeprefix("the ")
    what += "" if symbol == "|ΔF|" else ", beyond first order"
    steps = f"{count} learning rates" if count > 1 else f"lr {lr_text(sweep.lrs[0])}"
    ax.set_xlabel("learning rate η")
    ax.set_ylabel(f"{symbol}, {sweep.readings(name)[0].unit}")
    ax.set_title(f"One step at {steps}: {what}\n{slope}", fontsize=10, loc="left")
    legend_outside(ax, labelspacing=0.8)


def _etas(span: tuple[float, float]) -> NDArray[np.float64]:
    return np.geomspace(*span, _STEPS)
