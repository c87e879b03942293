"""The figure of a validation: the effect of dropping the share that each method ranks lowest, or highest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from funcprobe.attribution.trials import ENDS
from funcprobe.errors import percent
from funcprobe.report.canvas import legend_outside, new_axes
from funcprobe.results.validation import Validation

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_validation(validation: Validation, ax: Axes | None = None) -> Axes:
    """Draw ΔF of the re-steps minus ΔF of the whole step against the share dropped: lowest solid, highest dashed.

    The band is random drops, two standard deviations of one draw on either side of their mean.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    ax = new_axes() if ax is None else ax
    places = range(len(validation.shares))
    low, high = ([c.mean + sign * 2 * c.sd for c in validation.chance] for sign in (-1, 1))
    ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    ax.fill_between(places, low, high, color="0.88", zorder=1, label="random, ± 2 sd")
    for number, method in enumerate(validation.methods):
        for end in ENDS:
            style = "o-" if end == "lowest" else "o--"
            effects = [validation.effect(method, end, share) for share in validation.shares]
            label = method if end == "lowest" else None
            ax.plot(places, effects, style, color=f"C{number}", markersize=4, linewidth=1.2, label=label)
    ax.set_xticks(places, [percent(share, 1) for share in validation.shares])
    ax.set_xlabel(f"share of {validation.dropped} dropped: ranked lowest (solid), highest (dashed)")
    ax.set_ylabel(f"change of Δ{validation.observable}".replace("$", r"\$"))
    legend_outside(ax)
    return ax
