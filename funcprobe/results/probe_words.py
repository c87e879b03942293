"""The plain words and numbers of a result, for terminals, notebooks and logs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from funcprobe.estimators.uncertainty import Bar
from funcprobe.measurement.move import WORTH_TELLING
from funcprobe.measurement.readings import Reading

if TYPE_CHECKING:
    from funcprobe.results.probe import ProbeResult
    from funcprobe.results.sweep import SweepResult


def rows_of(result: ProbeResult) -> list[tuple[str, str]]:
    """Return the result as (what, value) rows, most important first."""
    main, health, n = result.main, result.health, result.evaluation.sequences
    share = f"  ({main.ratio:.2%} of ΔF)" if main.change and not main.is_lost else ""
    khat = "not fitted" if health.khat is None else f"{health.khat:.2f}"
    return [
        ("before  F(θ)", f"{main.before:.9f}"),
        (f"after   F({'θ′' if main.exact is None or not main.of_delta else 'θ + Δθ'})", f"{main.after:.9f}"),
        ("measured   ΔF", with_error(main.change, main.bars.get("change")) + _by(main) + _lost(main)),
        *told_apart(result),
        ("predicted  δF₁", with_error(main.first_order, main.bars.get("first_order")) + share),
        ("remainder  ΔF − δF₁", with_error(main.remainder, main.bars.get("remainder"))),
        *_rounding(result),
        *([] if main.error is None else [("float error of ΔF", f"about {main.error:.0e}")]),
        *_curvature(result),
        *_others(result),
        *_routing(result),
        ("step  ‖Δθ‖₂", f"{result.delta_norm:.6e} at lr {result.lr:g}"),
        ("entries too small to move", f"{result.unmoved:.2%}"),
        (
            "effective sample",
            f"{health.ess_sequence:.1f} of {n} sequences, prefixes at least {health.ess_prefix_min:.1f}",
        ),
        ("Pareto k̂", khat),
        *_caveats(result),
        *(("about the copy", text) for text in result.checks),
    ]


def told_apart(result: ProbeResult) -> list[tuple[str, str]]:
    """Return ΔF of the exact update and of θ′ as stored, where rounding sets them apart by over 1 % of Δθ."""
    main = result.main
    if result.rounding_ratio <= WORTH_TELLING:
        return []
    exact = main.change if main.exact is None and main.of_delta else main.exact
    stored = main.change if main.stored is None and not main.of_delta else main.stored
    bars = {"exact": main.bars.get("exact"), "stored": main.bars.get("stored")}
    bars["exact" if main.of_delta else "stored"] = main.bars.get("change")
    missing = f"not measured: {result.environment.get('dtype', 'the')} arithmetic does not hold θ + Δθ"
    return [
        ("  exact update", missing if exact is None else with_error(exact, bars["exact"])),
        (
            f"  as stored in {storage_of(result)}",
            "not measured" if stored is None else with_error(stored, bars["stored"]),
        ),
    ]


def storage_of(result: ProbeResult | SweepResult) -> str:
    """Return the dtype that θ′ is stored in, as a word."""
    return str(result.environment.get("storage") or result.environment.get("dtype") or "its dtype")


def is_stored_narrower(result: ProbeResult | SweepResult) -> bool:
    """Return whether θ′ is stored in another dtype than it was computed in."""
    return storage_of(result) != str(result.environment.get("dtype") or "its dtype")


def with_error(value: float, found: Bar | None, digits: int = 6) -> str:
    """Return a number with its standard error, where there is one.

    Example:
        >>> with_error(-2.5e-3, None)
        '-2.500000e-03'
    """
    known = found is not None and math.isfinite(found.error)
    return f"{value:+.{digits}e}" + (f" ± {found.error:.1e}" if known and found else "")


def _caveats(result: ProbeResult) -> list[tuple[str, str]]:
    """Say why bars are optimistic, once where all observables share the reasons."""
    every = {name: "; ".join(reading.caveats) for name, reading in result.readings.items()}
    if len(set(every.values())) == 1:
        every = {"": next(iter(every.values()))}
    return [(f"error bars optimistic {name}".rstrip(), text) for name, text in every.items() if text]


def _by(reading: Reading) -> str:
    return f"  (by a path of {reading.nodes} node{'s' * (reading.nodes > 1)})" if reading.method == "path" else ""


def _lost(reading: Reading) -> str:
    return "  (lost in float error)" if reading.is_lost else ""


def _routing(result: ProbeResult) -> list[tuple[str, str]]:
    if (found := result.routing) is None:
        return []
    return [("tokens that change experts", f"{found.changed} of {found.tokens} ({found.fraction:.2%})")]


def _rounding(result: ProbeResult) -> list[tuple[str, str]]:
    part = "rounding of θ′ adds" if result.main.of_delta else "  of it rounding of θ′"
    return [(part, "negligible" if result.rounding is None else f"{result.rounding:+.6e}")]


def _curvature(result: ProbeResult) -> list[tuple[str, str]]:
    main = result.main
    if main.second_order is None:
        return []
    if main.crossover is None:
        return [("second order  δF₂", with_error(main.second_order, main.bars.get("second_order")))]
    return [
        ("second order  δF₂", with_error(main.second_order, main.bars.get("second_order"))),
        ("linear within 5 %", f"up to lr {result.linear_until_lr:.2g}; |δF₂| = |δF₁| at {result.crossover_lr:.2g}"),
    ]


def _others(result: ProbeResult) -> list[tuple[str, str]]:
    main, *others = result.readings
    rows = []
    for name in others:
        reading = result.readings[name]
        rows.append(
            (f"{name}  ΔF", f"{with_error(reading.change, reading.bars.get('change'))} {reading.unit}{_lost(reading)}")
        )
        divergence = reading.first_order == 0.0 and reading.second_order is not None
        predicted = "0" if divergence else with_error(reading.first_order, reading.bars.get("first_order"))
        if reading.second_order is not None:
            predicted += f", δF₂ {with_error(reading.second_order, reading.bars.get('second_order'))}"
        rows.append((f"{name}  δF₁", predicted))
        price = result.exchange.get(f"{main} per {name}")
        if price is not None:
            rate = f"{with_error(price.value, price)} {result.unit} / {reading.unit}"
            rows.append((f"{main} per {name}", f"{rate}{_vague(reading)}"))
    return rows


def _vague(reading: Reading) -> str:
    """Say so where a ratio's denominator is not told from 0: such a ratio has no standard error to speak of."""
    found = reading.bars.get("change")
    if found is None:
        return ""
    return "  (vague: its denominator is within two errors of 0)" if abs(found.value) < 2 * found.error else ""


def summary_of(result: ProbeResult) -> str:
    """Return the text of `ProbeResult.summary`."""
    e, u = result.evaluation, result.update_batch
    head = [
        f"{result.observable}, {result.unit} (first order in {result.mode} mode)",
        f"E: {e.sequences} sequences, {e.tokens} tokens, {e.prompts} prompts   "
        f"U: {u.sequences} sequences, {u.tokens} tokens, {u.prompts} prompts",
    ]
    rows = rows_of(result)
    width = max(len(name) for name, _ in rows)
    body = [f"  {name:<{width}}  {value}" for name, value in rows]
    moved = [f"  {norm:.3e}  {name}" for name, norm in result.top[:3]]
    said = [f"Warning: {text}" for text in result.warnings]
    return "\n".join([*head, "", *body, "", "largest moves ‖Δθ‖₂", *moved, *([""] if said else []), *said])
