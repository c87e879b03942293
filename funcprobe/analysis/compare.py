"""What if: several steps from one θ, measured on one E, with the differences between them paired.

Objectives, clip ranges, token masks, entropy bonuses, optimizers and learning rates are all just steps. What they share
is taken once: gradients of one objective on one U, ∇F in reverse mode, and in forward mode the scores of E at θ, once
for every `chunk` of steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from funcprobe.analysis.probe import asked_for, inquire
from funcprobe.engine.passes import DEFAULT_MICROBATCH
from funcprobe.errors import EffectiveSampleSizeError, InputError, NumericsError
from funcprobe.estimators.divergence import kl
from funcprobe.estimators.observables import entropy
from funcprobe.estimators.returns import expected_reward
from funcprobe.measurement.cautions import before_measuring, is_independent, left_alone, unequal_groups
from funcprobe.measurement.first_order import First, first_orders
from funcprobe.measurement.measure import measure_step
from funcprobe.measurement.messages import Messages
from funcprobe.measurement.move import Move
from funcprobe.measurement.options import Inquiry, options_of
from funcprobe.optimizers.stored import is_stored
from funcprobe.policy.module import Policy
from funcprobe.results.comparison import Comparison
from funcprobe.results.environment import describe_environment
from funcprobe.results.probe import BatchCounts
from funcprobe.measurement.outcome import Outcome
from funcprobe.training.step import Step
from funcprobe.types import Gradients, Microbatch, Observable, OptState, Params, Progress, Rollouts


class Variant(NamedTuple):
    """One step to compare; what is None is the comparison's own."""

    step: Step
    lr: float | None = None  #: learning rate of this step; None takes its optimizer's
    opt_state: OptState | None = None  #: for an optimizer of another kind, such as `optimizer.init(params)`
    update: Rollouts | None = None  #: another U, such as the same one without some of its prompts

    def on(self, update: Rollouts) -> Rollouts:
        """Return the rollouts that the step is taken on: its own, or the comparison's."""
        return update if self.update is None else self.update


def compare(
    policy: Policy,
    steps: Mapping[str, Step | Variant],
    params: Params,
    opt_state: OptState,
    evaluation: Rollouts,
    update: Rollouts,
    *,
    observables: Mapping[str, Observable] | None = None,
    chunk: int = 4,
    microbatch: Microbatch = DEFAULT_MICROBATCH,
    progress: Progress | None = None,
    **options: Any,
) -> Comparison:
    """Return what each of several steps does to observables on `evaluation`, and how far it differs from the first.

    Estimands: ΔF and δF₁ of every step, as in `probe`, each with its error bar over prompts; and their differences
    between steps. All steps are measured on the same rollouts, so most of the sampling error is common to them: the
    error of a difference is taken from differences prompt by prompt and is often far below that of either term.

    Args:
        policy: What scores the rollouts.
        steps: Steps by name; the first is what the others are compared with. A `Variant` carries a learning rate, an
            optimizer state or update rollouts of its own.
        params: θ, at which the evaluation rollouts were drawn.
        opt_state: The optimizer's state before the step.
        evaluation: Rollouts E, drawn at θ, apart from U.
        update: Rollouts U, which the steps are taken on.
        observables: What is measured, by name; by default the entropy, the expected reward where E has rewards, and
            KL(θ′‖θ).
        chunk: How many steps share a forward-mode pass over E: 1 + 2·chunk forward passes in place of 3·chunk, and
            memory of tangents that grows with it.
        microbatch: How E is cut for the model; it changes memory and no result.
        progress: Called as progress(what, done, total).
        **options: The further options of `probe`: mode, method, tolerance, order, bars, level, seed, ess_threshold, ...

    Raises:
        InputError: If there are no steps, or an option, a batch or an optimizer state does not fit; naming the step.
        NumericsError: If something is not finite; naming the step.
        ForwardModeError: As in `probe`.
        EffectiveSampleSizeError: With `on_low_ess="raise"`, as in `probe`.
    """
    variants = _variants(steps)
    if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
        raise InputError(f"chunk is {chunk!r}; expected how many steps go together, 1 or more.")
    wanted = asked_for(None, _observables(evaluation) if observables is None else observables, evaluation)
    if "rounding" in options:
        raise InputError("rounding can do nothing in a comparison, which shows no such row; leave it out.")
    asked = inquire(policy, evaluation, update, wanted, options_of(rounding=False, **options), microbatch, progress)
    asked = asked._replace(said=Messages(quiet=True))
    gradients = _Gradients(asked, params, update)
    outcomes: dict[str, Outcome] = {}
    infos: dict[str, dict[str, float]] = {}
    shared: First | None = None
    names = list(variants)
    for start in range(0, len(names), chunk):
        together = names[start : start + chunk]
        taken = {name: _taken(asked, name, variants[name], params, opt_state, gradients) for name in together}
        infos |= {name: found.info for name, found in taken.items()}
        if shared is None:
            firsts = first_orders(asked, params, [found.move.update for found in taken.values()])
            shared = firsts[0] if firsts[0].along is None else None
        else:
            firsts = [shared] * len(together)
        for name, first in zip(together, firsts, strict=True):
            outcomes[name] = _outcome(asked, name, variants[name], update, taken[name], first)
            if progress is not None:
                progress("steps compared", len(outcomes), len(names))
    return Comparison(
        outcomes=outcomes,
        steps=infos,
        mode="forward" if shared is None else "reverse",
        level=asked.options.level,
        evaluation=BatchCounts.of(evaluation),
        update_batch=BatchCounts.of(update),
        notes=tuple(dict.fromkeys(asked.said.notes)),
        timings=asked.passes.clock.seconds,
        environment=describe_environment(policy.device, params),
    )


