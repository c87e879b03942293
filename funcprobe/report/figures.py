"""Every figure of a result, by the name under which its blocks list it; drawn by the functions that stand beside."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funcprobe.errors import InputError
from funcprobe.report.canvas import write
from funcprobe.report.change_by_lr import plot_remainder, plot_sweep
from funcprobe.report.change_by_step import plot_ledger
from funcprobe.report.compared_updates import plot_comparison
from funcprobe.report.contributions import plot_kinds, plot_layers, plot_movers
from funcprobe.report.dropped_shares import plot_validation
from funcprobe.report.influence_matrix import plot_influence
from funcprobe.report.measured_vs_predicted import plot_measured_vs_predicted
from funcprobe.results.blocks import Figure
from funcprobe.results.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: How a figure is drawn: of (result, name of an observable or None).
_DRAWN: Mapping[str, Callable[[Any, str | None], Axes]] = {
    "measured_vs_predicted": lambda probe, _: plot_measured_vs_predicted(probe),
    "sweep": plot_sweep,
    "remainder": plot_remainder,
    "comparison": plot_comparison,
    "differences": lambda comparison, of: plot_comparison(comparison, of, differences=True),
    "layers": lambda attribution, _: plot_layers(attribution),
    "kinds": lambda attribution, _: plot_kinds(attribution),
    "tokens": lambda attribution, _: plot_movers(attribution, "tokens"),
    "prompts": lambda attribution, _: plot_movers(attribution, "prompts"),
    "ledger": lambda books, _: plot_ledger(books),
    "influence": lambda attribution, _: plot_influence(attribution),
    "validation": lambda validation, _: plot_validation(validation),
}


def draw(result: Result, figure: Figure) -> Axes:
    """Draw one of the figures among a result's blocks.

    Raises:
        InputError: If no figure has that name.
        MissingExtraError: If matplotlib is not installed.
    """
    if figure.name not in _DRAWN:
        raise InputError(f"There is no figure '{figure.name}'; the figures are {', '.join(_DRAWN)}.")
    return _DRAWN[figure.name](result, figure.of)


def save_figures(result: Result, folder: str | os.PathLike[str]) -> list[Path]:
    """Write every figure of a result as `NAME.png` into a folder, of further observables `NAME-OBSERVABLE.png`.

    In OBSERVABLE, what is no letter, digit, dot, dash or underscore becomes a dash.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    paths: list[Path] = []
    for block in result.blocks():
        if not isinstance(block, Figure):
            continue
        stem = block.name if block.of is None else re.sub(r"[^\w.-]+", "-", f"{block.name}-{block.of}")
        while Path(folder) / f"{stem}.png" in paths:  # two names that differ only in what a file name does not take
            stem += "-"
        paths.append(Path(folder) / f"{stem}.png")
        write(draw(result, block), paths[-1])
    return paths
