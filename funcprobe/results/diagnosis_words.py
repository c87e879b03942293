"""The words of a diagnosis on a terminal: at most 40 lines of 80 columns, whatever was found."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence

from funcprobe.errors import Note
from funcprobe.results.blocks import Block, Remark, Sentence
from funcprobe.results.findings import Answer, Findings
from funcprobe.results.probe_words import step_of
from funcprobe.results.words import counted
from funcprobe.visible_text import shortened, visible

#: Lines and columns of the page on a terminal.
LINES, COLUMNS = 40, 80

#: Lines of every answer at most, under its question: 29, with 8 questions, a head, a line of remarks and a spare one.
ROOM = (3, 3, 4, 4, 3, 4, 3, 5)


def blocks_of(
    found: Findings, answers: Sequence[Answer], notes: Sequence[Note], warnings: Sequence[Note]
) -> tuple[Block, ...]:
    """Return a diagnosis in blocks: two lines a question and more, and a line on its warnings."""
    told = (block for answer, room in zip(answers, ROOM, strict=True) for block in _told(answer, room))
    return (Sentence(_head(found), "quiet"), *told, *_remarks(notes, warnings))


def _head(found: Findings) -> str:
    e, u = found.provenance.evaluation, found.provenance.batch
    said = f"{step_of(found.probe.outcome)}; E: {counted(e)}"
    return shortened(said if u is None else f"{said}; U: {u.prompts} prompts", COLUMNS)


def _told(answer: Answer, room: int) -> tuple[Sentence, Sentence]:
    question = shortened(visible(f"{answer.question} {answer.verdict.upper()}"), COLUMNS)
    return Sentence(question, "strong"), Sentence(_fitted(visible(answer.sentence), f"Try: {answer.advice}", room))


def _fitted(numbers: str, advice: str, room: int) -> str:
    """Return numbers and advice in so many lines: of the numbers as many words as fit, the page has all of them."""
    words = numbers.split(" ")
    for count in range(min(len(words), room * COLUMNS // 2), 0, -1):
        text = f"{' '.join(words[:count])}{'' if count == len(words) else ' …'} {advice}"
        if len(text) <= room * COLUMNS and len(textwrap.wrap(_spread(text), COLUMNS, break_on_hyphens=False)) <= room:
            return text
    return shortened(advice, COLUMNS)


def _spread(text: str) -> str:
    """Return a text in which letters that take two columns stand twice."""
    return "".join(c * (1 + (unicodedata.east_asian_width(c) in "WF")) for c in text)


def _remarks(notes: Sequence[Note], warnings: Sequence[Note]) -> tuple[Remark, ...]:
    """Return a line on warnings and notes, which all stand on the page and in the result."""
    if not warnings and not notes:
        return ()
    said = [f"{len(some)} {word}" for some, word in ((warnings, "of them"), (notes, "notes")) if some]
    kinds = ", ".join(dict.fromkeys(note.kind for note in warnings or notes))
    about = visible(shortened(f"{' and '.join(said)} ({kinds}", COLUMNS - len("Warning: ; all stand on the page).")))
    return (Remark("warning" if warnings else "note", f"{about}); all stand on the page."),)
