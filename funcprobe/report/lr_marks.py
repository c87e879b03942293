"""How the numbers of a sweep are drawn: triangles with intervals, rings, and crosses where float error ate them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from funcprobe.estimators.uncertainty import Bar
from funcprobe.measurement.readings import Reading, is_lost
from funcprobe.results.curve import Curve
from funcprobe.results.sweep_law import subtraction_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Dark for what was measured, so that it stands out from the lines in grey as well.
_INK, _LIGHT = "#1b2a49", "#d9dde6"


class Mark(NamedTuple):
    """One number in a figure, drawn by its size."""

    lr: float
    value: float
    method: str  #: "path", "values" or "difference"
    bar: Bar | None  #: its interval over prompts
    optimistic: bool  #: which is known to be too narrow
    lost: bool  #: the value is, to float error

    @property
    def low(self) -> float:
        """The lower end of the interval of |value|: 0 where the interval holds 0, |value| without one."""
        if self.bar is None:
            return abs(self.value)
        return 0.0 if self.bar.low <= 0 <= self.bar.high else min(abs(self.bar.low), abs(self.bar.high))

    @property
    def high(self) -> float:
        """The upper end."""
        return abs(self.value) if self.bar is None else max(abs(self.bar.low), abs(self.bar.high))


def marks_of(sweep: Curve, name: str | None, what: str) -> list[Mark]:
    """Return the "change" or the "remainder" of an observable at every learning rate.

    Raises:
        InputError: If there is no such observable.
    """
    marks = []
    for lr, r in zip(sweep.lrs, sweep.readings(name), strict=True):
        value, lost = getattr(r, what), is_lost(getattr(r, what), r.float_error)
        marks.append(Mark(lr, value, r.method, r.bars.get(what), bool(r.caveats), lost))
    return marks


def draw_marks(ax: Axes, marks: list[Mark], what: str) -> None:
    """Draw the numbers with their intervals, one kind of mark for every sign and method."""
    for method in ("path", "values", "difference"):
        for sign, (word, shape) in {1: ("> 0", "^"), -1: ("< 0", "v"), 0: ("= 0 (at the edge)", "_")}.items():
            some = [m for m in marks if m.method == method and np.sign(m.value) == sign]
            if some:
                face = _LIGHT if method == "difference" else _INK
                label = f"{what} {word}, by {method}"
                style: dict[str, Any] = {"color": _INK, "markerfacecolor": face, "markersize": 7, "zorder": 4}
                ax.plot([m.lr for m in some], _inside(ax, [m.value for m in some]), shape, label=label, **style)
    seen = [m for m in marks if m.bar is not None and m.high > ax.get_ylim()[0]]
    for optimistic in (False, True):
        some = [m for m in seen if m.optimistic == optimistic]
        if some:
            _bars(ax, some, "--" if optimistic else "-")


def _bars(ax: Axes, marks: list[Mark], dash: Literal["-", "--"]) -> None:
    bottom, top = ax.get_ylim()
    # an end at 0 or at infinity leaves the frame
    ends = [(max(m.low, bottom / 10), min(m.high, top * 10)) for m in marks]
    level = next(m.bar.level for m in marks if m.bar is not None)
    label = f"{100 * level:g} % interval over prompts" + (",\noptimistic" if dash == "--" else "")
    label += ",\nto the edge where it holds 0" if any(m.low == 0 for m in marks) else ""
    reach = [[0.0] * len(ends), [high - low for low, high in ends]]
    style: dict[str, Any] = {"color": _INK, "elinewidth": 1.2, "capsize": 3, "zorder": 3}
    drawn = ax.errorbar([m.lr for m in marks], [low for low, _ in ends], yerr=reach, fmt="none", label=label, **style)
    drawn.lines[2][0].set_linestyle(dash)


def draw_rings(ax: Axes, rings: list[tuple[float, Reading]], dtype: str) -> None:
    """Draw the subtraction of two evaluations, where one was made, as rings."""
    some = [(lr, r.subtraction) for lr, r in rings if r.subtraction is not None]
    if some:
        y = _inside(ax, [value for _, value in some])
        style: dict[str, Any] = {
            "color": _INK,
            "markerfacecolor": "none",
            "markersize": 11,
            "clip_on": False,
            "zorder": 5,
        }
        ax.plot([lr for lr, _ in some], y, "o", label=f"{dtype} subtraction", **style)


def draw_beside(ax: Axes, values: list[tuple[float, float]], label: str) -> None:
    """Draw the other of two steps, where storing θ′ sets them apart, as squares."""
    if values:
        y = _inside(ax, [value for _, value in values])
        style: dict[str, Any] = {
            "color": _INK,
            "markerfacecolor": "none",
            "markersize": 7,
            "clip_on": False,
            "zorder": 5,
        }
        ax.plot([lr for lr, _ in values], y, "s", label=label, **style)


def draw_crosses(ax: Axes, marks: list[Mark], rings: list[tuple[float, Reading]], more: str = "") -> None:
    """Cross points of which float error holds more than a tenth, and rings that are so far off their number."""
    lost = [(m.lr, m.value) for m in marks if m.lost]
    lost += [(lr, r.subtraction or 0.0) for lr, r in rings if is_lost(r.change, subtraction_error(r))]
    if lost:
        y = _inside(ax, [value for _, value in lost])
        style: dict[str, Any] = {
            "color": "black",
            "markersize": 8,
            "markeredgewidth": 1.6,
            "clip_on": False,
            "zorder": 6,
        }
        ax.plot([lr for lr, _ in lost], y, "x", label=f"float error above 10 %{more}", **style)


def _inside(ax: Axes, values: list[float]) -> list[float]:
    """Return sizes for a log scale; a size below the frame lies on its lower edge."""
    return [max(abs(value), ax.get_ylim()[0]) for value in values]
