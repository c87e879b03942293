"""The words of a probe: the answer in a sentence, its numbers, every estimator side by side, and cautions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from funcprobe.errors import percent
from funcprobe.measurement.move import WORTH_TELLING
from funcprobe.measurement.outcome import Outcome
from funcprobe.measurement.readings import Reading
from funcprobe.results.blocks import Block, Column, Figure, Row, Sentence, Table, pairs
from funcprobe.results.provenance import Provenance
from funcprobe.results.words import closing, is_stored_narrower, sizes_of, storage_of, with_error
from funcprobe.types import Estimate

#: What tables call the integrands and weightings of the entropy family.
WORDS = {
    "rao_blackwell": "Rao–Blackwell",
    "surprisal": "surprisal",
    "per_decision": "per decision",
    "sequence": "sequence",
}

#: The rows that are the answer.
MEASURED, PREDICTED = "measured   ΔF", "predicted  δF₁"

#: So many of the leaves that moved most are listed.
SHOWN = 3


def blocks_of(
    outcome: Outcome,
    provenance: Provenance,
    family: Mapping[str, Estimate],
    top: Sequence[tuple[str, float]],
) -> tuple[Block, ...]:
    """Return a probe in blocks; it reads in ten seconds."""
    main = outcome.main
    moved = Table(
        (Column(), Column(narrow="broken")),
        tuple(Row((f"{norm:.3e}", name), "quiet") for name, norm in top[:SHOWN]),
        "most moved, by ‖Δθ‖₂",
    )
    rows = rows_of(outcome, provenance)
    return (
        Sentence(headline_of(outcome, provenance, family), "strong"),
        *sizes_of(provenance),
        pairs(rows, (MEASURED, PREDICTED), caption_of(main)),
        *([family_table(outcome, family)] if family else []),
        *([moved] if moved.rows else []),
        *closing(provenance, (), outcome.warnings),
        Figure("measured_vs_predicted"),
    )


def headline_of(outcome: Outcome, provenance: Provenance, family: Mapping[str, Estimate]) -> str:
    """Return the answer as a sentence or two: how far it moved, and whether first order said so."""
    main, what = outcome.main, named(outcome, family)
    if not main.is_measured:
        return f"{step_of(outcome)} {_by_first_order(main, what)}. The change itself was not measured."
    if main.change == 0:
        moved = f"leaves {what} at {main.before:.6g} {main.unit}"
    else:
        verb = "raises" if main.change > 0 else "lowers"
        share = f" ({_percent(abs(main.change / main.before))})" if main.before else ""
        moved = f"{verb} {what} by {abs(main.change):.3g} {main.unit}{share}"
    return f"{step_of(outcome)} {moved}. {_verdict(main)}{_as_stored(main, provenance)}"


def _by_first_order(main: Reading, what: str) -> str:
    if main.first_order == 0:
        return f"leaves {what} at {main.before:.6g} {main.unit} by first order"
    verb = "raises" if main.first_order > 0 else "lowers"
    return f"{verb} {what} by {abs(main.first_order):.3g} {main.unit} by first order"


def step_of(outcome: Outcome) -> str:
    """Return how a sentence or a title begins that speaks of the update."""
    return "The update" if outcome.lr is None else f"One step at lr {outcome.lr:g}"


def named(outcome: Outcome, family: Mapping[str, Estimate]) -> str:
    """Return the name of the main observable within a sentence."""
    name = outcome.main.observable
    known = name in family or (not outcome.main.is_measured and name.split("/")[0] in WORDS)
    return "the entropy" if known else name


def caption_of(reading: Reading) -> str:
    """Return the full name of an observable, and its unit."""
    return f"{reading.observable}, {reading.unit}"


def rows_of(outcome: Outcome, provenance: Provenance) -> list[tuple[str, str]]:
    """Return the numbers as (name, value) rows, most important first."""
    main, health, n = outcome.main, outcome.health, provenance.evaluation.sequences
    share = f"  ({percent(main.ratio, 2)} of ΔF)" if main.change and not main.is_lost else ""
    khat = "not fitted" if health.khat is None else f"{health.khat:.2f}"
    at = "" if outcome.lr is None else f" at lr {outcome.lr:g}"
    moved = ("step  ‖Δθ‖₂", f"{outcome.delta_norm:.6e}{at}")
    if not main.is_measured:
        return [("before  F(θ)", f"{main.before:.9f}"), (PREDICTED, with_error(main.first_order, None)), moved]
    return [
        ("before  F(θ)", f"{main.before:.9f}"),
        (f"after   F({'θ′' if main.exact is None or not main.of_delta else 'θ + Δθ'})", f"{main.after:.9f}"),
        (MEASURED, with_error(main.change, main.bars.get("change")) + _by(main) + _lost(main)),
        *told_apart(outcome, provenance),
        (PREDICTED, with_error(main.first_order, main.bars.get("first_order")) + share),
        ("remainder  ΔF − δF₁", with_error(main.remainder, main.bars.get("remainder"))),
        *_rounding(outcome),
        *([] if main.float_error is None else [("float error of ΔF", f"about {main.float_error:.0e}")]),
        *_curvature(outcome),
        *_others(outcome),
        *_routing(outcome),
        moved,
        ("entries too small to move", percent(outcome.unmoved, 2)),
        (
            "effective sample",
            f"{health.ess_sequence:.1f} of {n} sequences, prefixes at least {health.ess_prefix_min:.1f}",
        ),
        ("Pareto k̂", khat),
        *_caveats(outcome),
        *(("about the copy", text) for text in provenance.checks),
    ]


def family_table(outcome: Outcome, family: Mapping[str, Estimate]) -> Table:
    """Return every member of the entropy family with both changes, under its unit; the main one is marked."""
    numbers = (Column(heading, "right") for heading in ("measured ΔF", "predicted δF₁", "δF₁/ΔF"))
    rows, unit = [], None
    for name, estimate in family.items():
        integrand, weighting, per, *_ = name.split("/")
        if per != unit:
            rows.append(Row((f"nats per {per}",), "quiet"))
            unit = per
        slope = "" if estimate.first_order is None else f"{estimate.first_order:+.4e}"
        known = estimate.first_order is not None and estimate.change
        ratio = f"{(estimate.first_order or 0.0) / estimate.change:.4f}" if known else ""
        is_main = name == outcome.main.observable
        label = f"{'›' if is_main else ' '} {WORDS[integrand]}, {WORDS[weighting]}"
        rows.append(Row((label, f"{estimate.change:+.4e}", slope, ratio), "strong" if is_main else "plain"))
    return Table((Column("estimator", narrow="cut"), *numbers), tuple(rows))


def told_apart(outcome: Outcome, provenance: Provenance) -> list[tuple[str, str]]:
    """Return ΔF of the exact update and of θ′ as stored, where rounding sets them apart by over 1 % of Δθ."""
    main = outcome.main
    if outcome.rounding_ratio <= WORTH_TELLING:
        return []
    exact = main.change if main.exact is None and main.of_delta else main.exact
    stored = main.change if main.stored is None and not main.of_delta else main.stored
    bars = {"exact": main.bars.get("exact"), "stored": main.bars.get("stored")}
    bars["exact" if main.of_delta else "stored"] = main.bars.get("change")
    missing = f"not measured: {provenance.environment.get('dtype', 'the')} arithmetic does not hold θ + Δθ"
    return [
        ("  exact update", missing if exact is None else with_error(exact, bars["exact"])),
        (
            f"  as stored in {storage_of(provenance)}",
            "not measured" if stored is None else with_error(stored, bars["stored"]),
        ),
    ]


def _percent(share: float) -> str:
    return "below 0.01 %" if 0 < share < 0.00005 else percent(share, 2)


def _verdict(main: Reading) -> str:
    if main.change == 0:
        return f"First order predicts {main.first_order:+.3g}."
    share = main.first_order / main.change
    if share < 0:
        return f"First order predicts the other direction: {main.first_order:+.3g}."
    if abs(share - 1) < 0.0005:
        return "First order predicts all of it."
    return f"First order predicts {percent(share)} of it."


def _as_stored(main: Reading, provenance: Provenance) -> str:
    """Describe the other of the two steps, where storing θ′ sets it apart from θ + Δθ."""
    if main.exact is None or main.stored is None or not is_stored_narrower(provenance):
        return ""
    value = main.stored if main.of_delta else main.exact
    who = f"As stored in {storage_of(provenance)} the step" if main.of_delta else "The exact update, unrounded,"
    verb = "raises" if value > 0 else "lowers"
    return f" {who} {f'{verb} it by {abs(value):.3g}' if value else 'leaves it where it is'}."


def _caveats(outcome: Outcome) -> list[tuple[str, str]]:
    """Say why bars are optimistic, once where all observables share the reasons."""
    every = {name: "; ".join(reading.caveats) for name, reading in outcome.readings.items()}
    if len(set(every.values())) == 1:
        every = {"": next(iter(every.values()))}
    return [(f"error bars optimistic {name}".rstrip(), text) for name, text in every.items() if text]


def _by(reading: Reading) -> str:
    ways = {"path": "a path of {} node{}", "values": "a curve through {} value{}"}
    way = ways.get(reading.method, "").format(reading.nodes, "s" * (reading.nodes > 1))
    return f"  (by {way})" if way else ""


def _lost(reading: Reading) -> str:
    return "  (lost in float error)" if reading.is_lost else ""


def _routing(outcome: Outcome) -> list[tuple[str, str]]:
    if (found := outcome.routing) is None:
        return []
    return [("tokens that change experts", f"{found.changed} of {found.tokens} ({percent(found.fraction, 2)})")]


def _rounding(outcome: Outcome) -> list[tuple[str, str]]:
    part = "rounding of θ′ adds" if outcome.main.of_delta else "  of it rounding of θ′"
    return [(part, "negligible" if outcome.rounding is None else f"{outcome.rounding:+.6e}")]


def _curvature(outcome: Outcome) -> list[tuple[str, str]]:
    main, lr = outcome.main, outcome.lr
    if main.second_order is None:
        return []
    second = ("second order  δF₂", with_error(main.second_order, main.bars.get("second_order")))
    if (at := main.crossover) is None:
        return [second]
    if lr is None:
        return [second, ("linear within 5 %", f"up to {at / 20:.2g} of this update; |δF₂| = |δF₁| at {at:.2g} of it")]
    return [second, ("linear within 5 %", f"up to lr {lr * at / 20:.2g}; |δF₂| = |δF₁| at {lr * at:.2g}")]


def _others(outcome: Outcome) -> list[tuple[str, str]]:
    main, *others = outcome.readings
    rows = []
    for name in others:
        reading = outcome.readings[name]
        rows.append(
            (f"{name}  ΔF", f"{with_error(reading.change, reading.bars.get('change'))} {reading.unit}{_lost(reading)}")
        )
        divergence = reading.first_order == 0.0 and reading.second_order is not None
        predicted = "0" if divergence else with_error(reading.first_order, reading.bars.get("first_order"))
        if reading.second_order is not None:
            predicted += f", δF₂ {with_error(reading.second_order, reading.bars.get('second_order'))}"
        rows.append((f"{name}  δF₁", predicted))
        price = outcome.exchange.get(f"{main} per {name}")
        if price is not None:
            rate = f"{with_error(price.value, price)} {outcome.main.unit} / {reading.unit}"
            rows.append((f"{main} per {name}", f"{rate}{_vague(reading)}"))
    return rows


def _vague(reading: Reading) -> str:
    """Say so where a ratio's denominator is not told from 0: such a ratio has no standard error to speak of."""
    found = reading.bars.get("change")
    if found is None:
        return ""
    return "  (vague: its denominator is within two errors of 0)" if abs(found.value) < 2 * found.error else ""
