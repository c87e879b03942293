"""One update, asked in the order in which one would ask: eight answers, made of the other verbs alone."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple, Unpack

from funcprobe.analysis.attribute import attribute
from funcprobe.analysis.compare import compare
from funcprobe.analysis.curve import curve
from funcprobe.analysis.probe import probe
from funcprobe.arguments import checked
from funcprobe.attribution.parameter_parts import layer_label, read_name
from funcprobe.attribution.predictors import check_stats
from funcprobe.errors import ForwardModeError, InputError, NumericsError, collected_notes
from funcprobe.estimators.divergence import kl
from funcprobe.estimators.observables import entropy
from funcprobe.estimators.returns import expected_reward
from funcprobe.measurement.bounds import Bounds
from funcprobe.measurement.cautions import ess_fraction
from funcprobe.measurement.drawn import Drawn, Ratios, drawn_of, ratios_of
from funcprobe.measurement.measurement import Observables, named
from funcprobe.measurement.options import OF_ONE_STEP, Given, Options, options_of
from funcprobe.measurement.update import Update
from funcprobe.measurement.variants import Variants, variants_of
from funcprobe.results.any_lr import CurveResult
from funcprobe.results.attribution import Attribution
from funcprobe.results.comparison import Comparison
from funcprobe.results.curve import lr_of
from funcprobe.results.diagnosis import Diagnosis
from funcprobe.results.diagnosis_answers import answers_of
from funcprobe.results.diagnosis_remedies import REWARD
from funcprobe.results.diagnosis_rules import LIMITS
from funcprobe.results.findings import Findings, LargestStep
from funcprobe.results.probe import ProbeResult
from funcprobe.training.response import form_of
from funcprobe.types import Observable, Progress, Rollouts

#: Options that a diagnosis settles: it takes the second order from a curve, and rows where a probe would.
IDLE: Collection[str] = (*OF_ONE_STEP, "order", "exact")

#: The learning rates of the curve as multiples of the update's own, which is among them.
MULTIPLES = tuple(10 ** (k / 4) for k in range(-8, 5))

#: Rows of a table up to which they get bars without being asked for.
FEW = 16


@checked
def diagnose(
    update: Update,
    evaluation: Rollouts,
    observables: Observables = None,
    *,
    bars_of: Collection[str] | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    **options: Unpack[Given],
) -> Diagnosis:
    """Return eight answers about an update: does the entropy fall, who did it, is the step too large, ...

    It is made of an attribution with bars of its ledger, a curve around the update's learning rate, and a comparison
    with the variants that apply: half the learning rate, an entropy bonus, clip-higher, Clip-Cov, no negatives. All
    share one gradient on U. Verdicts follow the rules and the one table of thresholds in
    `funcprobe.results.diagnosis_rules`. Where the update knows less, or the model has no forward derivative, what
    needs more gets the verdict "not known" with the reason.

    Args:
        update: θ and how it is about to change; any depth will do.
        evaluation: Rollouts E, drawn at θ, apart from U.
        observables: One, or several by name, of which the first is diagnosed; by default the entropy per token. The
            reward, where E has rewards, and KL(θ′‖θ) are measured beside it.
        bars_of: Tables of the attribution whose rows get bars beside those of the ledger; see `attribute`. None takes
            layers and prompts where they are at most sixteen, since a row costs two passes over E.
        tokenizer: Decodes token ids for the page; without one it shows ids.
        progress: Called as progress(what, done, total).
        **options: See `Options`; order, exact, rounding, top_k, keep_delta and keep_scores can do nothing here.

    Raises:
        InputError: If an option, an observable or a batch is not usable.
        NumericsError: If scores, gradients or contributions are not finite.
        ForwardModeError: In `mode="forward"`, if the model has no forward derivative.
        EffectiveSampleSizeError: With `on_low_ess="raise"`, if the ESS falls below `ess_threshold` of the sample.
    """
    given = options_of(options, "a diagnosis", IDLE)
    asked = _Asked(update, evaluation, _beside(observables, evaluation), options, progress, {})
    parts = asked.attribution(given, bars_of, tokenizer)
    alone = asked.probe() if parts is None else None
    probed = alone if parts is None else parts.probe
    assert probed is not None
    drawn, ratios = asked.drawn(parts, alone)
    around, variants = asked.curve(probed.lr), variants_of(update, ratios, probed.lr)
    found = Findings(
        attribution=parts,
        alone=None if alone is None else replace(alone, evidence=None),
        curve=around,
        largest=None if around is None else largest_step(around, asked.main),
        comparison=asked.comparison(variants),
        ess=min(1.0, ess_fraction(probed.health, asked.main)),
        drawn=drawn,
        ratios=ratios,
        missing=asked.missing,
        left_out=variants.left_out,
    )
    return Diagnosis(**vars(found), answers=answers_of(found), notes=probed.notes, warnings=probed.warnings)


class _Asked(NamedTuple):
    """The question of a diagnosis to the other verbs, and why one of them could not answer."""

    update: Update
    evaluation: Rollouts
    observables: dict[str, Observable]
    options: Given
    progress: Progress | None
    missing: dict[str, str]

    @property
    def main(self) -> Observable:
        """The observable that is diagnosed."""
        return next(iter(self.observables.values()))

    def attribution(self, given: Options, bars_of: Collection[str] | None, tokenizer: Any) -> Attribution | None:
        """Return the parts of the step with bars of its ledger; None, with the reason, where it cannot be had.

        Raises:
            ForwardModeError: In `mode="forward"`, if the model has no forward derivative.
        """
        if (why := self._no_parts(given)) is not None:
            self.missing["attribution"] = why
            return None
        assert self.update.step is not None
        barred = given.bars is not None and form_of(self.update.step.optimizer, "auto") == "additive"
        more = (self._few() if barred else ()) if bars_of is None else bars_of
        tables = tuple(dict.fromkeys([*(["ledger"] if barred else []), *more]))
        try:
            return attribute(
                self.update,
                self.evaluation,
                self.observables,
                bars_of=tables,
                tokenizer=tokenizer,
                progress=self.progress,
                **self.options,
            )
        except ForwardModeError:
            if given.mode == "forward":
                raise
            self.missing["attribution"] = "the model has no forward derivative, which parts are made of"
            return None

    def _few(self) -> tuple[str, ...]:
        """Return the tables that have few rows, whose bars are not dear."""
        assert self.update.batch is not None
        rows = {
            "layers": {layer_label(read_name(name)) for name in self.update.params},
            "prompts": set(self.update.batch.group_ids.tolist()),
        }
        return tuple(table for table, found in rows.items() if len(found) <= FEW)

    def _no_parts(self, given: Options) -> str | None:
        if self.update.depth != "batch":
            return NOT_A_BATCH[self.update.depth]
        if given.mode == "reverse":
            return "mode reverse keeps no tangents, which parts are made of"
        assert self.update.step is not None
        try:
            form_of(self.update.step.optimizer, "auto")
            check_stats(self.update.step.objective)
        except InputError as error:
            return error.text.removesuffix(".")
        return None

    def probe(self) -> ProbeResult:
        """Return the update, measured and predicted, with the scores of E."""
        options: Given = {**self.options, "keep_scores": True}
        return probe(self.update, self.evaluation, self.observables, progress=self.progress, **options)

    def drawn(self, parts: Attribution | None, alone: ProbeResult | None) -> tuple[dict[str, Drawn], Ratios | None]:
        """Return how E and U were drawn, and the ratios of U, from scores at θ that were taken already."""
        kept = None if alone is None or alone.evidence is None else alone.evidence.anchor
        found = {"E": drawn_of(self.evaluation, kept if parts is None else parts.tokens_of("evaluation").scores)}
        if self.update.batch is None:
            return found, None
        scores = self.update.gradient().scores
        found["U"] = drawn_of(self.update.batch, scores)
        return found, None if scores is None else ratios_of(self.update.batch, scores)

    def curve(self, lr: float | None) -> CurveResult | None:
        """Return the change around the update's learning rate; None, with the reason, where there is none."""
        if self.update.rule is None or not lr:
            self.missing["curve"] = "the update has no learning rate"
            return None
        lrs = [lr * c for c in MULTIPLES]
        options: Given = {**self.options, "on_low_ess": "warn"}  # other learning rates were not asked for
        main = dict([next(iter(self.observables.items()))])
        try:
            with collected_notes("curve"):  # they stay with the curve
                return curve(self.update, self.evaluation, lrs[-1], main, lrs=lrs, progress=self.progress, **options)
        except NumericsError as error:
            self.missing["curve"] = error.text.removesuffix(".")
            return None

    def comparison(self, variants: Variants) -> Comparison | None:
        """Return the update beside its variants; None, with the reason, where none applies."""
        if len(variants.updates) < 2:
            self.missing["comparison"] = "; ".join(dict.fromkeys(variants.left_out.values()))
            return None
        options: Given = {**self.options, "on_low_ess": "warn"}
        return compare(variants.updates, self.evaluation, self.observables, progress=self.progress, **options)


