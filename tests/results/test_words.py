"""The wording that all results share, in all that is rendered: percent, full stops, width."""

from __future__ import annotations

import re

import pytest

from funcprobe.errors import percent
from funcprobe.report.terminal import text_of
from funcprobe.results.blocks import WIDTH, Remark, as_html, as_text
from tests.cases.written_results import RESULTS


@pytest.mark.parametrize("kind", RESULTS)
def test_a_percent_sign_stands_apart_in_every_text(kind: str) -> None:
    blocks = RESULTS[kind].blocks()
    for text in (as_text(blocks), re.sub(r"(?s)<[^>]*>", "", as_html(blocks)), text_of(RESULTS[kind])):
        assert "%" in text or kind == "comparison"
        assert re.findall(r"\S%", text) == []


def test_percent() -> None:
    assert [percent(1.0161), percent(0.05, 0), percent(-0.5, 2)] == ["101.6 %", "5 %", "-50.00 %"]


@pytest.mark.parametrize("kind", RESULTS)
def test_no_line_of_a_summary_is_wider_than_the_text(kind: str) -> None:
    assert max(map(len, RESULTS[kind].summary().splitlines())) <= WIDTH


@pytest.mark.parametrize("kind", RESULTS)
def test_remarks_end_with_a_mark(kind: str) -> None:
    remarks = [line for line in text_of(RESULTS[kind], 1000).splitlines() if line.startswith(("Note", "Warning"))]
    assert len(remarks) >= len([block for block in RESULTS[kind].blocks() if isinstance(block, Remark)]) > 0
    assert all(line.endswith((".", "!", "?")) for line in remarks)
