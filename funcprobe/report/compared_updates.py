"""The figure of a comparison: every update with its interval, or its difference from the first one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from funcprobe.errors import percent
from funcprobe.estimators.uncertainty import Bar
from funcprobe.report.canvas import legend_outside, new_axes
from funcprobe.results.comparison import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DARK, _LIGHT = "#1b2a49", "#e08a1e"


def plot_comparison(
    comparison: Comparison, observable: str | None = None, ax: Axes | None = None, *, differences: bool = False
) -> Axes:
    """Draw the effect of every update on an observable, by default the main one: ΔF with its interval, and δF₁.

    With `differences`, how much more each update changes it than the first one, paired by prompt: intervals that hold 0
    are hollow, because such a difference is not told from none.

    Raises:
        InputError: If there is no such observable.
        MissingExtraError: If matplotlib is not installed.
    """
    name = comparison.observables[0] if observable is None else observable
    reading = comparison.reading(comparison.baseline, name)
    ax = new_axes() if ax is None else ax
    updates = list(comparison.outcomes)[1:] if differences else list(comparison.outcomes)
    ax.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    for place, update in enumerate(updates):
        if differences:
            _draw(ax, place, comparison.difference(update, name))
            continue
        reading = comparison.reading(update, name)
        _draw(ax, place, reading.bars.get("change", Bar(reading.change, math.inf, -math.inf, math.inf)))
        if reading.first_order:
            ax.plot([reading.first_order], [place], "|", color=_LIGHT, markersize=16, markeredgewidth=2, zorder=4)
    ax.set_yticks(range(len(updates)), [update.replace("$", r"\$") for update in updates])
    ax.set_ylim(len(updates) - 0.5, -0.5)
    what = f"ΔF − that of '{comparison.baseline}'" if differences else "ΔF"
    unit = "" if reading.unit == name else f", {reading.unit}"
    ax.set_xlabel(f"{what}, {name}{unit}".replace("$", r"\$"))
    _legend(ax, comparison, differences)
    return ax


def _draw(ax: Axes, place: int, bar: Bar) -> None:
    excludes_0 = not (bar.low <= 0 <= bar.high) or math.isinf(bar.error)
    if math.isfinite(bar.error):
        ax.plot([bar.low, bar.high], [place, place], "-", color=_DARK, linewidth=1.6, zorder=2)
    ax.plot(
        [bar.value], [place], "o", color=_DARK, markerfacecolor=_DARK if excludes_0 else "white", markersize=7, zorder=3
    )


def _legend(ax: Axes, comparison: Comparison, differences: bool) -> None:
    interval = f"{percent(comparison.level, 0)} interval over prompts"
    ax.plot([], [], "o-", color=_DARK, label=f"measured, {interval}")
    ax.plot([], [], "o", color=_DARK, markerfacecolor="white", label="interval holds 0")
    if not differences:
        ax.plot([], [], "|", color=_LIGHT, markersize=12, markeredgewidth=2, label="first order δF₁")
    legend_outside(ax)
