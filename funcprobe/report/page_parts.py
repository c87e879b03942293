"""The common parts of pages that load nothing: their policy, and figures as addresses that hold the image."""

from __future__ import annotations

import base64
import io

from funcprobe.report.figures import draw
from funcprobe.report.heat_map import digest
from funcprobe.results.blocks import RIGHT, Figure
from funcprobe.results.result import Result


def policy_of(css: str) -> str:
    """Return the policy by which a browser uses a page's own style and images in it, and loads nothing.

    `as_html` sets numbers by a style at the cell, which is allowed by its own digest.
    """
    styles = f"style-src '{digest(css)}' 'unsafe-hashes' '{digest(RIGHT)}'"
    return f"default-src 'none'; {styles}; img-src data:"


def image_of(result: Result, figure: Figure) -> str:
    """Return a figure of a result as an address that holds a PNG.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    buffer = io.BytesIO()
    drawn = draw(result, figure).get_figure(root=True)
    assert drawn is not None  # Axes have one
    drawn.savefig(buffer, dpi=150, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
