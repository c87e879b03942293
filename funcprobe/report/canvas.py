"""The common parts of all figures: Axes without pyplot, a legend that covers no point, a file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from funcprobe.errors import InputError, missing_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def new_axes() -> Axes:
    """Return Axes on a figure of their own, which no pyplot state knows of.

    Raises:
        InputError: If its settings are none.
        MissingExtraError: If matplotlib is not installed.
    """
    try:
        with _unlogged("matplotlib"):  # of a home folder that cannot be written in
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
    except ImportError as error:
        missing = missing_extra("matplotlib", "app", "drawing a figure")
        raise missing from error
    except ValueError as error:  # a setting in the environment or in a matplotlibrc
        backend = os.environ.get("MPLBACKEND")
        named = f"MPLBACKEND is {backend!r:.60}" if backend else "its settings"
        raise InputError(f"matplotlib cannot be set up ({named}); unset it, or set MPLBACKEND=agg.") from error
    figure = Figure(figsize=(7.9, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.subplots()


@contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """Keep the warnings of a library's log off the terminal for a block."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def legend_outside(ax: Axes, **options: Any) -> None:
    """Put the legend to the right of the Axes, where it covers nothing."""
    ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=8, borderaxespad=0, **options)


def write(ax: Axes, path: str | os.PathLike[str]) -> None:
    """Write the figure of some Axes to an image file, in the format of its extension."""
    figure = ax.get_figure(root=True)
    assert figure is not None  # Axes have one
    figure.savefig(path, dpi=150)
