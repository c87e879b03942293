"""The page of a diagnosis: one HTML file with answers, figures, tokens in their text, and every number behind them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from funcprobe.attribution.decoding import shown
from funcprobe.attribution.token_tables import completion_ids, movers
from funcprobe.data.atomic import fresh_file
from funcprobe.report.heat_map import check_place, environment, source
from funcprobe.report.page_parts import image_of, policy_of
from funcprobe.results.attribution import Attribution
from funcprobe.results.attribution_words import ledger_rows, movers_table, share, ways_rows
from funcprobe.results.blocks import Block, Figure, Remark, as_html, pairs
from funcprobe.results.comparison_words import differences_of, table_of
from funcprobe.results.diagnosis import Diagnosis
from funcprobe.results.diagnosis_remedies import REWARD
from funcprobe.results.diagnosis_rules import THRESHOLDS, tone_of
from funcprobe.results.probe_words import MEASURED, PREDICTED, headline_of, named
from funcprobe.results.result import Result
from funcprobe.results.words import sizes_of
from funcprobe.visible_text import visible

#: How many tokens of U are shown in their text, either way, and how many tokens of it on either side.
SHOWN, AROUND = 3, 12


class Picture(NamedTuple):
    """A figure on the page."""

    image: str  #: a PNG as a data address
    alt: str


class InText(NamedTuple):
    """A token of U in its completion."""

    fact: str  #: its contribution and its place
    prompt: str
    before: str
    token: str
    after: str


class Section(NamedTuple):
    """One question of the page with its answer, and all that is to be seen of it."""

    question: str
    verdict: str
    tone: str  #: "plain", "alarm" or "unknown"
    sentence: str
    advice: str
    text: Any = ""  #: tables, as markup of this package's own making
    pictures: tuple[Picture, ...] = ()
    tokens: tuple[InText, ...] = ()


def diagnosis_page(diagnosis: Diagnosis, path: str | os.PathLike[str]) -> Path:
    """Write the page, whole or not at all, and return its path; it loads nothing, and runs nothing.

    Raises:
        InputError: If there is no folder for it.
        MissingExtraError: If jinja2 or matplotlib is not installed.
    """
    from markupsafe import Markup

    path, templates = check_place(path), environment()
    css, probe = source(templates, "diagnosis.css"), diagnosis.probe
    given = {
        "title": f"What moved {named(probe.outcome, probe.family)}: a diagnosis",
        "lead": headline_of(probe.outcome, probe.provenance, probe.family),
        "sizes": [sentence.text for sentence in sizes_of(probe.provenance)],
        "policy": policy_of(css),
        "css": Markup(css),  # a file of this package, no data
        "sections": list(_sections(diagnosis)),
        "remarks": Markup(as_html(_remarks(diagnosis))),  # the renderer has escaped their text
        "behind": [(title, Markup(as_html(result.blocks()))) for title, result in _behind(diagnosis)],
        "thresholds": [(t.name, f"{t.value:g}", t.meaning) for t in THRESHOLDS],
    }
    with fresh_file(path, overwrite=True) as partial:
        partial.write_text(templates.get_template("diagnosis.html.j2").render(**given), encoding="utf-8")
    return path


def _sections(diagnosis: Diagnosis) -> Iterator[Section]:
    shown_of = (_nothing, _of_ledger, _of_places, _of_curve, _nothing, _nothing, _nothing, _of_variants)
    for answer, show in zip(diagnosis.answers, shown_of, strict=True):
        sentence, advice = typeset(answer.sentence), typeset(answer.advice)
        told = Section(answer.question, answer.verdict, tone_of(answer.verdict), sentence, advice)
        yield told._replace(**show(diagnosis))


def typeset(text: str) -> str:
    """Return a text in which no line is broken at a minus, nor before a percent sign.

    Example:
        >>> typeset("clip-higher -1.2e-04 ± 2e-05")
        'clip-higher −1.2e−04 ± 2e−05'
    """
    return re.sub(r"(?<=\de)-(?=\d)|(?<![\w.])-(?=\d)", "−", text).replace(" %", "\u00a0%")


def _nothing(diagnosis: Diagnosis) -> dict[str, Any]:
    return {}


def _of_ledger(diagnosis: Diagnosis) -> dict[str, Any]:
    parts = diagnosis.attribution
    if parts is None:
        return {}
    rows = pairs([*ledger_rows(parts), *ways_rows(parts)], (MEASURED, PREDICTED), f"The step in rows, {parts.unit}")
    return {"text": _markup(rows)}


def _of_places(diagnosis: Diagnosis) -> dict[str, Any]:
    parts = diagnosis.attribution
    if parts is None:
        return {}
    pictures = [Picture(image_of(parts, Figure(of)), f"contributions by {of}") for of in ("layers", "prompts")]
    tables = (movers_table(parts, table) for table in ("prompts", "layers"))
    return {"text": _markup(*tables), "pictures": tuple(pictures), "tokens": tuple(_tokens(parts))}


def _of_curve(diagnosis: Diagnosis) -> dict[str, Any]:
    if diagnosis.curve is None:
        return {}
    alt = "the measured change against the learning rate, with its predictions"
    return {"pictures": (Picture(image_of(diagnosis.curve, Figure("sweep")), alt),)}


def _of_variants(diagnosis: Diagnosis) -> dict[str, Any]:
    compared = diagnosis.comparison
    left_out = [Remark("note", why, name) for name, why in diagnosis.left_out.items()]
    if compared is None:
        return {"text": _markup(*left_out)}
    differences = differences_of(compared.outcomes, compared.provenance, compared.level)
    names = [None, *(name for name in compared.observables[1:] if name == REWARD)]
    pictures = tuple(
        Picture(image_of(compared, Figure("differences", name)), f"paired differences of {name or 'the entropy'}")
        for name in names
    )
    return {"text": _markup(table_of(compared.outcomes), differences, *left_out), "pictures": pictures}


def _tokens(parts: Attribution) -> Iterator[InText]:
    """Yield the tokens of U that lowered it most, and those that raised it most, in their text."""
    up, down = movers(parts.columns("tokens"), SHOWN)
    ids, rollouts = completion_ids(parts.batch), parts.batch.rollouts
    for rows in (down, up):
        for k, x in enumerate(rows["contribution"]):
            b, t = int(rows["sequence"][k]), int(rows["position"][k])
            start = int(rollouts.prompt_lengths[b])
            own = ids[b, : int(rollouts.attention_mask[b].sum()) - start].tolist()
            text = [_joined(parts, some) for some in (own[max(0, t - AROUND) : t], own[t + 1 : t + 1 + AROUND])]
            fact = typeset(f"{float(x):+.2e} ({share(float(x), parts.first_order)}), at {t} of sequence {b}")
            yield InText(
                fact,
                _joined(parts, rollouts.ids[b, :start].tolist()),
                f"{'…' * (t > AROUND)}{text[0]}",
                visible(rows["text"][k]),
                f"{text[1]}{'…' * (t + 1 + AROUND < len(own))}",
            )


def _joined(parts: Attribution, tokens: list[int]) -> str:
    between = "" if parts.vocabulary is not None else " "
    return visible(between.join(shown(token, parts.vocabulary) for token in tokens))


def _remarks(diagnosis: Diagnosis) -> list[Block]:
    kinds = (("warning", diagnosis.warnings), ("note", diagnosis.notes))
    return [Remark(kind, str(text)) for kind, some in kinds for text in some]  # type: ignore[arg-type]


def _behind(diagnosis: Diagnosis) -> Iterator[tuple[str, Result]]:
    """Yield the results that the answers were read from, each with a title."""
    yield "The update, measured and predicted", diagnosis.probe
    if diagnosis.attribution is not None:
        yield "Its parts", diagnosis.attribution
    if diagnosis.curve is not None:
        yield "Other learning rates", diagnosis.curve
    if diagnosis.comparison is not None:
        yield "Its variants", diagnosis.comparison


def _markup(*blocks: Block) -> Any:
    from markupsafe import Markup

    return Markup(as_html(blocks))  # the renderer has escaped their text
