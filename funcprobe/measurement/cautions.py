"""Cautions beside a result's numbers: overlaps, sampler mismatch, leaves left alone, degenerate weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from funcprobe.data.rollouts import overlap
from funcprobe.errors import EffectiveSampleSizeError, Note, listed, percent
from funcprobe.estimators.importance import SamplerMismatch, WeightHealth, sampler_mismatch
from funcprobe.measurement.measurement import Measurement
from funcprobe.measurement.messages import Messages
from funcprobe.measurement.move import Move
from funcprobe.measurement.update import Update
from funcprobe.policy.training_only import training_cautions
from funcprobe.types import Gradients, Observable, Optimizer, Rollouts, TokenScores

#: Mean absolute difference between the sampler's log-probs and ours, nats per token, above which a result says so.
SAMPLER_MISMATCH = 0.02

#: Pareto k̂ above which importance-sampled estimates are unreliable (Vehtari et al., arXiv 1507.02646).
KHAT_LIMIT = 0.7

#: ESS fraction above which the weights are so nearly equal that the shape of their tail, which k̂ fits, weighs nothing.
NEARLY_EQUAL = 0.99


def step(measurement: Measurement, update: Update) -> tuple[Move, Mapping[str, float]]:
    """Return the move that an update makes, and the info of its step; its cautions go to the measurement's messages.

    Raises:
        InputError: If rollouts, state or learning rate do not fit.
        NumericsError: If scores, gradient or step are not finite.
    """
    passes, messages = measurement.passes, measurement.messages
    if update.depth != "delta":
        with passes.clock("gradient on U"):
            loss = update.gradient(passes.progress)
        messages.warn(*update.warnings)
        messages.add(left_alone(loss.gradient))
    with passes.clock("optimizer step"):
        move, info = update.move()
    messages.warn(*before_measuring(measurement, update, move, info))
    return move, info


def before_measuring(measurement: Measurement, update: Update, move: Move, info: Mapping[str, float]) -> Iterator[Note]:
    """Yield the cautions about the batches and the step that are known before anything is measured."""
    if move.size.norm == 0.0:
        at = f" at learning rate {info['lr']:g}" if "lr" in info else ""
        yield Note("zero step", f"The step is zero{at}: no parameter moves, and neither does anything else.")
    if update.batch is not None:
        evaluation = measurement.passes.evaluation
        shared = overlap(evaluation, update.batch)
        if shared.sequences:
            yield Note(
                "overlap",
                f"{shared.sequences} of {evaluation.ids.shape[0]} evaluation sequences also stand in the update batch; "
                "on them the measured change is optimistic, so draw E apart from U.",
            )
        if "sampler_gap" in info:
            yield from _mismatch(SamplerMismatch(info["sampler_gap"], info["sampler_ratio"]), update.batch, "update")
    if update.lr is not None and update.rule is not None:
        yield from unequal_groups(update.rule.optimizer)


def about_the_copy(update: Update) -> Iterator[str]:
    """Yield the notes on the copy of a module, and a caution where padding in training would change its scores.

    A trainer that pads prompts on the left trains on other scores than those of the rows, where a model counts padding.
    """
    checks = update.policy.checks
    if checks is not None:
        yield from checks.notes
        if update.batch is not None:
            terms = tuple(term for term in checks.training if term.kind == "left padding")
            yield from training_cautions(terms, update.batch)


def left_alone(gradient: Gradients) -> Iterator[Note]:
    """Yield a word on the leaves that U gives no gradient, which an optimizer passes over."""
    if alone := [name for name in gradient if gradient[name] is None]:
        yield Note(
            "left alone",
            f"{len(alone)} of {len(gradient)} leaves have no gradient on U and are left alone, as torch.optim does: "
            f"{listed(alone)}",
        )


def unequal_groups(optimizer: Optimizer) -> Iterator[Note]:
    """Yield a word where a learning rate that is set for a step takes the place of several."""
    groups = getattr(optimizer, "groups", ())
    rates = sorted({float(group.hyperparameters["lr"]) for group in groups if "lr" in group.hyperparameters})
    if len(rates) > 1:
        yield Note(
            "unequal groups",
            f"The optimizer's groups have learning rates {', '.join(f'{r:g}' for r in rates)}, and all of them are set "
            "to the one that was given: this is not the step that training takes.",
        )


def after_measuring(anchor: TokenScores, evaluation: Rollouts, health: WeightHealth) -> Iterator[Note]:
    """Yield the cautions about the rollouts that the anchor's scores and the weights reveal."""
    if health.khat is not None and health.khat > KHAT_LIMIT and health.fraction("sequence") < NEARLY_EQUAL:
        yield Note(
            "khat",
            f"Pareto k̂ is {health.khat:.2f}, above {KHAT_LIMIT}: the sequence weights have a heavy tail and their "
            "estimates are not reliable; take a smaller learning rate or more rollouts.",
        )
    mismatch = sampler_mismatch(anchor, evaluation)
    if mismatch is not None:
        yield from _mismatch(mismatch, evaluation, "evaluation")


def check_ess(health: WeightHealth, observable: Observable, threshold: float, action: str, messages: Messages) -> None:
    """Warn or raise where the effective sample, on the weights that the observable uses, is below the threshold.

    Raises:
        EffectiveSampleSizeError: If it is and `action` is "raise".
    """
    fraction = ess_fraction(health, observable)
    if fraction >= threshold:
        return
    text = (
        f"The effective sample size is {percent(fraction)} of the evaluation rollouts, below "
        f"{percent(threshold, 0)}: the step is too large for these rollouts to measure it; take a smaller learning "
        "rate or more rollouts."
    )
    if action == "raise":
        raise EffectiveSampleSizeError(text, quantity=observable.name, found=fraction, expected=threshold)
    messages.warn(Note("effective sample", text))


def ess_fraction(health: WeightHealth, observable: Observable) -> float:
    """Return the effective sample, on the weights that the observable uses, as a fraction of the sample."""
    return health.fraction(observable.weighting, inclusive=observable.inclusive)


def _mismatch(mismatch: SamplerMismatch, rollouts: Rollouts, which: str) -> Iterator[Note]:
    size = (
        f"by {mismatch.gap:.3g} nats per token (mean ratio {mismatch.ratio:.3g}) from the recomputed ones, which are "
        "used"
    )
    if is_truncated(rollouts):
        yield Note(
            "truncated sampler",
            f"The {which} rollouts come from a truncated sampler (top_p, top_k), so they are not the policy's own; "
            f"their log-probabilities differ {size}.",
        )
    elif mismatch.gap > SAMPLER_MISMATCH:
        yield Note(
            "sampler mismatch",
            f"The sampler's log-probabilities of the {which} rollouts differ {size}: engine, precision, temperature or "
            "checkpoint may not be those that sampled.",
        )


def is_truncated(rollouts: Rollouts) -> bool:
    """Return whether a sampler that was held back by top_p or top_k has drawn some of the rows."""
    nucleus = rollouts.top_p is not None and bool((rollouts.top_p < 1).any())
    return nucleus or (rollouts.top_k is not None and bool((rollouts.top_k > 0).any()))
