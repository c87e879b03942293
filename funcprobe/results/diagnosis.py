"""`Diagnosis`: one update, asked in the order in which one would ask: answers by rule, and the results behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from funcprobe.errors import InputError, Note
from funcprobe.results.blocks import Block
from funcprobe.results.diagnosis_words import blocks_of
from funcprobe.results.findings import Answer, Findings
from funcprobe.results.result import Result
from funcprobe.results.storage import Kind


@dataclass(frozen=True)
class Diagnosis(Findings, Result):
    """Eight answers about one update, each with its number, bar and one thing to try, and their sources."""

    kind: ClassVar[Kind] = "diagnosis"

    answers: tuple[Answer, ...]  #: in the order of the questions
    notes: tuple[Note, ...] = ()  #: what was decided on the way
    warnings: tuple[Note, ...] = ()  #: what should be known before the numbers are used

    def answer(self, word: str) -> Answer:
        """Return the first answer whose question has a word in it.

        Raises:
            InputError: If no question has.
        """
        for answer in self.answers:
            if word.lower() in answer.question.lower():
                return answer
        raise InputError(f"No question has '{word}' in it; they are {' '.join(a.question for a in self.answers)}")

    def blocks(self) -> tuple[Block, ...]:
        """Return the blocks of a diagnosis: a question, its verdict, numbers and one thing to try, eight times."""
        return blocks_of(self, self.answers, self.notes, self.warnings)