NOT_A_BATCH = {
    "gradient": "an update that was made of a gradient knows no tokens of U",
    "delta": "an update that was given as Δθ knows neither tokens of U nor a gradient",
}


def largest_step(around: CurveResult, observable: Observable) -> LargestStep | None:
    """Return the largest learning rate of a curve at which the step is not too large; None where there is none.

    Where the table was scored, and there is no curve to be searched, it is one of the table's.
    """
    limits = {"min_ess": LIMITS["least_ess"], "max_nonlinearity": LIMITS["too_large"]}
    if around.scores is not None:
        with suppress(InputError):  # even the smallest is too large
            found = around.largest(**limits)
            return LargestStep(found.lr, found.limited_by)
        return None
    bounds, kept = Bounds.of(max_abs_delta=None, **limits), None
    for point in around.points:
        broken = bounds.broken(point, observable)
        if broken is not None:
            return None if kept is None else LargestStep(kept, broken)
        kept = lr_of(point)
    return None if kept is None else LargestStep(kept, None)


def _beside(observables: Observables, evaluation: Rollouts) -> dict[str, Observable]:
    """Return the observables by name, with the reward, where E has rewards, and KL beside them."""
    found = {"entropy": entropy()} if observables is None else named(observables)
    price: dict[str, Observable] = {} if evaluation.rewards is None else {REWARD: expected_reward()}
    return {**found, **{name: o for name, o in {**price, "kl": kl()}.items() if name not in found}}
