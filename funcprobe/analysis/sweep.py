"""One gradient on U, one derivative on E, many learning rates: a scoring pass each is all that is left to do."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Literal

from funcprobe.analysis.probe import asked_for
from funcprobe.engine.clock import Clock
from funcprobe.engine.passes import DEFAULT_MICROBATCH, Passes
from funcprobe.errors import ForwardModeError, InputError
from funcprobe.measurement.cautions import before_measuring, is_independent, unequal_groups
from funcprobe.measurement.identity import identity_of
from funcprobe.measurement.learning_rates import Family
from funcprobe.measurement.messages import Messages
from funcprobe.measurement.options import PATH_TOLERANCE, Inquiry, MeasureMethod, Mode, Options
from funcprobe.measurement.readings import BarMethod
from funcprobe.optimizers.stored import storage_name
from funcprobe.policy.module import Policy
from funcprobe.results.environment import describe_environment
from funcprobe.results.journal import Journal
from funcprobe.results.probe import BatchCounts
from funcprobe.measurement.outcome import Outcome
from funcprobe.results.sweep import SweepResult
from funcprobe.training.step import Step
from funcprobe.types import Microbatch, Observable, OptState, Params, Progress, Rollouts


def sweep(
    policy: Policy,
    step: Step,
    params: Params,
    opt_state: OptState,
    evaluation: Rollouts,
    update: Rollouts,
    lrs: Sequence[float],
    observable: Observable | None = None,
    *,
    observables: Mapping[str, Observable] | None = None,
    mode: Mode = "auto",
    method: MeasureMethod = "auto",
    tolerance: float = PATH_TOLERANCE,
    order: Literal[1, 2] | None = None,
    bars: BarMethod | None = "auto",
    level: float = 0.95,
    seed: int = 0,
    microbatch: Microbatch = DEFAULT_MICROBATCH,
    chunk: int = 1,
    ess_threshold: float = 0.1,
    on_low_ess: Literal["warn", "raise"] = "warn",
    journal: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Return what the step on `update` does to observables on `evaluation` at each of several learning rates.

    One gradient on U and one derivative on E (of second order by default) serve all of them: sgd, adam and adamw move
    in proportion to the learning rate, so `δF₁(η) = (η/η₀) δF₁(η₀)` and `δF₂` goes with the square; an optimizer that
    does not is found out, and gets a forward-mode pass for every learning rate. What each learning rate costs is one
    scoring pass at θ′(η), and a path where the float error of the subtraction asks for it (see `probe`, whose options
    these are).

    Args:
        policy: What scores the rollouts.
        step: The pure step; its gradient is taken once.
        params: θ, at which the evaluation rollouts were drawn.
        opt_state: The optimizer's state before the step.
        evaluation: Rollouts E, drawn at θ, apart from U.
        update: Rollouts U, which the step is taken on.
        lrs: Learning rates, above 0 and rising.
        observable: What is measured; by default the entropy per token.
        observables: Several by name, in place of `observable`.
        mode: As in `probe`.
        method: As in `probe`.
        tolerance: As in `probe`.
        order: As in `probe`; None takes 2, which gives the crossover learning rate, where forward mode can be used.
        bars: As in `probe`.
        level: As in `probe`.
        seed: As in `probe`.
        microbatch: As in `probe`.
        chunk: How many learning rates are scored in one pass, by vmap over parameters: pays with LoRA, above all, and
            takes so many times the memory.
        ess_threshold: As in `probe`.
        on_low_ess: As in `probe`.
        journal: A file in which every finished learning rate is kept. Called again with it, a sweep that was killed
            goes on from there; so does one that asks for more learning rates.
        progress: Called as progress(what, done, total).

    Raises:
        InputError: If the learning rates are empty, not above 0, not rising or twice the same; or as in `probe`.
        NumericsError: As in `probe`.
        ForwardModeError: As in `probe`.
        EffectiveSampleSizeError: As in `probe`.
    """
    lrs = _numbers(lrs)
    check_lrs(lrs)
    if not isinstance(chunk, int) or chunk < 1:
        raise InputError(f"chunk is {chunk}; expected how many learning rates go together, 1 or more.")
    highest: Literal[1, 2] = order or (1 if mode == "reverse" else 2)
    options = Options(mode, method, tolerance, highest, bars, level, seed, False, ess_threshold, on_low_ess)
    wanted = asked_for(observable, observables, evaluation)
    identity = "" if journal is None else identity_of(step, params, opt_state, evaluation, update, wanted, options)
    kept = Journal(journal, identity)
    said, clock = Messages(), Clock()
    with said.recording(), clock("gradient on U"):
        gradient, info = step.gradient(params, update, progress=progress)
    kept.begin(gradient)
    passes = Passes.over(policy, evaluation, wanted, microbatch, progress, clock)
    asked = Inquiry(passes, wanted, options, said, is_independent(evaluation, update))
    asked.check()
    try:
        family = Family(asked, step, params, opt_state, gradient, info, lrs[-1])
    except ForwardModeError:
        if order is not None or mode != "auto" or method == "path":
            raise
        asked = asked._replace(options=dataclasses.replace(options, order=1))
        family = Family(asked, step, params, opt_state, gradient, info, lrs[-1])
    todo = [lr for lr in lrs if lr not in kept.points]
    for point in family.points(todo, chunk):
        kept.add(point)
    points = tuple(kept.points[lr] for lr in lrs)
    said.also(before_measuring(evaluation, update, family.size, {**family.info, "lr": lrs[-1]}))
    said.also(unequal_groups(step.optimizer))
    said.also(_gathered("At", points, "warnings"))
    return SweepResult(
        points=points,
        mode=family.first.mode,
        evaluation=BatchCounts.of(evaluation),
        update_batch=BatchCounts.of(update),
        step=family.info,
        warnings=tuple(said.warnings),
        notes=(*said.notes, *_gathered("at", points, "notes")),
        timings=clock.seconds,
        environment=describe_environment(policy.device, params, storage_name(step.optimizer, params)),
    )


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


def _gathered(at: str, points: Sequence[Outcome], field: Literal["warnings", "notes"]) -> list[str]:
    """Return what points have to say, each text once, with the learning rates at which it was said."""
    where: dict[str, list[str]] = {}
    for point in points:
        for text in getattr(point, field):
            where.setdefault(text, []).append(f"{point.lr:g}")
    return [f"{at} lr {', '.join(lrs)}: {text}" for text, lrs in where.items()]
