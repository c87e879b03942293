"""Attribution where it could go wrong in silence: ties, narrow dtypes, what does not move, names and options."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

import funcprobe as fp
from funcprobe.errors import FuncprobeWarning, InputError
from funcprobe.optimizers.groups import Group
from funcprobe.training.response import respond
from tests.cases import models
from tests.cases.comparing import compared
from tests.cases.probes import Case, E, U, Variant, attributed


def test_a_loss_that_ranks_tokens_is_asked_at_the_scores_that_it_ranked() -> None:
    """A scoring pass cuts its readout and a gradient pass does not: their scores differ by rounding, and ties break."""
    # one prompt, one token each: 129 contexts that are one context; a chunk of the scoring pass holds 128 of them
    tied = fp.rollouts_from_lists(
        [[1, 2]] * 129, [[k % 7] for k in range(129)], temperature=1.0, rewards=[float(7 * k % 5) for k in range(129)]
    )
    for seed in range(4):  # which of them tie apart depends on the machine's matrix product
        policy, params = fp.from_module(wide(seed))
        step = fp.make_step(policy, fp.top_entropy_quantile(top_entropy_quantile=0.2), fp.sgd(1e-2))
        loss = step.loss_gradient(params, tied)
        # the loss at the scores that come with its gradient is the loss, whichever tokens they rank first
        assert loss.info["loss"] == float(step.objective(loss.scores, step.objective.prepare(tied))[0])
        found = fp.attribute(
            fp.Update.from_step(step, params, step.optimizer.init(params), tied), models.rollouts(6), bars=None
        )
        assert found.completeness["batch tokens"] < 1e-5, seed  # float32 passes; another token picked leaves 1e-3


def wide(seed: int) -> Any:
    """Return a GPT-2 whose vocabulary makes a scoring pass cut its readout."""
    return models.gpt2(torch.float32, vocabulary=50_000, seed=seed, n_positions=16, n_layer=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_jacobian_form_of_a_linear_step_is_the_additive_one_in_a_narrow_dtype(dtype: torch.dtype) -> None:
    policy, params = fp.from_module(models.two_lines(dtype))
    step = fp.make_step(policy, fp.grpo(), fp.sgd(1e-7))
    gradient, _ = step.gradient(params, U)
    c = models.direction(params, scale=1.0)
    one, other = (
        respond(step.rule, params, step.optimizer.init(params), gradient, c, form=form).direction  # type: ignore[arg-type]
        for form in ("additive", "jacobian")
    )
    for name, u in one.items():
        assert other[name].dtype == torch.float32
        torch.testing.assert_close(other[name], u, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_observable_that_does_not_move_is_complete_and_can_be_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    case = Case(models.gpt2(dtype))
    for n, observable in (
        (6, fp.mean_length()),
        (49, fp.mean_length()),
        (3, fp.expected_reward()),
        (7, fp.expected_reward()),
    ):
        prompts, completions = [[1 + k % 5] for k in range(n)], [[2 + k % 3, 3, 1 + k % 4] for k in range(n)]
        limit = fp.rollouts_from_lists(prompts, completions, temperature=0.8, rewards=[0.7] * n)
        found = attributed(case, limit, observables=observable)
        assert found.first_order == 0.0
        assert found.evaluation.magnitude() > 0.0  # what is left is rounding of F, 1e-17 of it a token
        assert found.completeness_error == 0.0
        assert fp.Attribution.load(found.save(tmp_path / f"{observable.name} {n}")).completeness_error == 0.0


def test_an_observable_without_weights_has_no_bars_of_parts_either() -> None:
    @fp.observable("plain", "nats")
    def plain(scores: Any, anchor: Any, rollouts: Any) -> Any:
        return scores.entropy.sum() / len(rollouts.ids)

    found = attributed(Case("two lines"), observables=plain, bars_of=["ledger", "layers"])
    assert found.bars == {}
    assert any("no error bars of layers: the observable does not use rollouts.weight" in n for n in found.probe.notes)


def test_what_does_not_move_has_bars_of_nothing() -> None:
    """A divergence has no first order, and no step moves nothing: that is no lack of weights."""
    case = Case("two lines")
    flat = attributed(case, bars_of=["ledger"], observables=fp.kl())
    with pytest.warns(FuncprobeWarning, match="The step is zero"):
        still = fp.attribute(case.update(0.0), E, bars_of=["ledger"])
    for found in (flat, still):
        assert [tuple(row[:2]) for row in found.bars["ledger"].values()] == [(0.0, 0.0)] * 3


def test_an_observable_that_looks_at_its_weights_is_told_so() -> None:
    @fp.observable("curious", "nats")
    def curious(scores: Any, anchor: Any, rollouts: Any) -> Any:
        return (scores.entropy.sum(1) * rollouts.weight).sum() * (2.0 if float(rollouts.weight.sum()) > 3 else 1.0)

    found = attributed(Case("two lines"), observables=curious, bars_of=["ledger"])
    assert any(
        "no error bars of ledger: An observable looks at the values of its weights" in n for n in found.probe.notes
    )


def test_a_statistic_under_a_predictors_name_is_refused() -> None:
    class Own:
        name, separable = "own", True
        stats = MappingProxyType({"sum_p2": lambda log_probs, token: log_probs.amax(-1)})

        def prepare(self, rollouts: fp.Rollouts) -> fp.Rollouts:
            return fp.grpo().prepare(rollouts)

        def __call__(self, scores: fp.TokenScores, rollouts: fp.Rollouts) -> Any:
            return (scores.extra["sum_p2"] * scores.logp).sum(), {}

    case = Case("two lines")
    case.step = dataclasses.replace(case.step, objective=Own())
    with pytest.raises(InputError, match="'own' declares a statistic 'sum_p2', which is what the predictors call"):
        attributed(case)


def test_what_no_pass_could_give_is_refused_before_any() -> None:
    calls: list[str] = []
    lifted = Case("two lines", fp.from_torch(torch.optim.RMSprop, lr=1e-4)).watched(calls)
    case = Case("two lines").watched(calls)
    refused = {
        "bars_of needs the additive form": lambda: attributed(lifted, bars_of=["ledger"]),
        "RMSprop has no additive form": lambda: attributed(lifted, form="additive"),
        "tokenizer is 'gpt2', which cannot decode": lambda: attributed(case, tokenizer="gpt2"),
        "keep_scores can do nothing in an attribution": lambda: attributed(case, keep_scores=True),
        "leaves is the single string 'head.weight'": lambda: attributed(
            case, influence="prompts", leaves="head.weight"
        ),
        "There is no option 'ordr'": lambda: compared(case, {"grpo": case.step}, ordr=2),
        "There are no updates to compare": lambda: fp.compare([case.update()], E),
        "rounding can do nothing in a comparison": lambda: compared(case, {"grpo": case.step}, rounding=True),
    }
    for message, call in refused.items():
        with pytest.raises(InputError, match=message):
            call()
    assert calls == []


def test_scores_without_the_statistic_of_an_observable_are_told_so() -> None:
    result = Case("two lines").probe(1e-3, keep_scores=True)
    wanting = fp.observable("collision", "", stats={"top": lambda log_probs, token: log_probs.amax(-1)})(
        lambda scores, anchor, rollouts: scores.extra["top"].sum()
    )
    with pytest.raises(InputError, match="no statistic 'top', which 'collision' needs; probe with it among"):
        fp.attribute_evaluation(result, wanting)
    with pytest.raises(InputError, match="is no observable"):
        fp.attribute_evaluation(result, fp.entropy)  # type: ignore[arg-type]
    assert fp.attribute_evaluation(result, {"entropy": fp.entropy()}).sum() == pytest.approx(result.first_order)  # type: ignore[arg-type]


def test_a_difference_that_was_not_measured_is_refused_and_one_from_no_step_is_known() -> None:
    case = Case("two lines")
    found = compared(case, {"nothing": Variant(case.step, lr=0.0), "grpo": case.step})
    with pytest.raises(InputError, match="no second order; ask compare for it with order=2"):
        found.difference("grpo", quantity="second_order")
    difference, alone = found.difference("grpo"), found.reading("grpo")
    assert difference.value == alone.change
    assert difference.error == pytest.approx(alone.bars["change"].error, rel=1e-12)
    assert math.isfinite(found.difference("grpo", quantity="first_order").error)


def test_a_learning_rate_in_place_of_several_is_said_of_its_step() -> None:
    case = Case("two lines")
    groups = [Group(("embed.weight",), {"lr": 1e-2}), Group(("head.weight", "head.bias"), {"lr": 3e-2})]
    step = dataclasses.replace(case.step, optimizer=fp.adamw(1e-2, groups=groups))
    steps = {"one rate": Variant(step, lr=1e-3), "as trained": Variant(step)}
    found = compared(case, steps)
    assert list(found.warnings) == ["one rate"]
    assert "learning rates 0.01, 0.03" in found.warnings["one rate"][0]
