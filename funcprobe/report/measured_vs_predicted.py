"""The figure of a probe: every estimator's measured change against its predicted one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from funcprobe.report.canvas import legend_outside, new_axes
from funcprobe.results.probe import ProbeResult
from funcprobe.results.probe_words import WORDS, step_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Dark and light, so that the two normalisations differ in grey as well.
_COLOURS = {"token": "#1b2a49", "sequence": "#e08a1e"}
_MARKERS = {"rao_blackwell": "o", "surprisal": "s"}


class Point(NamedTuple):
    """One estimator in the figure: both changes as a fraction of |F(θ)|."""

    name: str
    measured: float
    predicted: float


def plot_measured_vs_predicted(result: ProbeResult, ax: Axes | None = None) -> Axes:
    """Draw measured ΔF against predicted δF₁ for every estimator of the result; on the dashed line the step is linear.

    Nats per token and nats per sequence do not share a scale, so both axes show the change relative to the same
    estimator's |F(θ)|, in percent or, far from that, in a power of ten. The estimator that was asked for is ringed, and
    the title gives its values in its own unit. Members without a first order (all others in reverse mode) are left out.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    ax = new_axes() if ax is None else ax
    main, others = points(result)
    shown = [*others, main]
    scale, unit = _scale(max(max(abs(p.measured), abs(p.predicted)) for p in shown))
    low, high = limits([c * scale for p in shown for c in (p.measured, p.predicted)])
    ax.plot([low, high], [low, high], "--", color="0.45", linewidth=1, zorder=1, label="linear: ΔF = δF₁")
    for place in (ax.axhline, ax.axvline):
        place(0, color="0.85", linewidth=0.8, zorder=0)
    _draw(ax, main, scale, ringed=True)
    for p in others:
        _draw(ax, p, scale, ringed=False)
    ax.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    ax.locator_params(nbins=6)  # labels of narrow limits are long
    ax.ticklabel_format(useOffset=False)
    ax.set_xlabel(f"predicted δF₁, {unit} |F(θ)|")
    ax.set_ylabel(f"measured ΔF, {unit} |F(θ)|")
    values = f"ΔF = {result.change:+.3e}, δF₁ = {result.first_order:+.3e} {result.unit}".replace("-", "−")
    ax.set_title(f"{step_of(result.outcome)}\n{values}", fontsize=10, loc="left")
    legend_outside(ax)
    return ax


def points(result: ProbeResult) -> tuple[Point, list[Point]]:
    """Return the estimator that was asked for, and the other members of the family that have a first order."""
    main = _point(result.observable, result.change, result.first_order, result.before)
    twin = result.family.get(result.observable)
    same = twin is not None and twin.change == result.change
    return main, [
        _point(name, e.change, e.first_order, e.before)
        for name, e in result.family.items()
        if e.first_order is not None and not (same and name == result.observable)
    ]


def _point(name: str, change: float, first_order: float, before: float) -> Point:
    scale = abs(before) or 1.0
    return Point(name, change / scale, first_order / scale)


def _draw(ax: Axes, point: Point, scale: float, *, ringed: bool) -> None:
    integrand, weighting, per = (*point.name.split("/"), "", "")[:3]
    colour = _COLOURS.get(per, "black")
    x, y = point.predicted * scale, point.measured * scale
    if ringed:
        ax.plot([x], [y], "o", markersize=19, markerfacecolor="none", markeredgecolor=colour, zorder=5)
    ax.plot(
        [x],
        [y],
        _MARKERS.get(integrand, "D"),
        color=colour,
        markerfacecolor="white" if weighting == "sequence" else colour,
        markeredgewidth=1.4,
        markersize=10 if per == "sequence" else 6,  # of two that coincide, the smaller lies on top
        linestyle="none",
        zorder=2 if per == "sequence" else 3,
        label=_label(point.name) + (" (ringed)" if ringed else ""),
    )


def _label(name: str) -> str:
    integrand, *rest = name.split("/")
    if len(rest) < 2:
        return name
    proposal = f", against the {rest[2]}" if len(rest) > 2 else ""
    return f"{WORDS.get(integrand, integrand)}, {WORDS.get(rest[0], rest[0])}, per {rest[1]}{proposal}"


def _scale(largest: float) -> tuple[float, str]:
    """Return the factor of fractions, and the name of that unit on an axis."""
    if largest == 0 or 1e-4 <= largest < 10:
        return 100.0, "% of"
    exponent = math.floor(math.log10(largest))
    return 10.0**-exponent, f"10$^{{{exponent}}}$"


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Return limits shared by both axes, holding every value with a margin.

    The origin is held too where it is no further off than the values are from each other: beyond that they would huddle
    in a corner. One value alone lies halfway between the origin and the end.
    """
    low, high = min(values), max(values)
    if low == high:
        reach = abs(low) or 1.0
        return low - reach, high + reach
    if max(low, -high) <= high - low:
        low, high = min(0.0, low), max(0.0, high)
    margin = 0.12 * (high - low)
    return low - margin, high + margin
