"""The contents of a token heat map, as values: words, sums, every token with its colour; the template lays out."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from funcprobe.attribution.decoding import shown
from funcprobe.attribution.token_parts import TokenParts
from funcprobe.attribution.token_tables import Columns, completion_ids, prompt_columns, sequence_columns, token_columns
from funcprobe.errors import percent
from funcprobe.report.colour_classes import LegendRow, class_name, classes_of
from funcprobe.results.attribution_words import ledger_rows, share, ways_rows
from funcprobe.results.parts import Batch, Parts
from funcprobe.results.probe_words import headline_of, named
from funcprobe.visible_text import shortened, visible

#: Characters of one token at most; the longest of real vocabularies have 128 or so.
LONGEST = 400


class Run(NamedTuple):
    """A token, or the text of a hole between tokens that the policy did not choose."""

    text: str
    colour: str  #: the name of its class; "" for none
    chosen: bool  #: False in a hole


class SequenceView(NamedTuple):
    """One completion."""

    number: int  #: its row in the batch
    start: int  #: index of its first token in the data
    total: float
    facts: list[str]  #: its sum with its share, advantage, reward, length
    ask: str  #: its prompt, where that is not the one that stands above; "" otherwise
    runs: list[Run]


class PromptView(NamedTuple):
    """One prompt with the completions of it that are shown."""

    number: int  #: its group id
    order: int  #: its place in the batch
    total: float  #: of all its completions
    facts: list[str]
    text: str
    sequences: list[SequenceView]


class Page(NamedTuple):
    """Everything that the template lays out."""

    title: str
    lead: str  #: the result in a sentence or two
    of: str  #: "U" or "E"
    unit: str
    notes: list[tuple[str, str]]  #: (word, meaning)
    ledger: list[tuple[str, str]]  #: (what, value)
    legend: list[LegendRow]
    omitted: str  #: what is not on the page; "" where all is
    warnings: tuple[str, ...]
    prompts: list[PromptView]
    data: dict[str, Any]  #: of every token, for the script: packed columns


def page_of(attribution: Parts, of: Batch, limit: int) -> Page:
    """Return the page of a batch: prompts and their sequences with the largest |contribution| first."""
    parts = attribution.tokens_of(of)
    tokens, sequences = token_columns(parts, None), sequence_columns(parts, None)
    kept, probe = _kept(sequences, limit), attribution.probe
    letter = "U" if of == "batch" else "E"
    classes = classes_of(tokens["contribution"])
    return Page(
        title=f"Which tokens of {letter} moved {_what(attribution)}",
        lead=headline_of(probe.outcome, probe.provenance, probe.family),
        of=letter,
        unit=attribution.unit,
        notes=_notes(attribution, of),
        ledger=[*ledger_rows(attribution), *_ways(attribution, of)],
        legend=classes.legend(tokens["contribution"]),
        omitted=_omitted(sequences, kept),
        warnings=probe.warnings,
        prompts=_prompts(attribution, parts, sequences, kept, classes.of(parts.total.numpy())),
        data=_data(attribution, tokens, sequences, kept),
    )


def signed(x: float, digits: int = 3) -> str:
    """Return a contribution as a page writes it.

    Example:
        >>> signed(-1.23456e-05), signed(0.02, 1)
        ('−1.235e−5', '+2.0e−2')
    """
    return re.sub(r"e([+-])0(\d)", r"e\1\2", f"{x:+.{digits}e}").replace("-", "−")


def _kept(sequences: Columns, limit: int) -> NDArray[np.int64]:
    """Return the rows that are shown, in the order of the batch: all, or the largest that `limit` tokens hold."""
    if sequences["length"].sum() <= limit:
        return np.arange(len(sequences["length"]))
    order = np.argsort(-np.abs(sequences["contribution"]), kind="stable")
    fit = np.cumsum(sequences["length"][order]) <= limit
    return np.sort(order[: max(1, int(fit.sum()))])


def _omitted(sequences: Columns, kept: NDArray[np.int64]) -> str:
    every, length = len(sequences["length"]), sequences["length"]
    if len(kept) == every:
        return ""
    size = np.abs(sequences["contribution"])
    return (
        f"This page shows {len(kept):,} of {every:,} sequences, {length[kept].sum():,} of {length.sum():,} tokens: "
        f"those with the largest |contribution|, {percent(size[kept].sum() / (size.sum() or 1))} of Σ|Σ of a "
        "sequence|. Sums of prompts, the legend and the table above count all of them."
    )


def _prompts(
    attribution: Parts, parts: TokenParts, sequences: Columns, kept: NDArray[np.int64], colours: NDArray[np.int64]
) -> list[PromptView]:
    """Return the prompts, largest |sum| first, each with its sequences that are shown, likewise."""
    table, whole = prompt_columns(parts, None), attribution.first_order
    starts = dict(zip(kept.tolist(), np.cumsum([0, *sequences["length"][kept]]).tolist(), strict=False))
    vocabulary = _Vocabulary(attribution.vocabulary)
    ids = completion_ids(parts)
    members: dict[int, list[int]] = {}
    for b in kept.tolist():
        members.setdefault(int(sequences["prompt"][b]), []).append(b)
    prompts = []
    for place, number in enumerate(table["prompt"].tolist()):
        if not (rows := members.get(number)):
            continue
        ask = _ask(parts, rows[0], vocabulary)
        views = []
        for b in rows:
            own = _ask(parts, b, vocabulary)
            runs = list(_runs(parts, b, ids[b].tolist(), colours[b], vocabulary))
            facts = _sequence_facts(sequences, b, whole)
            total = float(sequences["contribution"][b])
            views.append(SequenceView(b, starts[b], total, facts, "" if own == ask else own, runs))
        views.sort(key=lambda view: -abs(view.total))
        facts = _prompt_facts(table, place, len(views), whole)
        prompts.append(PromptView(number, place, float(table["contribution"][place]), facts, ask, views))
    return sorted(prompts, key=lambda view: -abs(view.total))


class _Vocabulary:
    """Visible text of token ids, each made once."""

    def __init__(self, vocabulary: dict[int, str] | None) -> None:
        self._raw, self._seen = vocabulary, {}  # type: ignore[var-annotated]

    def __getitem__(self, token: int) -> str:
        if token not in self._seen:
            self._seen[token] = visible(shortened(shown(token, self._raw), LONGEST), breaks=True)
        return self._seen[token]

    def join(self, tokens: list[int]) -> str:
        """Return the entries of a sequence, joined."""
        return ("" if self._raw is not None else " ").join(self[t] for t in tokens)


def _ask(parts: TokenParts, b: int, vocabulary: _Vocabulary) -> str:
    r = parts.rollouts
    return vocabulary.join(r.ids[b, : int(r.prompt_lengths[b])].tolist())


def _runs(
    parts: TokenParts, b: int, ids: list[int], colours: NDArray[np.int64], vocabulary: _Vocabulary
) -> Iterator[Run]:
    r = parts.rollouts
    length = int(r.attention_mask[b].sum() - r.prompt_lengths[b])
    for t, chosen in enumerate(parts.mask[b, :length].tolist()):
        yield Run(vocabulary[ids[t]], class_name(int(colours[t])) if chosen else "", chosen)


def _sequence_facts(sequences: Columns, b: int, whole: float) -> list[str]:
    facts = [_sum(float(sequences["contribution"][b]), whole)]
    for name in ("advantage", "reward"):
        if name in sequences:
            facts.append(f"{name} {sequences[name][b]:.4g}".replace("-", "−"))
    return [*facts, _count(int(sequences["length"][b]), "token")]


def _prompt_facts(table: Columns, place: int, here: int, whole: float) -> list[str]:
    every = int(table["sequences"][place])
    facts = [_sum(float(table["contribution"][place]), whole), _count(every, "sequence")]
    if here != every:
        facts[-1] += f", {here} of them here"
    facts.append(_count(int(table["tokens"][place]), "token"))
    if "mean_reward" in table:
        facts.append(f"mean reward {table['mean_reward'][place]:.4g}".replace("-", "−"))
    return facts


def _sum(value: float, whole: float) -> str:
    return f"Σ {signed(value)} ({share(value, whole)})".replace("(-", "(−")


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _what(attribution: Parts) -> str:
    return named(attribution.probe.outcome, attribution.probe.family)


def _ways(attribution: Parts, of: Batch) -> list[tuple[str, str]]:
    return ways_rows(attribution) if of == "evaluation" else []


def _notes(attribution: Parts, of: Batch) -> list[tuple[str, str]]:
    """Return notes that define E, U, the unit and the form for a reader."""
    e, u = attribution.probe.evaluation, attribution.probe.batch
    what = _what(attribution)
    does = (
        f"A token here is one of U; its contribution is what its term of the loss did to {what} on E, by first order."
        if of == "batch"
        else f"A token here is one of E; its contribution is its part of the change of {what}, by first order."
    )
    forms = {
        "additive": "Δθ = offset + scale ⊙ gradient, with the optimizer's denominators and the clip factor at their "
        "actual values: tokens of U, momentum and weight decay sum to δF₁.",
        "jacobian": "what would be if a token weighed a little less, through denominators and clipping; the row rest "
        "holds what the step has beyond that.",
    }
    return [
        ("Contribution", f"{does} Unit: {attribution.unit}; shares are of δF₁."),
        ("U", f"the rollouts that the step was taken on: {_size(u)}."),
        ("E", f"held-out rollouts, drawn before the step, that it is measured on: {_size(e)}."),
        (f"{attribution.form} form".capitalize(), forms[attribution.form]),
    ]


def _size(counts: Any) -> str:
    return ", ".join(
        _count(n, what)
        for n, what in ((counts.sequences, "sequence"), (counts.tokens, "token"), (counts.prompts, "prompt"))
    )


def _data(attribution: Parts, tokens: Columns, sequences: Columns, kept: NDArray[np.int64]) -> dict[str, Any]:
    """Return the numbers of every token that is shown, in the order of the batch, packed as base64 of 4-byte words."""
    inside = np.isin(tokens["sequence"], kept)
    through = [name for name in tokens if name.startswith("through_")]
    floats = ["contribution", *through, "logp", "entropy", *(n for n in ("advantage",) if n in tokens)]
    return {
        "unit": attribution.unit,
        "whole": attribution.first_order,
        "ints": {name: _packed(tokens[name][inside], "<i4") for name in ("token", "position")},
        "floats": {name: _packed(tokens[name][inside], "<f4") for name in floats},
    }


def _packed(values: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode()