def _variants(steps: Mapping[str, Step | Variant]) -> dict[str, Variant]:
    if not isinstance(steps, Mapping) or not steps:
        raise InputError("There are no steps to compare; give at least one, such as {'grpo': make_step(...)}.")
    found = {str(name): step if isinstance(step, Variant) else Variant(step) for name, step in steps.items()}
    if wrong := [name for name, variant in found.items() if not isinstance(variant.step, Step)]:
        raise InputError(f"'{wrong[0]}' is no step; expected what make_step returns, or a Variant of it.")
    return found


def _observables(evaluation: Rollouts) -> dict[str, Observable]:
    reward: dict[str, Observable] = {} if evaluation.rewards is None else {"reward": expected_reward()}
    return {"entropy": entropy(), **reward, "kl": kl()}


class _Gradient(NamedTuple):
    """The gradient of one objective on one U."""

    step: Step
    update: Rollouts
    gradient: Gradients
    info: dict[str, float]
    said: Messages


class _Gradients:
    """Gradients on U, one for every objective and batch that the variants have, made when first asked for."""

    def __init__(self, asked: Inquiry, params: Params, update: Rollouts) -> None:
        self._asked, self._params, self._update = asked, params, update
        self._found: list[_Gradient] = []

    def of(self, variant: Variant) -> _Gradient:
        """Return the gradient that a variant's step is made of."""
        batch = variant.on(self._update)
        for known in self._found:
            if known.update is batch and _same_gradient(known.step, variant.step):
                return known
        passes, said = self._asked.passes, Messages(quiet=True)
        with said.recording(), passes.clock("gradients on U"):
            gradient, info = variant.step.gradient(self._params, batch, progress=passes.progress)
        said.notes += left_alone(gradient)
        self._found.append(_Gradient(variant.step, batch, gradient, info, said))
        return self._found[-1]


def _same_gradient(a: Step, b: Step) -> bool:
    return a.policy is b.policy and a.objective == b.objective and a.microbatch == b.microbatch


def _taken(
    asked: Inquiry, name: str, variant: Variant, params: Params, opt_state: OptState, gradients: _Gradients
) -> _Taken:
    with _naming(name):
        found = gradients.of(variant)
        state = opt_state if variant.opt_state is None else variant.opt_state
        with asked.passes.clock("optimizer steps"):
            after = variant.step.apply(params, state, found.gradient, lr=variant.lr, info=found.info)
            move = Move.of(params, after.params, after.update, narrow=is_stored(variant.step.optimizer))
            return _Taken(move, after.info, found.said)


class _Taken(NamedTuple):
    """One variant's step."""

    move: Move
    info: dict[str, float]
    said: Messages  #: of the way to its gradient


def _outcome(asked: Inquiry, name: str, variant: Variant, update: Rollouts, taken: _Taken, first: First) -> Outcome:
    evaluation, update, said = asked.passes.evaluation, variant.on(update), Messages(quiet=True)
    said.notes += taken.said.notes
    said.also([*taken.said.warnings, *before_measuring(evaluation, update, taken.move.size, taken.info)])
    if variant.lr is not None:
        said.also(unequal_groups(variant.step.optimizer))
    own = asked._replace(said=said, independent=is_independent(evaluation, update))
    with _naming(name):
        return measure_step(own, taken.move, first, taken.info)[0]


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Let an error say of which step it speaks.

    Raises:
        InputError: With the name of the step before what it said.
        NumericsError: The same.
        EffectiveSampleSizeError: The same.
    """
    try:
        yield
    except (InputError, NumericsError, EffectiveSampleSizeError) as error:
        hint = ""
        if "written by another optimizer" in str(error):
            hint = " Give Variant(step, opt_state=step.optimizer.init(params)), or the state that belongs to it."
        raise type(error)(f"Step '{name}': {error}{hint}") from error
