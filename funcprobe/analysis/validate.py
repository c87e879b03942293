"""The counterfactual test of attribution: drop the tokens that a method ranks first, redo the true step, measure ΔF."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from funcprobe import engine
from funcprobe.analysis.probe import provenance_of
from funcprobe.arguments import checked
from funcprobe.attribution.counterfactual import Resteps
from funcprobe.attribution.predictors import check_stats
from funcprobe.attribution.rankings import METHODS, check_methods, rankings
from funcprobe.attribution.step_parts import StepParts
from funcprobe.attribution.trials import Trial
from funcprobe.data.rollouts import members, overlap, take
from funcprobe.errors import InputError, Note
from funcprobe.measurement.cautions import step
from funcprobe.measurement.measurement import Measurement, Observables
from funcprobe.measurement.options import Options
from funcprobe.measurement.update import Update
from funcprobe.results.provenance import BatchCounts
from funcprobe.results.validation import Validation
from funcprobe.training.response import form_of
from funcprobe.types import Microbatch, Params, Progress, Rollouts, TokenScores

Units = Literal["tokens", "prompts"]

_DEFAULT = Options()


@checked
def validate(
    update: Update,
    evaluation: Rollouts,
    observables: Observables = None,
    *,
    fit: Rollouts | None = None,
    shares: Sequence[float] = (0.01, 0.02, 0.05, 0.1),
    units: Units = "tokens",
    methods: Sequence[str] | None = None,
    random: int = 8,
    subsets: int = 32,
    seed: int = Options.seed,
    microbatch: Microbatch = _DEFAULT.microbatch,
    progress: Progress | None = None,
) -> Validation:
    """Return the true effect of dropping the tokens, or prompts, of U that methods of attribution rank first.

    Estimand: `ΔF(step without the dropped) − ΔF(step)`, importance-sampled on E; the dropped keep their part in the
    normaliser of the loss. Rankings see `fit` and no rollout of E, so that no method is tried on the noise that it was
    made from; one E serves all re-steps, and its own sampling error is common to all of them. Beside it: the same for
    random drops, the correlation of leaving one prompt out with the prompt's score, and the linear datamodelling score
    (Park et al., arXiv 2303.14186). A re-step costs a backward pass over the rows that lose tokens and a pass over E.

    Args:
        update: θ and how it is about to change: an update that was made from a batch.
        evaluation: Rollouts E, drawn at θ, apart from U.
        observables: One, or several by name, of which the first is used; by default the entropy per token.
        fit: Rollouts drawn at θ on which the methods rank. None has every second prompt of E for that, and the others
            for the measurement.
        shares: Shares of U's tokens, or prompts, that are dropped; at least one token, or prompt, each.
        units: "tokens" or "prompts"; the score of a prompt is the sum over its tokens.
        methods: Names from `rankings.METHODS`; None takes all for which the optimizer has a form.
        random: How many random drops a share gets.
        subsets: How many random halves of the prompts are stepped with; 0 leaves out these, and the prompts left out.
        seed: Of random drops and halves.
        microbatch: How batches are cut for the model; it changes memory and no result.
        progress: Called as progress(what, done, total).

    Raises:
        InputError: If an option, a batch or the optimizer is not usable, or the update knows no batch.
        NumericsError: If scores, gradients or steps are not finite.
        ForwardModeError: If the model has no forward derivative and a method needs one.
    """
    update.need("batch", "A validation")
    assert update.step is not None
    _check(shares, units, random, subsets, seed)
    chosen = _methods(update, methods)
    check_stats(update.step.objective)
    ranked, measured = _halves(evaluation) if fit is None else (fit, evaluation)
    options = Options(microbatch=microbatch)
    measurement, on_fit = (Measurement.of(update, E, observables, options, progress) for E in (measured, ranked))
    parts = _parts(measurement, update)
    gradient = _gradient_of_f(on_fit, parts)
    with measurement.passes.clock("rankings"):
        scores = rankings(parts, gradient, chosen)
    resteps = Resteps.of(parts, measurement.passes._replace(progress=None), measurement.main[1])
    trial = Trial.of(resteps, units, progress)
    generator = torch.Generator().manual_seed(seed)
    if overlap(ranked, measured).prompts:
        measurement.messages.warn(
            Note("overlap", "fit and E share prompts, so a method may be tried on its own noise.")
        )
    return Validation(
        observable=measurement.main[0],
        dropped=units,
        base=trial.base,
        drops=trial.drops(scores, shares),
        chance=tuple(trial.chance(share, random, generator) for share in shares),
        agreements=trial.agreements(scores, subsets, generator),
        fit=BatchCounts.of(ranked),
        subsets=subsets,
        provenance=provenance_of(measurement, update, "forward"),
        notes=tuple(measurement.messages.notes),
        warnings=tuple(measurement.messages.warnings),
    )


def _check(shares: Sequence[float], units: str, random: int, subsets: int, seed: int) -> None:
    if units not in get_args(Units):
        raise InputError(f"Unknown units {units!r}; expected 'tokens' or 'prompts'.")
    if isinstance(shares, str) or not shares or not all(isinstance(s, float) and 0 < s < 1 for s in shares):
        raise InputError(f"shares is {shares!r}; expected numbers between 0 and 1, such as (0.01, 0.1).")
    for name, value, least in (("random", random, 1), ("subsets", subsets, 0), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} is {value!r}; expected a whole number of at least {least}.")


def _methods(update: Update, asked: Sequence[str] | None) -> tuple[str, ...]:
    """Return the methods that were asked for, or all for which the optimizer has a form.

    Raises:
        InputError: If one is unknown.
    """
    if asked is not None:
        return check_methods(asked)
    assert update.rule is not None
    form = form_of(update.rule.optimizer, "auto")
    return tuple(name for name in METHODS if form == "additive" or name != "additive")


def _halves(evaluation: Rollouts) -> tuple[Rollouts, Rollouts]:
    """Return the rollouts of every second prompt, and the others.

    Raises:
        InputError: If there is one prompt.
    """
    prompts = [rows for _, rows in members(evaluation, "prompts")]
    if len(prompts) < 2:
        raise InputError("evaluation holds one prompt, and rankings need rollouts of their own; give fit=...")
    ranked, measured = (torch.cat(prompts[k::2]).sort().values for k in range(2))
    return take(evaluation, ranked), take(evaluation, measured)


def _parts(measurement: Measurement, update: Update) -> StepParts:
    assert update.step is not None
    move, _ = step(measurement, update)
    return StepParts.of(update, move, measurement.passes.cut_of(update.step.microbatch), "additive")


def _gradient_of_f(measurement: Measurement, parts: StepParts) -> Params:
    """Return ∇F on the rollouts that rank."""
    observable = measurement.main[1]

    def f(scores: TokenScores, rollouts: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        return observable(scores, engine.detached(scores), rollouts), {}

    return dict(measurement.passes.gradient(f, parts.params, "gradient of F for the rankings").gradient)
