"""The token heat map as a file: every token once, with its colour and numbers; text is text; nothing is loaded."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from funcprobe.errors import InputError, MissingExtraError
from funcprobe.report.colour_classes import DEPTH, class_name, classes_of
from funcprobe.report.heat_map import heat_map
from funcprobe.visible_text import shortened, visible
from tests.cases.heat_map_pages import Element, data, page
from tests.cases.written_attribution import NASTY, attribution, nasty, words


@pytest.fixture
def drawn(tmp_path: Path) -> Any:
    """Return a function that writes a page and reads it back."""
    return lambda found, of="batch", **options: page(heat_map(found, tmp_path / "page.html", of, **options))


def articles(document: Element) -> dict[int, Element]:
    return {int(str(a.attributes["id"])[1:]): a for a in document.all("article")}


def said(article: Element) -> Element:
    return article.one("div", **{"class": "says"})


@pytest.mark.parametrize("of", ["batch", "evaluation"])
def test_every_token_stands_once_with_its_text_colour_and_numbers(drawn: Any, of: Any) -> None:
    found = attribution(vocabulary=words(), hole=True)
    document, columns = drawn(found, of), found.columns("tokens", of)
    held, shown = data(document), articles(document)
    colours = classes_of(columns["contribution"]).of(columns["contribution"])
    seen = {b: said(a).all("i") for b, a in shown.items()}
    assert sum(map(len, seen.values())) == len(columns["token"]) == len(held["token"])
    place = dict.fromkeys(seen, 0)
    for k, b in enumerate(columns["sequence"].tolist()):
        token = seen[b][place[b]]
        at = int(str(shown[b].attributes["data-k"])) + place[b]
        place[b] += 1
        assert token.text == visible(columns["text"][k], breaks=True)
        assert token.attributes.get("class", "") == class_name(int(colours[k]))
        assert (held["token"][at], held["position"][at]) == (columns["token"][k], columns["position"][k])
        for name in ("contribution", "through_logp", "through_entropy", "logp", "entropy", "advantage"):
            assert held[name][at] == np.float32(columns[name][k]), name


def test_holes_are_grey_text_in_their_place_and_no_tokens(drawn: Any) -> None:
    found = attribution(vocabulary=words(), hole=True)
    says = said(articles(drawn(found))[0])
    names = [child.name for child in says.children if isinstance(child, Element)]
    assert names == ["i", "span", "i", "i", "i"]
    assert all(not isinstance(child, str) for child in says.children)  # no space between tokens that is not theirs


def test_prompts_and_sequences_stand_largest_first_with_their_sums(drawn: Any) -> None:
    found = attribution(vocabulary=words())
    document, prompts, sequences = drawn(found), found.columns("prompts"), found.columns("sequences")
    sections = document.all("section")
    totals = dict(zip(prompts["prompt"].tolist(), prompts["contribution"].tolist(), strict=True))
    order = [int(str(s.attributes["id"])[1:]) for s in sections]
    assert order == sorted(totals, key=lambda p: -abs(totals[p]))
    for section, number in zip(sections, order, strict=True):
        rows = [int(str(a.attributes["id"])[1:]) for a in section.all("article")]
        mine = [b for b in range(6) if sequences["prompt"][b] == number]
        assert rows == sorted(mine, key=lambda b: -abs(sequences["contribution"][b]))
        assert float(str(section.attributes["data-s"])) == totals[number]
        text = prompts["text"][prompts["prompt"].tolist().index(number)]
        (ask,) = section.all("div", **{"class": "ask"})  # once, since all of its sequences share it
        assert ask.text == visible(text, breaks=True)
    facts = articles(document)[2].one("p", **{"class": "facts"}).text
    share = 100 * sequences["contribution"][2] / found.first_order
    assert facts.replace("−", "-").endswith(f"({share:.1f} %) · advantage 0.8333 · reward 2 · 7 tokens")


def test_a_prompt_of_its_own_stands_before_its_completion(drawn: Any) -> None:
    found = attribution(vocabulary=words())
    r = found.batch.rollouts
    r.ids[1, 0] = (r.ids[1, 0] + 1) % 40
    (section,) = [s for s in drawn(found).all("section") if s.attributes["id"] == "p0"]
    own = [a.all("div", **{"class": "ask"}) for a in section.all("article")]
    assert sorted(map(len, own)) == [0, 1]


def test_the_legend_counts_and_sums_every_class(drawn: Any) -> None:
    found = attribution((40,) * 20, vocabulary=words())
    values = found.columns()["contribution"]
    legend = drawn(found).one("table", **{"class": "legend"})
    rows = {r.all("th")[0].text: [c.text for c in r.all("td")] for r in legend.all("tr")}
    bounds = [float(x.replace("−", "-")) if x != "less" else 0.0 for x in rows["at least"]]
    assert bounds == [-b for b in reversed(bounds)]
    assert bounds == sorted(bounds)
    assert len(bounds) == 2 * DEPTH + 1
    assert sum(int(x.replace(",", "")) for x in rows["tokens"]) == len(values)
    assert int(rows["tokens"][-1]) == (values >= bounds[-1]).sum() > 0
    assert int(rows["tokens"][1]) == ((values <= bounds[1]) & (values > bounds[0])).sum() > 0
    total = sum(float(x.replace("−", "-") or 0) for x in rows["their sum"])
    assert total == pytest.approx(math.fsum(values), abs=0.005 * np.abs(values).sum())
    assert len([i for i in legend.all("i") if i.attributes.get("class")]) == 2 * DEPTH


def test_the_header_says_what_moved_by_what_and_in_which_unit(drawn: Any) -> None:
    found = attribution(warnings=("few prompts",))
    document = drawn(found)
    header = document.one("header").text
    for name, x in found.ledger.items():
        assert f"by {name}" in header
        assert f"{x:+.6e}" in header
    for text in ("nats per token", "Additive form", "parts − whole", "Warning: few prompts"):
        assert text in header
    assert "6 sequences, 26 tokens, 3 prompts" in header
    assert document.one("title").text == document.one("h1").text == "Which tokens of U moved the entropy"
    other = drawn(found, "evaluation")
    assert other.one("h1").text == "Which tokens of E moved the entropy"
    assert "through entropies there" in other.one("header").text
    assert "Jacobian form" in drawn(attribution(form="jacobian")).one("header").text


@pytest.mark.parametrize("ids", [False, True])
def test_untrusted_text_stays_text(drawn: Any, ids: bool) -> None:
    found = attribution((15,) * 8, vocabulary=None if ids else nasty(), words=len(NASTY))
    document = drawn(found)
    assert [s.attributes for s in document.all("script")] == [{"type": "application/json", "id": "data"}, {}]
    assert len(document.all("h1")) == len(document.all("style")) == 1
    assert not document.all("b")
    text = document.one("main").text
    assert not set(text) & {"\x00", "\x1b", "\u202e", "\u202c", "\u200f"}
    assert ("[3]" in text) is ids
    assert ("</style></article><h1>out</h1>" in text) is not ids


def test_the_page_is_one_file_that_loads_and_runs_nothing_but_its_own(drawn: Any, tmp_path: Path) -> None:
    document = drawn(attribution(vocabulary=nasty(), words=len(NASTY)))
    policy = document.all("meta")[1].attributes
    assert policy["http-equiv"] == "Content-Security-Policy"
    content = str(policy["content"])
    assert content.startswith("default-src 'none'; ")
    for kind, element in (("style", document.one("style")), ("script", document.all("script")[-1])):
        digest = base64.b64encode(hashlib.sha256(element.text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in content
    everything = [e for name in ("img", "link", "iframe", "object", "base", "a") for e in document.all(name)]
    assert everything == []
    assert not re.search(r"https?://|@import|url\(", (tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_it_is_accessible_as_far_as_markup_goes(drawn: Any) -> None:
    document = drawn(attribution())
    assert document.one("html").attributes["lang"] == "en"
    assert all(cell.attributes.get("scope") in ("row", "col") for cell in document.all("th"))
    assert all(table.all("caption") for table in document.all("table"))
    named = document.all("button", type="button") + document.all("div", **{"class": "says"})
    assert all(e.attributes.get("aria-label") for e in named)
    assert all(e.attributes.get("tabindex") == "0" for e in document.all("div", **{"class": "says"}))
    within = [e for label in document.all("label") for e in label.all("input") + label.all("select")]
    assert len(within) == len(document.all("input")) + len(document.all("select"))


def test_an_enormous_batch_shows_the_largest_sequences_and_says_so(drawn: Any) -> None:
    found = attribution((10,) * 12, vocabulary=words())
    sums = np.abs(found.columns("sequences")["contribution"])
    document = drawn(found, limit=45)
    assert set(articles(document)) == set(np.argsort(-sums)[:4].tolist())
    said_so = document.one("p", **{"class": "omitted"}).text
    part = f"{100 * np.sort(sums)[-4:].sum() / sums.sum():.1f} %"
    assert f"shows 4 of 12 sequences, 40 of 120 tokens: those with the largest |contribution|, {part}" in said_so
    assert len(data(document)["token"]) == 40
    for b, article in articles(document).items():  # the data goes with the sequences that are left
        start = int(str(article.attributes["data-k"]))
        columns = found.columns()
        mine = columns["contribution"][columns["sequence"] == b]
        assert data(document)["contribution"][start : start + 10] == pytest.approx(mine, rel=1e-6)
    partial = [s for s in document.all("section") if "of them here" in s.all("p")[0].text]
    assert partial
    assert not drawn(found, limit=120).all("p", **{"class": "omitted"})
    assert len(articles(drawn(found, limit=1))) == 1


def test_a_still_step_and_a_batch_of_one_have_a_page(drawn: Any) -> None:
    still = drawn(attribution(scale=0.0, change=0.0, first_order=0.0))
    assert not [i for i in still.one("main").all("i") if i.attributes.get("class")]
    one = drawn(attribution((1,), group_size=1))
    assert len(one.one("main").all("i")) == 1


def test_classes_halve_and_their_borders_are_read_from_the_data() -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(size=1000) ** 3
    found = classes_of(values)
    assert list(found.edges) == sorted(found.edges)
    assert np.allclose(np.array(found.edges[1:]) / found.edges[:-1], 2, rtol=0.05)
    assert 0.01 <= (np.abs(values) >= found.edges[-1]).mean() <= 0.02
    assert found.of(np.array([found.edges[0], -found.edges[-1], 0.0, found.edges[0] * 0.99])).tolist() == [1, -5, 0, 0]
    rows = found.legend(values)
    assert sum(row.tokens for row in rows) == 1000
    assert math.fsum(row.total for row in rows) == pytest.approx(math.fsum(values))
    assert classes_of(np.zeros(3)).of(np.zeros(3)).tolist() == [0, 0, 0]


def test_marks_are_seen_and_do_nothing() -> None:
    assert visible("plain") == "plain"
    assert visible("a\tb\r\x00\x7f\u2028\ufeff\ud800") == "a⇥b‹U+000D›‹U+0000›‹U+007F›‹U+2028›‹U+FEFF›‹U+D800›"
    assert visible("👩\u200d👧 é 你好 שלום") == "👩\u200d👧 é 你好 שלום"
    assert shortened("abc", 3) == "abc"
    assert shortened("abcd", 3) == "ab…"


def test_a_page_replaces_a_page_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = heat_map(attribution(), tmp_path / "page.html")
    before = path.read_bytes()
    monkeypatch.setattr("funcprobe.report.heat_map.page_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        heat_map(attribution((3, 3)), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    monkeypatch.undo()
    heat_map(attribution((3, 3)), path)
    assert path.read_bytes() != before


def test_bad_asking_is_one_calm_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"Unknown batch 'both'; expected 'batch' \(U\) or 'evaluation' \(E\)."):
        heat_map(attribution(), tmp_path / "page.html", "both")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="limit is 0; expected a whole number of tokens, at least 1"):
        heat_map(attribution(), tmp_path / "page.html", limit=0)
    with pytest.raises(InputError, match="it is a folder; give the name of a file"):
        heat_map(attribution(), tmp_path)
    with pytest.raises(InputError, match="there is no folder"):
        heat_map(attribution(), tmp_path / "absent" / "page.html")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"'jinja2'.*pip install 'funcprobe\[app\]'"):
        heat_map(attribution(), tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []
