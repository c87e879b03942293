"""Diagnosis: what the other verbs say, in one result; and a verdict, never an exception, where less is known."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe.errors import FuncprobeWarning, InputError
from funcprobe.measurement.variants import AS_IT_IS, variants_of
from funcprobe.report.terminal import text_of
from funcprobe.results.diagnosis import Diagnosis
from funcprobe.results.diagnosis_rules import NOT_KNOWN
from funcprobe.results.diagnosis_words import COLUMNS, LINES
from tests.cases import models
from tests.cases.kept import same
from tests.cases.probes import Case, E, Offset, U

QUESTIONS = 8
CASE = Case()


def fits(found: Diagnosis) -> None:
    """Check that the page on a terminal has its size, and that it is read back as it was."""
    lines = text_of(found).splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    assert len(found.answers) == QUESTIONS
    assert all(answer.sentence.endswith(".") and answer.advice for answer in found.answers)


def unknown(found: Diagnosis) -> list[int]:
    """Return the numbers of the questions that were not answered."""
    return [k for k, answer in enumerate(found.answers, 1) if answer.verdict == NOT_KNOWN]


@pytest.fixture(scope="module")
def whole() -> Diagnosis:
    return fp.diagnose(CASE.update(), E)


def test_it_holds_what_the_verbs_say(whole: Diagnosis) -> None:
    parts = fp.attribute(CASE.update(), E, {"entropy": fp.entropy(), "reward": fp.expected_reward(), "kl": fp.kl()})
    assert whole.attribution is not None
    assert whole.probe.change == pytest.approx(parts.probe.change, rel=1e-12)
    assert list(whole.probe.readings) == ["entropy", "reward", "kl"]
    assert whole.attribution.ledger == pytest.approx(parts.ledger, rel=1e-9)
    assert set(whole.attribution.bars) == {"ledger", "layers", "prompts"}  # few rows have bars unasked
    assert whole.curve is not None
    lr = CASE.optimizer.lr
    assert whole.curve.at(lr).main.change == pytest.approx(parts.probe.change, rel=1e-4)  # the tolerance of a curve
    assert (whole.curve.lrs[0], whole.curve.lrs[-1]) == pytest.approx((lr / 100, lr * 10))
    assert whole.comparison is not None
    assert whole.comparison.baseline == AS_IT_IS
    assert whole.comparison.reading(AS_IT_IS).change == pytest.approx(parts.probe.change, rel=1e-9)
    assert whole.left_out == {"clip-higher": "every ratio is 1, where clipping does nothing"}
    assert whole.missing == {}
    assert whole.alone is None
    assert set(whole.drawn) == {"E", "U"}
    fits(whole)


def test_it_is_kept_and_read_back(whole: Diagnosis, tmp_path: Path) -> None:
    whole.save(tmp_path / "out")
    loaded = fp.load(tmp_path / "out")
    assert isinstance(loaded, Diagnosis)
    assert loaded.answers == whole.answers
    assert loaded.summary() == whole.summary()
    assert same(loaded.to_dict(), whole.to_dict())
    assert text_of(loaded) == text_of(whole)


def test_one_gradient_on_the_batch_serves_all_of_it() -> None:
    """It runs the model over U as often as an attribution and a comparison of one update do, and no oftener."""
    calls: list[str] = []
    watched = CASE.watched(calls)
    fp.diagnose(watched.update(), E, bars=None)
    together = calls.count("U")
    calls.clear()
    update = watched.update()
    fp.attribute(update, E, bars=None)
    fp.compare(variants_of(update, None, CASE.optimizer.lr).updates, E, bars=None)
    assert together == calls.count("U")
    fresh = watched.update()
    calls.clear()
    fresh.gradient()
    assert calls.count("U") > 0  # what a second gradient would have added


def test_an_update_of_two_checkpoints_knows_its_parameters_alone() -> None:
    delta = CASE.step(CASE.params, CASE.state, U).delta
    found = fp.diagnose(fp.Update.from_delta(CASE.policy, CASE.params, delta), E)
    assert unknown(found) == [2, 3, 5, 6, 8]
    assert found.curve is None
    assert "knows neither tokens of U nor a gradient" in found.answer("batch at hand").sentence
    assert "the update has no learning rate" in found.answer("too large").sentence
    assert found.probe.change == pytest.approx(fp.probe(CASE.update(), E).change, rel=1e-9)
    assert found.probe.evidence is None
    fits(found)


def test_an_update_of_a_gradient_knows_learning_rates_and_no_tokens() -> None:
    gradient = CASE.step.gradient(CASE.params, U)[0]
    update = fp.Update.from_gradient(CASE.policy, CASE.optimizer, CASE.params, CASE.state, gradient)
    found = fp.diagnose(update, E)
    assert unknown(found) == [2, 3, 5, 6]
    assert found.largest is not None
    assert found.comparison is not None
    assert list(found.comparison.outcomes) == [AS_IT_IS, "half the lr"]
    assert "knows no tokens of U" in found.answer("which prompts").sentence
    fits(found)


class NoForward(torch.autograd.Function):
    """tanh with a backward and no forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient[0] * (1 - y * y)


class ReverseOnly(models.TwoLines):
    """The small policy with an operation that has no forward derivative."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(NoForward.apply(self.embed(ids)))


def reverse_only() -> nn.Module:
    with models.seeded(3):
        return ReverseOnly().double()


def test_a_model_without_forward_mode_is_answered_for_as_far_as_reverse_mode_goes() -> None:
    case = Case(reverse_only())
    found = fp.diagnose(case.update(), E)
    assert found.probe.mode == "reverse"
    assert unknown(found) == [2, 3, 6]
    assert "The model has no forward derivative" in found.answer("batch at hand").sentence
    assert found.comparison is not None
    assert found.curve is not None
    assert found.curve.nodes == 0
    assert found.largest is not None
    assert found.largest.lr in found.curve.lrs
    fits(found)
    with pytest.raises(fp.errors.ForwardModeError):
        fp.diagnose(case.update(), E, mode="forward")


def test_reverse_mode_can_be_asked_for() -> None:
    found = fp.diagnose(CASE.update(), E, mode="reverse", bars=None)
    assert "Mode reverse keeps no tangents" in found.answer("batch at hand").sentence
    fits(found)


@pytest.mark.parametrize(
    "optimizer",
    [fp.sgd(1e-3), Offset(), fp.from_torch(torch.optim.RMSprop, lr=1e-3)],
    ids=["sgd", "not proportional", "rmsprop"],
)
@pytest.mark.filterwarnings("ignore:One entry of")  # of RMSprop's first steps, and true
def test_optimizers_of_other_kinds_are_answered_for(optimizer: Any) -> None:
    case = Case(optimizer=optimizer)
    found = fp.diagnose(case.update(), E, bars=None)
    assert (found.answer("batch at hand").verdict == NOT_KNOWN) == isinstance(optimizer, Offset)
    assert found.largest is not None
    assert found.answer("too large").verdict != NOT_KNOWN
    assert found.answer("change it").verdict != NOT_KNOWN
    fits(found)


def test_without_bars_nothing_is_told_and_a_zero_step_says_so() -> None:
    with pytest.warns(FuncprobeWarning, match="The step is zero"):
        still = fp.diagnose(CASE.update(lr=0.0), E, bars=None)
    assert still.answer("fall").verdict == "does not move"
    assert still.answer("batch at hand").verdict == "nothing moved"
    assert still.curve is None
    fits(still)
    assert fp.diagnose(CASE.update(), E, bars=None).answer("fall").verdict == NOT_KNOWN


def test_a_stale_batch_of_another_policy_that_is_clipped_is_seen() -> None:
    own = fp.score(CASE.policy, CASE.params, U).logp
    g = torch.Generator().manual_seed(6)
    old = (own + 0.3 * torch.randn(own.shape, generator=g, dtype=torch.float64)) * U.completion_mask
    stale = fp.diagnose(CASE.update(batch=U._replace(old_logps=old)), E, bars=None)
    assert stale.answer("stale").verdict == "stale"
    assert stale.answer("clipping").verdict == "acts"
    assert stale.comparison is not None
    assert "clip-higher" in stale.comparison.outcomes
    fits(stale)
    nucleus = U._replace(top_p=torch.full((len(U.ids),), 0.9, dtype=torch.float64))
    assert fp.diagnose(CASE.update(batch=nucleus), E, bars=None).answer("stale").verdict == "another policy"


def test_a_step_that_its_storage_loses_is_seen() -> None:
    case = Case("two lines, float32", optimizer=fp.adamw(1e-6))
    storage = dict.fromkeys(case.params, torch.bfloat16)
    params = {name: p.bfloat16().float() for name, p in case.params.items()}
    optimizer = fp.stored(fp.adamw(1e-6), storage)
    step = dataclasses.replace(case.step, optimizer=optimizer)
    update = fp.Update.from_step(step, params, optimizer.init(params), U)
    found = fp.diagnose(update, E, bars=None)
    answer = found.answer("storage")
    assert answer.verdict == "lost"
    assert "ΔF exact" in answer.sentence
    fits(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 2}, "order can do nothing in a diagnosis; leave it out"),
        ({"keep_scores": True}, "keep_scores can do nothing in a diagnosis"),
        ({"bars_of": ["nothing"]}, "bars_of names 'nothing'"),
        ({"level": 2.0}, "level is 2.0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fp.diagnose(CASE.update(), E, **options)
