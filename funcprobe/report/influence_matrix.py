"""The figure of the influence matrix: the effect of every sequence of U through every sequence or prompt of E."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from funcprobe.errors import InputError
from funcprobe.report.canvas import new_axes
from funcprobe.report.contributions import title
from funcprobe.results.parts import Parts

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_influence(attribution: Parts, ax: Axes | None = None) -> Axes:
    """Draw the influence matrix: the effect of every sequence of U through every sequence or prompt of E.

    Light raises and dark lowers, so that it reads in grey. Colours end at the largest hundredth of sizes, so that one
    entry does not pale all others.

    Raises:
        InputError: If there is no influence matrix.
        MissingExtraError: If matplotlib is not installed.
    """
    influence = attribution.influence
    if influence is None:
        raise InputError("This attribution has no influence matrix; call attribute(..., influence='prompts').")
    ax = new_axes() if ax is None else ax
    matrix = influence.matrix.numpy()
    sizes = np.abs(matrix)
    limit = float(np.quantile(sizes, 0.99, method="higher")) or 1.0
    image = ax.imshow(matrix, cmap="cividis", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    figure = ax.get_figure()
    assert figure is not None  # Axes have one
    bar = figure.colorbar(image, ax=ax, extend="both" if sizes.max() > limit else "neither")
    bar.set_label(f"contribution, {attribution.unit}")
    ax.set_xlabel("sequence of U")
    ax.set_ylabel(f"{influence.by[:-1]} of E")
    rows = influence.rows.tolist()
    places = range(0, len(rows), 1 + len(rows) // 12)
    ax.set_yticks(list(places), [str(rows[k]) for k in places])
    ax.locator_params(axis="x", integer=True)
    title(ax, attribution, f"by sequences of U on {influence.by} of E")
    return ax
