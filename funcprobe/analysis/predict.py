"""Published predictors of the entropy change for an update: from one pass over U, without E, gradient or optimizer."""

from __future__ import annotations

from funcprobe import engine
from funcprobe.arguments import checked
from funcprobe.attribution.predictors import STATS, Predictions, predictions
from funcprobe.measurement.options import Options
from funcprobe.measurement.update import Update
from funcprobe.types import Microbatch, Progress

_DEFAULT = Options()


@checked
def predict(
    update: Update, *, microbatch: Microbatch = _DEFAULT.microbatch, progress: Progress | None = None
) -> Predictions:
    """Return the published predictors of the entropy change of an update, from one no-grad pass over its batch.

    See `predictions` for formulas, estimand and bias. Scores are taken at the temperature of the rollouts; advantages
    are those of the update's objective, and the predictions are proportional to its learning rate.

    Args:
        update: θ and how it is about to change: an update that was made from a batch.
        microbatch: How U is cut for the model; it changes memory and no result.
        progress: Called as progress(what, done, total).

    Raises:
        InputError: If the update knows no batch, or that has neither rewards nor advantages, or no completion token.
        NumericsError: If a score is not finite; the message names the sequences.
    """
    update.need("batch", "A prediction")
    assert update.step is not None
    assert update.batch is not None
    assert update.rule is not None
    prepared = update.step.objective.prepare(update.batch)
    scores = engine.scores(
        update.policy,
        update.params,
        prepared,
        stats=STATS,
        microbatch=microbatch,
        progress=progress,
        what="U, predictors",
    )
    return predictions(scores, prepared, update.rule.optimizer.lr if update.lr is None else update.lr)
