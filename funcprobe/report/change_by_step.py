"""The figure of a ledger: who moved the entropy, summed over the steps of a run, and the sum as measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from funcprobe.report.canvas import legend_outside, new_axes
from funcprobe.results.ledger_sums import Sums

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Parts by their rows: told apart in grey as well, and by people who do not see red and green apart.
_COLOURS = {
    "gradient on U": "#2a6f97",
    "momentum": "#e08a1e",
    "weight decay": "#8d6a9f",
    "rounding and rest": "#4d4d4d",
    "steps": "#2a6f97",
    "remainder": "#bcbcbc",
}
_DARK = "#1b2a49"

#: Parts that are nowhere larger than this share of the largest would not be seen, and are left out.
SEEN = 2e-3


def plot_ledger(books: Sums, ax: Axes | None = None, *, logged: str | None = None) -> Axes:
    """Draw the parts of the first observable's change, summed from the first step on, in stacks over the steps.

    Parts that raise stand above 0 and parts that lower below it; their sum is the line, Σ ΔF as measured, between two
    standard errors either way. With `logged`, the name of a number that the trainer logs (such as "entropy"), its
    change since the first window is drawn beside: a difference of batch means.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    ax = new_axes() if ax is None else ax
    windows = books.windows
    steps = np.array([windows[0].first, *(window.last + 1 for window in windows)])
    names = list(dict.fromkeys(name for window in windows for name in (*window.split, "remainder")))
    each = {
        name: _summed([w.remainder if name == "remainder" else w.split.get(name, 0.0) for w in windows])
        for name in names
    }
    _stack(ax, steps, each)
    change = _summed([window.main.change for window in windows])
    error = np.sqrt(_summed([window.error**2 if math.isfinite(window.error) else 0.0 for window in windows]))
    ax.plot(steps, change, "-", color=_DARK, linewidth=1.8, zorder=4, label="measured")
    for side in (-2, 2):
        label = "± 2 standard errors" if side > 0 else None
        ax.plot(steps, change + side * error, "--", color=_DARK, linewidth=0.8, zorder=3, label=label)
    if logged is not None:
        _logged(ax, books, logged)
    ax.axhline(0, color="0.3", linewidth=0.8, zorder=2)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(f"change of {books.main} since the first step, {windows[0].main.unit}".replace("$", r"\$"))
    legend_outside(ax)
    return ax


def _summed(values: list[float]) -> NDArray[np.float64]:
    """Return the sums up to every step: 0 before the first."""
    return np.cumsum([0.0, *values])


def _stack(ax: Axes, steps: NDArray[np.float64], parts: dict[str, NDArray[np.float64]]) -> None:
    """Draw parts that raise as areas upward and those that lower downward, each on those before it."""
    up, down = np.zeros(len(steps)), np.zeros(len(steps))
    largest = max((float(np.abs(values).max()) for values in parts.values()), default=0.0)
    for name, values in parts.items():
        if float(np.abs(values).max()) < SEEN * largest:
            continue
        high, low = np.clip(values, 0, None), np.clip(values, None, 0)
        colour = _COLOURS.get(name, "#777777")
        ax.fill_between(steps, up, up + high, color=colour, linewidth=0, zorder=1, label=name)
        ax.fill_between(steps, down, down + low, color=colour, linewidth=0, zorder=1)
        up, down = up + high, down + low


def _logged(ax: Axes, books: Sums, name: str) -> None:
    """Draw a number that the trainer logged, at the steps at which it did."""
    found = [(window.last + 1, window.trainer[name]) for window in books.windows if name in window.trainer]
    if found:
        steps, values = zip(*found, strict=True)
        label = f"logged {name}, since the first".replace("$", r"\$")
        ax.plot(steps, np.array(values) - values[0], ".", color="#b5192b", markersize=4, zorder=5, label=label)
