"""The numbers of a sweep: a row for every learning rate, and remarks below the rows."""

from __future__ import annotations

import math

from funcprobe.errors import percent
from funcprobe.measurement.readings import Reading, is_lost
from funcprobe.results.curve import Curve, lr_of
from funcprobe.results.sweep_law import law_of, remainder_fit, subtraction_error
from funcprobe.results.sweep_words import fit_text, lr_text
from funcprobe.results.words import is_stored_narrower, storage_of


def table_of(curve: Curve, name: str | None = None) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return (headings, a row for every learning rate) of one observable, all of it text.

    The prediction is δF₁, or δF₂ for what has no first order; ESS is of the sequence weights, in sequences.

    Raises:
        InputError: If there is no such observable.
    """
    sign = "₁" if law_of(curve, name).lead == 1 else "₂"
    rows: list[tuple[str, ...]] = []
    for point, reading in zip(curve.points, curve.readings(name), strict=True):
        predicted = reading.first_order if sign == "₁" else reading.second_order
        by = f"{reading.method} ({reading.nodes})" if reading.nodes else reading.method
        said = (lr_text(lr_of(point)), _change(reading), "" if predicted is None else f"{predicted:+.4e}")
        end = (by, f"{point.health.ess_sequence:.1f}")
        rows.append((*said, _share(predicted, reading.change), *_other(curve, reading), *end))
    return ("lr", "ΔF", f"δF{sign}", f"δF{sign}/ΔF", *_other_heading(curve), "by", "ESS"), rows


def remarks_of(curve: Curve) -> list[str]:
    """Return the remarks below the tables, about the main observable: one line each."""
    return [
        *_errors(curve),
        *_stored_apart(curve),
        *_remainder(curve),
        *_scale(curve),
        *_lost(curve),
        *_optimistic(curve),
    ]


def _apart(curve: Curve) -> list[Reading]:
    """Return the readings whose θ′ as stored is another step than θ + Δθ, where a run stores wider numbers."""
    if not is_stored_narrower(curve.provenance):
        return []
    return [r for point in curve.points for r in point.readings.values() if r.stored is not None]


def _other_heading(curve: Curve) -> tuple[str, ...]:
    """Return the name of the column beside ΔF, where there are two of them."""
    apart = _apart(curve)
    if not apart:
        return ()
    return (f"as stored in {storage_of(curve.provenance)}",) if apart[0].of_delta else ("exact update",)


def _other(curve: Curve, reading: Reading) -> tuple[str, ...]:
    if not _apart(curve):
        return ()
    value = reading.stored if reading.of_delta else reading.exact
    return ("" if value is None else f"{value:+.4e}",)


def _stored_apart(curve: Curve) -> list[str]:
    apart = [p for p, r in zip(curve.points, curve.readings(), strict=True) if r.stored is not None]
    if not apart:
        return []
    what = "the exact update" if apart[0].readings[curve.observables[0]].of_delta else "θ′ as stored"
    low, high = min(p.rounding_ratio for p in apart), max(p.rounding_ratio for p in apart)
    return [
        f"ΔF is that of {what}: at {len(apart)} of {len(curve.points)} learning rates, up to lr "
        f"{lr_text(lr_of(apart[-1]))}, storing θ′ in {storage_of(curve.provenance)} loses "
        f"{percent(low, 0)} to {percent(high, 0)} of ‖Δθ‖."
    ]


def _change(reading: Reading) -> str:
    found = reading.bars.get("change")
    bar = "" if found is None else f" ± {found.error:.1e}{'*' if reading.caveats else ''}"
    return f"{reading.change:+.4e}{bar}{' (lost)' if reading.is_lost else ''}"


def _share(predicted: float | None, change: float) -> str:
    if predicted is None or not change:
        return ""
    share = predicted / change
    return f"{share:.4f}" if share == 0 or 1e-3 <= abs(share) < 1e3 else f"{share:.1e}"


def _errors(curve: Curve) -> list[str]:
    found = any(reading.bars for point in curve.points for reading in point.readings.values())
    return [f"± is one standard error over {curve.provenance.evaluation.prompts} prompts."] if found else []


def _remainder(curve: Curve) -> list[str]:
    fit = remainder_fit(curve) if law_of(curve).lead == 1 else None
    if fit is None:
        return []
    return [f"Remainder ΔF − δF₁: {fit_text(fit)}, from {fit.points} learning rates; 2 is where second order leads."]


def _scale(curve: Curve) -> list[str]:
    up_to = law_of(curve).up_to * (1 + 1e-9)
    known = [lr for lr, r in zip(curve.lrs, curve.readings(), strict=True) if not r.is_lost]
    inside = [lr for lr in known if lr <= up_to] or known
    if len(inside) < 2:
        return []
    low, high = inside[0], inside[-1]
    found = curve.scale_check(low, high)
    growths = {"‖Δθ‖": found.delta_norm, "δF₁": found.first_order, "ΔF": found.change}
    said = ", ".join(f"{what} {growth / found.lr:.4f}" for what, growth in growths.items() if math.isfinite(growth))
    return [f"Scale check, lr {lr_text(low)} to {lr_text(high)}, growth as a multiple of the learning rate's: {said}."]


def _lost(curve: Curve) -> list[str]:
    readings = curve.readings()
    if _apart(curve):
        return []  # subtractions were made at θ′ as stored, which is another step
    if all(subtraction_error(r) is None for r in readings):
        unknown = curve.provenance.mode == "reverse"
        return ["In reverse mode ΔF is a subtraction, whose float error is not estimated."] if unknown else []
    lost = [lr for lr, r in zip(curve.lrs, readings, strict=True) if is_lost(r.change, subtraction_error(r))]
    if not lost:
        return []
    where = f"{len(lost)} of {len(readings)} learning rates, up to lr {lr_text(lost[-1])}"
    return [f"Subtracting two evaluations is off by more than 10 % of ΔF at {where}."]


def _optimistic(curve: Curve) -> list[str]:
    found: dict[str, list[float]] = {}
    for point in curve.points:
        for text in dict.fromkeys(caveat for r in point.readings.values() for caveat in r.caveats):
            found.setdefault(text, []).append(lr_of(point))
    return [f"* Error bar optimistic from lr {lr_text(lrs[0])}: {text}." for text, lrs in found.items()]
