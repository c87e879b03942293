"""Cautions beside a result's numbers: overlaps, sampler mismatch, degenerate weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from funcprobe.data.rollouts import overlap
from funcprobe.errors import EffectiveSampleSizeError, listed
from funcprobe.estimators.importance import SamplerMismatch, WeightHealth, sampler_mismatch
from funcprobe.measurement.messages import Messages
from funcprobe.measurement.move import Movement
from funcprobe.policy.module import Policy
from funcprobe.policy.training_only import training_cautions
from funcprobe.types import Gradients, Observable, Optimizer, Rollouts, TokenScores

#: Mean absolute difference between the sampler's log-probs and ours, nats per token, above which a result says so.
SAMPLER_MISMATCH = 0.02

#: Pareto k̂ above which importance-sampled estimates are unreliable (Vehtari et al., arXiv 1507.02646).
KHAT_LIMIT = 0.7

#: ESS fraction above which the weights are so nearly equal that the shape of their tail, which k̂ fits, weighs nothing.
NEARLY_EQUAL = 0.99


def before_measuring(
    evaluation: Rollouts, update: Rollouts, moved: Movement, info: Mapping[str, float]
) -> Iterator[str]:
    """Yield what should be known of the batches and the step before anything is measured."""
    if moved.norm == 0.0:
        yield f"The step is zero at learning rate {info['lr']:g}: no parameter moves, and neither does anything else."
    shared = overlap(evaluation, update)
    if shared.sequences:
        yield (
            f"{shared.sequences} of {evaluation.ids.shape[0]} evaluation sequences also stand in the update batch; on "
            "them the measured change is optimistic, so draw E apart from U."
        )
    if "sampler_gap" in info:
        yield from _mismatch(SamplerMismatch(info["sampler_gap"], info["sampler_ratio"]), update, "update")


def about_the_copy(policy: Policy, update: Rollouts) -> Iterator[str]:
    """Yield what was found out about the copy of a module, and whether padding in training would be seen by it.

    A trainer that pads prompts on the left trains on other scores than those of the rows, where a model counts padding.
    """
    if policy.checks is not None:
        yield from policy.checks.notes
        yield from training_cautions(
            tuple(term for term in policy.checks.training if term.kind == "left padding"), update
        )


def left_alone(gradient: Gradients) -> Iterator[str]:
    """Yield a word on the leaves that U gives no gradient, which an optimizer passes over."""
    if alone := [name for name in gradient if gradient[name] is None]:
        yield (
            f"{len(alone)} of {len(gradient)} leaves have no gradient on U and are left alone, as torch.optim does: "
            f"{listed(alone)}"
        )


def unequal_groups(optimizer: Optimizer) -> Iterator[str]:
    """Yield a word where a learning rate that is set for a step takes the place of several."""
    groups = getattr(optimizer, "groups", ())
    rates = sorted({float(group.hyperparameters["lr"]) for group in groups if "lr" in group.hyperparameters})
    if len(rates) > 1:
        yield (
            f"The optimizer's groups have learning rates {', '.join(f'{r:g}' for r in rates)}, and all of them are set "
            "to the one that was given: this is not the step that training takes."
        )


def is_independent(evaluation: Rollouts, update: Rollouts) -> bool:
    """Return whether E shares neither sequences nor prompts with the batch that the step was made from."""
    shared = overlap(evaluation, update)
    return not (shared.sequences or shared.prompts)


def after_measuring(anchor: TokenScores, evaluation: Rollouts, health: WeightHealth) -> Iterator[str]:
    """Yield what the anchor's scores and the weights reveal about the rollouts."""
    if health.khat is not None and health.khat > KHAT_LIMIT and health.fraction("sequence") < NEARLY_EQUAL:
        yield (
            f"Pareto k̂ is {health.khat:.2f}, above {KHAT_LIMIT}: the sequence weights have a heavy tail and their "
            "estimates are not reliable; take a smaller learning rate or more rollouts."
        )
    found = sampler_mismatch(anchor, evaluation)
    if found is not None:
        yield from _mismatch(found, evaluation, "evaluation")


def _mismatch(found: SamplerMismatch, rollouts: Rollouts, which: str) -> Iterator[str]:
    size = f"by {found.gap:.3g} nats per token (mean ratio {found.ratio:.3g}) from the recomputed ones, which are used"
    if _is_truncated(rollouts):
        yield (
            f"The {which} rollouts come from a truncated sampler (top_p, top_k), so they are not the policy's own; "
            f"their log-probabilities differ {size}."
        )
    elif found.gap > SAMPLER_MISMATCH:
        yield (
            f"The sampler's log-probabilities of the {which} rollouts differ {size}: engine, precision, temperature or "
            "checkpoint may not be those that sampled."
        )


def _is_truncated(rollouts: Rollouts) -> bool:
    nucleus = rollouts.top_p is not None and bool((rollouts.top_p < 1).any())
    return nucleus or (rollouts.top_k is not None and bool((rollouts.top_k > 0).any()))


def check_ess(health: WeightHealth, observable: Observable, threshold: float, action: str, said: Messages) -> None:
    """Warn or raise where the effective sample, on the weights that the observable uses, is below the threshold.

    Raises:
        EffectiveSampleSizeError: If it is and `action` is "raise".
    """
    fraction = ess_fraction(health, observable)
    if fraction >= threshold:
        return
    message = (
        f"The effective sample size is {fraction:.1%} of the evaluation rollouts, below {threshold:.0%}: the step is "
        "too large for these rollouts to measure it; take a smaller learning rate or more rollouts."
    )
    if action == "raise":
        raise EffectiveSampleSizeError(message)
    said.also([message])


def ess_fraction(health: WeightHealth, observable: Observable) -> float:
    """Return the effective sample, on the weights that the observable uses, as a fraction of the sample."""
    weighting: Any = getattr(observable, "weighting", "sequence")
    if weighting == "none":  # a plain mean over rollouts uses all of them
        return 1.0
    return health.fraction(weighting, inclusive=getattr(observable, "integrand", "") == "surprisal")
