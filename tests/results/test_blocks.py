"""Blocks are set alike by every renderer: the same words and cells in the same order, and nothing in them acts."""

from __future__ import annotations

import html
import io
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from funcprobe.report.terminal import console, rendered
from funcprobe.results.blocks import Block, Column, Figure, Remark, Row, Sentence, Table, as_html, as_text, pairs
from tests.cases.written_attribution import NASTY, attribution, nasty
from tests.cases.written_results import RESULTS


def words(block: Block) -> list[str]:
    """Return the texts of a block in their order."""
    if isinstance(block, Figure):
        return []
    if isinstance(block, Sentence):
        return [block.text]
    if isinstance(block, Remark):
        return [block.label, block.text]
    cells = [cell for row in block.rows for cell in row.cells]
    return [block.caption, *(column.heading for column in block.columns), *cells]


def in_order(text: str, expected: list[str]) -> bool:
    """Return whether the texts stand there one after another."""
    at = 0
    for word in expected:
        found = text.find(word, at)
        if found < 0:
            return False
        at = found + len(word)
    return True


class Texts(HTMLParser):
    """The text of a page, and its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags = "", set[str]()
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)


def on_terminal(blocks: tuple[Block, ...], width: int = 1000) -> str:
    buffer = io.StringIO()
    console(buffer, width).print(rendered(blocks))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", RESULTS)
def test_all_renderers_say_the_same_in_the_same_order(kind: str) -> None:
    blocks = RESULTS[kind].blocks()
    expected = [word for block in blocks for word in words(block) if word]
    assert in_order(" ".join(as_text(blocks).split()), [" ".join(word.split()) for word in expected])
    assert in_order(Texts(as_html(blocks)).text, expected)
    assert in_order(on_terminal(blocks), expected)
    assert as_text(blocks) == RESULTS[kind].summary()
    lines = [line.rstrip() for line in on_terminal(blocks).splitlines()]
    assert lines == as_text(blocks, 1000).splitlines()  # down to the columns


@pytest.mark.parametrize("kind", RESULTS)
def test_every_result_names_its_figures_once(kind: str) -> None:
    figures = [block for block in RESULTS[kind].blocks() if isinstance(block, Figure)]
    assert figures
    assert len(set(figures)) == len(figures)


def test_tables_stand_apart_and_sentences_together() -> None:
    table = pairs([("a", "1"), ("long", "2")], caption="what")
    blocks = (Sentence("One."), Sentence("Two."), table, Figure("f"), table, Remark("note", "three"), Figure("g"))
    lines = ["One.", "Two.", "", "what", "a     1", "long  2", "", "what", "a     1", "long  2", "", "Note: three."]
    assert as_text(blocks).splitlines() == lines


def test_short_rows_sides_and_headings() -> None:
    table = Table((Column("name"), Column("x", "right")), (Row(("one", "1.25")), Row(("only",), "quiet")))
    assert as_text([table]).splitlines() == ["name     x", "one   1.25", "only"]
    page = as_html([table])
    assert page.startswith("<table><tr><th>name</th><th>x</th></tr><tr><td>one</td><td style='text-align:right'>1.25<")
    assert "<th>" not in as_html([pairs([("a", "1")])])
    assert as_text([Table((Column("none"),), ())]) == "none"
    assert as_text([]) == as_html([]) == ""


def test_a_remark_names_the_variant_that_it_is_about() -> None:
    assert as_text([Remark("warning", "hm", "grpo")]) == "Warning (grpo): hm."
    assert as_html([Remark("warning", "hm")]) == "<p><b>Warning.</b> hm.</p>"


def test_plain_text_is_broken_between_words_and_never_before_a_percent_sign() -> None:
    said = Sentence("one two 5 % of it")
    assert as_text([said], 9).splitlines() == ["one two", "5 % of it"]
    assert as_text([said], 10).splitlines() == ["one two", "5 % of it"]
    table = Table((Column(), Column(narrow="broken")), (Row(("name", "one two three")),))
    assert as_text([table], 13).splitlines() == ["name  one two", "      three"]
    cut = table._replace(columns=(Column(), Column(narrow="cut")))
    assert as_text([cut], 13).splitlines() == ["name  one tw…"]
    whole = table._replace(columns=(Column(), Column()))
    assert as_text([whole], 13).splitlines() == ["name  one two three"]


@pytest.mark.parametrize("width", [20, 40, 60, 80])
def test_text_gives_way_and_numbers_never(width: int) -> None:
    text = "what a long prompt this is, of more than sixty characters and 漢字 as well"
    columns = (Column("contribution", "right"), Column("share", "right"), Column("who", narrow="cut"))
    table = Table(columns, (Row(("-1.234567e-04", "12.3 %", text)), Row(("+1.000000e-10", "100.0 %", "a"))))
    lines = as_text([table], width).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["-1.234567e-04", "+1.000000e-10"]
    assert all("…" not in line.split("%")[0] for line in lines)
    assert len(lines) == 3
    if width >= 40:
        assert all(cell_len(line) <= width for line in lines)


ANYTHING = st.sampled_from([*NASTY, "<b>", "\r", "\x9b1m", "a\nb"]) | st.text(max_size=20)


@given(st.lists(ANYTHING, min_size=4, max_size=4))
def test_no_text_does_anything(texts: list[str]) -> None:
    one, two, three, four = texts
    blocks = (
        Sentence(one),
        Table((Column(two), Column()), (Row((three, four)),), one),
        Remark("warning", two, three),
    )
    for text in (as_text(blocks), on_terminal(blocks)):
        assert not [c for c in text if c != "\n" and (ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u202e\u200f\u2028")]
    assert Texts(as_html(blocks)).tags <= {"p", "b", "table", "caption", "tr", "th", "td"}
    lines = as_text(blocks, 1000).count("\n") + 1
    # sentence, blank, row, blank, remark, and caption and headings where there are some: nothing in them breaks a line
    assert lines == 5 + bool(one) + bool(two)


def test_tokens_of_an_attribution_are_looked_at_and_no_more() -> None:
    found = attribution((9,) * 12, vocabulary=nasty(), words=len(NASTY))
    for text in (found.summary(), html.unescape(found._repr_html_())):
        assert not set(text) & {"\x1b", "\x00", "\u202e", "\u202c", "\u200f", "\r"}
    assert Texts(found._repr_html_()).tags <= {"p", "b", "table", "caption", "tr", "th", "td"}
