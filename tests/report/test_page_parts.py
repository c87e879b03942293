"""The common parts of pages: a policy that lets a page use its own style, and figures as data."""

from __future__ import annotations

import base64
import hashlib

from funcprobe.report.page_parts import image_of, policy_of
from funcprobe.results.blocks import Column, Figure, Row, Table, as_html
from tests.cases.written_sweep import sweep


def hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_policy_allows_the_page_and_the_style_of_a_number_and_nothing_else() -> None:
    policy = policy_of("p { margin: 0; }")
    assert policy.startswith("default-src 'none'; style-src ")
    assert hashed("p { margin: 0; }") in policy
    cell = as_html([Table((Column(side="right"),), (Row(("1",)),))])
    (style,) = [part.split("'")[0] for part in cell.split("style='")[1:]]
    assert hashed(style) in policy
    assert policy.endswith("; img-src data:")


def test_a_figure_is_a_png_within_its_address() -> None:
    head, data = image_of(sweep(), Figure("sweep")).split(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data).startswith(b"\x89PNG")
