"""One gradient on U, a few derivatives on E, many learning rates: read from a curve, or scored where there is none."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Unpack

from funcprobe.analysis.probe import provenance_of
from funcprobe.arguments import checked
from funcprobe.errors import ForwardModeError, InputError, Note
from funcprobe.measurement.cautions import before_measuring, left_alone
from funcprobe.measurement.curve import ScoreCurve, points_of
from funcprobe.measurement.curve_fit import Keep, fitted
from funcprobe.measurement.identity import identity_of
from funcprobe.measurement.learning_rates import LearningRates
from funcprobe.measurement.measurement import Measurement, Observables
from funcprobe.measurement.options import OF_ONE_STEP, Given, Options, options_of
from funcprobe.measurement.update import Update
from funcprobe.results.journal import Journal
from funcprobe.results.sweep import SweepResult
from funcprobe.types import Progress, Rollouts


@checked
def sweep(
    update: Update,
    evaluation: Rollouts,
    lrs: Sequence[float],
    observables: Observables = None,
    *,
    chunk: int = 1,
    stored: bool | None = None,
    journal: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Unpack[Given],
) -> SweepResult:
    """Return the changes of observables on `evaluation` under an update at each of several learning rates.

    One gradient on U and one derivative on E serve all of them: sgd, adam and adamw move in proportion to the learning
    rate, so `δF₁(η) = (η/η₀) δF₁(η₀)` and `δF₂` goes with the square. The scores of E then move along one line, and a
    few more passes give ΔF at every learning rate (see `curve`), whatever their number. Where there is no
    such curve, each learning rate costs a scoring pass at θ′(η), and a node of a path where the float error of the
    subtraction asks for it: with an optimizer that does not move in proportion, which is found out, with experts, in
    arithmetic that is too coarse, in reverse mode, and with method="difference".

    Args:
        update: θ and how it is about to change: an update that knows its gradient. Its own learning rate is not used.
        evaluation: Rollouts E, drawn at θ, apart from U.
        lrs: Learning rates, above 0 and rising.
        observables: One, or several by name; by default the entropy per token.
        chunk: How many learning rates are scored in one pass, by vmap over parameters: pays with LoRA, above all, and
            takes so many times the memory. A curve has no use for it.
        stored: Whether θ′ as its dtype stores it is scored beside θ + Δθ, at every learning rate at which rounding is
            above 1 % of Δθ; None does so where the run stores what it steps in narrower numbers.
        journal: A file in which every node of the curve, and every finished learning rate, is kept. Called
            again with it, a sweep that was killed goes on from there; so does one that asks for more learning rates.
        progress: Called as progress(what, done, total).
        **options: See `Options`; rounding, top_k, keep_delta and keep_scores can do nothing here.

    Raises:
        InputError: If the learning rates are empty, not above 0, not rising or twice the same; or as in `probe`.
        NumericsError: As in `probe`.
        ForwardModeError: As in `probe`.
        EffectiveSampleSizeError: As in `probe`.
    """
    if not isinstance(chunk, int) or chunk < 1:
        raise InputError(f"chunk is {chunk}; expected how many learning rates go together, 1 or more.")
    return swept(
        update,
        evaluation,
        lrs,
        observables,
        options,
        "a sweep",
        chunk=chunk,
        stored=stored,
        journal=journal,
        progress=progress,
    )[0]


def swept(
    update: Update,
    evaluation: Rollouts,
    lrs: Sequence[float],
    observables: Observables,
    options: Given,
    verb: str,
    *,
    chunk: int = 1,
    stored: bool | None = None,
    lr_max: float | None = None,
    journal: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> tuple[SweepResult, ScoreCurve | None]:
    """Return a sweep, and the curve that it was read from where there is one: see `sweep` and `curve`.

    Raises:
        InputError: As `sweep`.
        NumericsError: As in `probe`.
        ForwardModeError: As in `probe`.
        EffectiveSampleSizeError: As in `probe`.
    """
    update.need("gradient", verb[0].upper() + verb[1:])
    lrs = _numbers(lrs)
    check_lrs(lrs)
    lr_max = lrs[-1] if lr_max is None else lr_max
    if lrs[-1] > lr_max:
        raise InputError(f"The table's largest learning rate, {lrs[-1]:g}, is above lr_max, {lr_max:g}.")
    given = options_of(options, verb, OF_ONE_STEP, rounding=False)
    measurement = Measurement.of(update, evaluation, observables, given, progress)
    messages = measurement.messages
    kept = Journal(journal, "" if journal is None else identity_of(update, measurement))
    with measurement.passes.clock("gradient on U"):
        loss = update.gradient(progress)
    messages.warn(*update.warnings)
    kept.begin(loss.gradient)
    todo = [lr for lr in lrs if lr not in kept.points]
    family, curve = _family(measurement, update, lr_max, kept.node)
    messages.add(left_alone(loss.gradient))
    for point in points_of(family, curve, todo, chunk, stored):
        kept.add(point)
    points = tuple(kept.points[lr] for lr in lrs)
    largest = update.at(lr_max)
    messages.warn(*before_measuring(measurement, largest, family.reference, {**family.info, "lr": lr_max}))
    messages.warn(*_gathered("At", ((point.lr, point.warnings) for point in points)))
    result = SweepResult(
        points=points,
        provenance=provenance_of(measurement, update, family.first.mode),
        info=family.info,
        warnings=tuple(messages.warnings),
        notes=(*messages.notes, *_gathered("at", ((point.lr, point.notes) for point in points))),
    )
    return result, curve


def _family(
    measurement: Measurement, update: Update, lr_max: float, keep: Keep | None = None
) -> tuple[LearningRates, ScoreCurve | None]:
    """Return the steps by learning rate, and the curve of their scores where there is one.

    They come to second order, as the curve bends, where forward mode can be used or it was asked for.

    Raises:
        ForwardModeError: If it was asked for, and the model has no forward derivative.
    """
    options = measurement.options
    wanted: Literal[1, 2] = options.order if options.order != "auto" else 1 if options.mode == "reverse" else 2
    nested = wanted == 2 and (options.exact or options.method == "difference")

    def to(order: Literal[1, 2]) -> LearningRates:
        settled: Options = dataclasses.replace(options, order=order)
        return LearningRates(measurement._replace(options=settled), update, lr_max)

    def tried(order: Literal[1, 2]) -> LearningRates:
        try:
            return to(order)
        except ForwardModeError:
            if options.order != "auto" or options.mode != "auto" or options.method == "path":
                raise
        return to(1)

    family = tried(2 if nested else 1)
    found = fitted(family, lr_max, keep, bends=wanted == 2 and not nested)
    if found is not None and wanted == 2:
        family.bend(found.line.curvature())
    elif wanted == 2 and not nested and family.first.along is not None:
        family = tried(2)
    return family, found


def check_lrs(lrs: Sequence[float]) -> None:
    """Refuse learning rates that no sweep can be made of.

    Raises:
        InputError: If there are none, or they are not finite, above 0, rising and different.
    """
    if not lrs:
        raise InputError("There are no learning rates to sweep; give at least one, such as [1e-7, 1e-6, 1e-5].")
    for lr in lrs:
        if not (math.isfinite(lr) and lr > 0):
            raise InputError(f"Learning rate {lr:g} cannot be swept; expected finite numbers above 0.")
    for low, high in itertools.pairwise(lrs):
        if low == high:
            raise InputError(f"Learning rate {low:g} stands twice; give each once.")
        if low > high:
            raise InputError(f"Learning rate {high:g} stands after {low:g}; give them in rising order.")


def _numbers(lrs: Sequence[float]) -> list[float]:
    """Return the learning rates as plain numbers, from any sequence or array of them.

    Raises:
        InputError: If they are none.
    """
    try:
        return [float(lr) for lr in lrs]
    except (TypeError, ValueError) as error:
        raise InputError(f"lrs is {lrs!r}; expected several learning rates, such as [1e-7, 1e-6, 1e-5].") from error


def _gathered(at: str, several: Iterable[tuple[Any, Sequence[Note]]]) -> list[Note]:
    """Return the notes of several points, each once, with the learning rates that it belongs to."""
    where: dict[tuple[str, str], list[str]] = {}
    for lr, notes in several:
        for note in notes:
            where.setdefault((note.kind, note), []).append(f"{lr:g}")
    return [Note(kind, f"{at} lr {', '.join(lrs)}: {text}") for (kind, text), lrs in where.items()]
