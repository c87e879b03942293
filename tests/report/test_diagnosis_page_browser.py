"""The page of a diagnosis in a real browser, `make browser`: it opens, reads in the dark and on a phone, and prints."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path
from typing import Any

import pytest

from funcprobe.report.diagnosis_page import diagnosis_page
from funcprobe.results.diagnosis import Diagnosis
from tests.cases.browser import Opened, requests
from tests.cases.written_attribution import NASTY, attribution, nasty
from tests.cases.written_diagnosis import INFO, diagnosis
from tests.cases.written_probe import warned

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Diagnosis]:
    """A page whose tokens are hostile."""
    parts = attribution((15,) * 6, vocabulary=nasty(), words=len(NASTY), hole=True, info=INFO)
    found = diagnosis(attribution=parts, warnings=warned(NASTY[0]))
    return diagnosis_page(found, tmp_path_factory.mktemp("hostile") / "page.html"), found


@pytest.fixture
def opened(driver: Any, hostile: tuple[Path, Diagnosis]) -> Opened:
    path, found = hostile
    driver.set_window_size(1200, 900)
    driver.get("about:blank")
    requests(driver)
    driver.get_log("browser")
    driver.get(path.as_uri())
    return Opened(driver, path, found)


def test_it_opens_without_a_word_in_the_console_and_asks_for_nothing(opened: Opened) -> None:
    assert opened("return document.title") == "What moved the entropy: a diagnosis"
    assert opened("return document.querySelectorAll('section[id^=q] h2').length") == len(opened.found.answers)
    assert opened("return [...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    assert opened("return document.images.length") == 5
    assert opened.driver.get_log("browser") == []
    asked = [url for url in requests(opened.driver) if not url.startswith(("data:", "chrome:"))]
    assert asked == [opened.path.as_uri()]


def test_numbers_stand_to_the_right_as_their_cells_ask(opened: Opened) -> None:
    """By a style at the cell, which the page's policy has to allow."""
    sides = "[...document.querySelectorAll('#behind td[style]')].map((c) => getComputedStyle(c).textAlign)"
    assert opened(f"return [...new Set({sides})]") == ["right"]


def test_a_question_leads_to_its_answer(opened: Opened) -> None:
    opened("document.querySelector('nav li:nth-child(4) a').click()")
    assert opened("return location.hash") == "#q4"
    assert opened("return Math.abs(document.getElementById('q4').getBoundingClientRect().top) < 50")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_the_light_and_in_the_dark(opened: Opened, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    opened.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    contrast = """
        const channel = (x) => (x /= 255) <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
        const light = (c) => c.match(/\\d+/g).slice(0, 3).map(Number).map(channel)
            .reduce((s, x, i) => s + x * [.2126, .7152, .0722][i], 0);
        const behind = (e) => { while (e && /, 0\\)$|transparent/.test(getComputedStyle(e).backgroundColor))
            e = e.parentElement; return getComputedStyle(e || document.body).backgroundColor; };
        return Math.min(...[...document.querySelectorAll('h1, h2, p, td, a, .verdict, .fact, .ask, mark')].map((e) => {
            const pair = [light(getComputedStyle(e).color), light(behind(e))].sort((a, b) => b - a);
            return (pair[0] + .05) / (pair[1] + .05);
        }))"""
    assert opened(contrast) >= 4.5  # WCAG 2 AA
    opened.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_on_a_phone_nothing_but_tables_scrolls_sideways(opened: Opened) -> None:
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    opened.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert opened("return document.documentElement.scrollWidth <= innerWidth")
    opened.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_prints_its_answers_and_the_rules(opened: Opened, tmp_path: Path) -> None:
    options = {"printBackground": True, "paperWidth": 8.27, "paperHeight": 11.69}
    printed = opened.driver.execute_cdp_cmd("Page.printToPDF", options)
    (tmp_path / "page.pdf").write_bytes(base64.b64decode(printed["data"]))
    done = subprocess.run(
        ["pdftotext", "-layout", str(tmp_path / "page.pdf"), "-"], capture_output=True, text=True, check=True
    )
    text = " ".join(done.stdout.split())
    for number, answer in enumerate(opened.found.answers, 1):
        assert f"{number}. {answer.question}" in text
        assert answer.verdict in text
    assert "The rules" in text
    assert "Every number behind the answers" in text
    assert "too_large" in text
