"""The page of a diagnosis: one file that loads nothing, whole, with everything that it was given escaped."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from funcprobe.errors import InputError
from funcprobe.report.diagnosis_page import SHOWN, diagnosis_page, typeset
from funcprobe.results.diagnosis_rules import THRESHOLDS
from tests.cases.written_attribution import NASTY, attribution, nasty
from tests.cases.written_diagnosis import INFO, diagnosis
from tests.cases.written_probe import result, warned


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    found = diagnosis(warnings=warned("careful"), notes=warned("decided"))
    return diagnosis_page(found, tmp_path_factory.mktemp("page") / "page.html").read_text(encoding="utf-8")


def test_it_loads_nothing_and_runs_nothing(page: str) -> None:
    assert "<script" not in page
    assert "http" not in re.sub(r"http-equiv", "", page)
    assert re.search(r"default-src &#39;none&#39;; style-src &#39;sha256-", page)
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)


def test_every_question_has_its_answer_its_verdict_and_its_figures(page: str) -> None:
    found = diagnosis()
    for number, answer in enumerate(found.answers, 1):
        (section,) = re.findall(rf'<section id="q{number}">.*?</section>', page, re.DOTALL)
        text = html.unescape(section)
        assert f"{number}. {answer.question}" in text
        assert f">{answer.verdict}</span>" in text
        assert typeset(answer.sentence) in text
        assert typeset(answer.advice) in text
        assert page.count(f'href="#q{number}"') == 1
    assert page.count("data:image/png;base64,") == 5  # layers, prompts, the curve, differences of entropy and reward
    assert page.count("<mark>") == 2 * SHOWN


def test_rules_remarks_and_numbers_stand_below(page: str) -> None:
    text = html.unescape(page)
    for threshold in THRESHOLDS:
        assert f"<td>{threshold.name}</td><td>{threshold.value:g}</td>" in text
        assert threshold.meaning in text
    assert "careful" in text
    assert "decided" in text
    for title in ("The update, measured and predicted", "Its parts", "Other learning rates", "Its variants"):
        assert f"<h3>{title}</h3>" in page
    assert "no ratio is above 1.2, where clipping begins" in text


def test_what_is_not_known_leaves_its_figures_out(tmp_path: Path) -> None:
    bare = diagnosis(
        attribution=None, alone=result(), curve=None, largest=None, comparison=None, missing={"curve": "<b>no lr</b>"}
    )
    text = diagnosis_page(bare, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "data:image" not in text
    assert "<mark>" not in text
    assert "&lt;b&gt;no lr&lt;/b&gt;" in text
    assert text.count("verdict unknown") >= 4


def test_hostile_text_is_text(tmp_path: Path) -> None:
    parts = attribution((15,) * 6, vocabulary=nasty(), words=len(NASTY), hole=True, info=INFO)
    odd = diagnosis(attribution=parts, left_out={"<i>": "<script>alert(1)</script>"}, warnings=warned(NASTY[0]))
    text = diagnosis_page(odd, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "</style></article>" not in text
    assert "{{" not in text or "7*7" in text
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_a_page_has_a_place_to_stand(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        diagnosis_page(diagnosis(), tmp_path / "nowhere" / "page.html")


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("-1.2e-04 ± 2.0e-05", "−1.2e−04 ± 2.0e−05"),
        ("clip-higher at lr 1e-6", "clip-higher at lr 1e−6"),
        ("gpt-2, 2-3, x-1", "gpt-2, 2-3, x-1"),
        ("(reward -7e-04)", "(reward −7e−04)"),
        ("2.4 % of it", "2.4\u00a0% of it"),
    ],
)
def test_lines_are_not_broken_within_numbers(text: str, typed: str) -> None:
    assert typeset(text) == typed
