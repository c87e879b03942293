"""The stateful baseline against the functional result on the same inputs.

Limits in float64: Δθ to 1e-9 in relative L2 and every number to 1e-9 of its Σ|terms|. Numbers come out within 1e-14:
some 1e2 roundings of 1e-16 each. Δθ comes out within 1e-10: Adam divides the rounding of gradients that are zero in
theory (1e-17, GPT-2's key biases) by its ε of 1e-8. The limit is above both and far below any mistake in a formula.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

import funcprobe as fp
from benchmarks.stateful import StatefulProbe, StatefulResult
from benchmarks.stateful.entropy import accumulate_entropy_gradient, gradient_coefficients
from benchmarks.stateful.scoring import scores
from benchmarks.stateful.snapshot import Snapshot, undisturbed
from benchmarks.stateful.updates import dot, optimizer_step, param_update, trainable
from funcprobe import tree
from funcprobe.engine import math_attention
from funcprobe.types import Params, Rollouts
from tests.cases import models
from tests.cases.live_pairs import adamw, batches, full, lora, sgd, trained

# dropout is off in both, and a probe says so of a run
pytestmark = pytest.mark.filterwarnings("ignore:Dropout acts in training:funcprobe.errors.FuncprobeWarning")

LIMIT = 1e-9
WEIGHTINGS = ("per_decision", "sequence")


def functional(
    pair: tuple[nn.Module, torch.optim.Optimizer], objective: str, *batch: Rollouts, **options: Any
) -> tuple[fp.ProbeResult, Params]:
    """Return funcprobe's result and its Δθ = after − before."""
    checkpoint = fp.from_training(*pair)
    max_grad_norm, lr = options.pop("max_grad_norm", None), options.pop("lr", None)
    step = fp.make_step(checkpoint.policy, getattr(fp, objective)(), checkpoint.optimizer, max_grad_norm, microbatch=4)
    taken = step(checkpoint.params, checkpoint.opt_state, batch[1], lr=lr)
    update = fp.Update.from_step(step, checkpoint.params, checkpoint.opt_state, batch[1], lr)
    found = fp.probe(update, batch[0], microbatch=4, **options)
    return found, tree.sub(taken.params, checkpoint.params)


def assert_equal(mine: StatefulResult, estimate: fp.Estimate, delta: Params, limit: float = LIMIT) -> None:
    assert list(mine.param_update) == list(delta)
    assert float(tree.norm(tree.sub(mine.param_update, delta)) / tree.norm(delta)) <= limit
    assert mine.param_update_l2 == pytest.approx(float(tree.norm(delta)), rel=limit)
    for name, expected in named(estimate).items():
        error = abs(getattr(mine, name) - expected)
        assert error <= limit * mine.terms_scale[name], (name, getattr(mine, name), expected)


def named(estimate: fp.Estimate) -> dict[str, float]:
    """Return a functional estimate under the stateful result's names."""
    assert estimate.first_order is not None
    names = ("H_orig", "H_upd", "deltaH_true", "deltaH1")
    return dict(zip(names, (estimate.before, estimate.after, estimate.change, estimate.first_order), strict=True))


MODELS = {"full": full, "lora": lora}
OPTIMIZERS = {"sgd": sgd, "adamw": adamw}
EVERY = [(m, o, j) for m in MODELS for o in OPTIMIZERS for j in ("dr_grpo", "grpo", "reinforce")]


@pytest.mark.parametrize(("model", "optimizer", "objective"), EVERY)
@pytest.mark.parametrize("old_logps", [False, True], ids=["ratio 1", "old log-probs"])
def test_equals_the_functional_result(model: str, optimizer: str, objective: str, old_logps: bool) -> None:
    module = MODELS[model]()
    pair = module, OPTIMIZERS[optimizer](module)
    trained(*pair)
    evaluation, update = batches(old_logps)
    found, delta = functional(pair, objective, evaluation, update, mode="forward")
    ways = itertools.product(WEIGHTINGS, ("token", "sequence"))
    # old log-probabilities are the step's: what the ways of estimating make of the step is the same with them
    for weighting, per in [("per_decision", "token")] if old_logps else ways:
        probe = StatefulProbe(*pair, objective=objective, microbatch=4, weighting=weighting, per=per)
        mine = probe.run(evaluation, update)
        assert_equal(mine, found.family[f"rao_blackwell/{weighting}/{per}"], delta)
        assert mine.learning_rate_used == found.lr == 1e-3


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_equals_reverse_mode_under_clipping_and_another_learning_rate(weighting: str) -> None:
    module = lora()
    pair = module, sgd(module)
    trained(*pair)
    evaluation, update = batches()
    probe = StatefulProbe(*pair, objective="grpo", microbatch=4, weighting=weighting, max_grad_norm=0.05)
    mine = probe.run(evaluation, update, lr=4e-3)
    options = {"mode": "reverse", "observables": fp.entropy(weighting=weighting), "max_grad_norm": 0.05, "lr": 4e-3}
    with pytest.warns(fp.errors.FuncprobeWarning, match="groups have learning rates"):  # which one replaces
        found, delta = functional(pair, "grpo", evaluation, update, **options)
    assert found.outcome.info["clip_coefficient"] < 0.5
    assert_equal(mine, found.family[found.observable], delta)
    assert mine.learning_rate_used == 4e-3
    assert [group["lr"] for group in pair[1].param_groups] == [1e-3, 2e-3]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("lr", [None, 3e-4])
def test_the_same_gradient_gives_the_same_bits(
    model: str, optimizer: str, dtype: torch.dtype, lr: float | None
) -> None:
    module = MODELS[model](dtype)
    pair = module, OPTIMIZERS[optimizer](module)
    trained(*pair)
    checkpoint = fp.from_training(*pair)
    step = fp.make_step(checkpoint.policy, fp.dr_grpo(), checkpoint.optimizer)
    gradient, _ = step.gradient(checkpoint.params, batches()[1])
    expected = step.apply(checkpoint.params, checkpoint.opt_state, gradient, lr=lr)
    delta = tree.sub(expected.params, checkpoint.params)

    snapshot = Snapshot(*pair, "cpu")
    for name, p in trainable(module).items():
        p.grad = gradient[name].clone()
    optimizer_step(*pair, None, lr)
    assert [group["lr"] for group in pair[1].param_groups] == [1e-3, 2e-3]  # also without the snapshot
    found = param_update(module, snapshot.before)
    snapshot.restore()
    assert list(found) == list(delta)
    for name, d in delta.items():
        assert torch.equal(found[name], d), name
        assert bool(d.any()), name


def test_a_module_without_a_head_of_its_own_is_run_whole() -> None:
    module = models.two_lines()
    pair = module, adamw(module)
    trained(*pair)
    evaluation, update = batches()
    mine = StatefulProbe(*pair, microbatch=4).run(evaluation, update)
    found, delta = functional(pair, "dr_grpo", evaluation, update)
    assert_equal(mine, found.family[found.observable], delta)


def test_advantages_that_the_rollouts_bring_are_used() -> None:
    module = models.two_lines()
    pair = module, sgd(module)
    evaluation, update = batches()
    update = update._replace(advantages=torch.linspace(-1, 2, len(update.ids), dtype=torch.float64), rewards=None)
    mine = StatefulProbe(*pair, objective="grpo", microbatch=4).run(evaluation, update)
    found, delta = functional(pair, "grpo", evaluation, update)
    assert_equal(mine, found.family[found.observable], delta)


@pytest.mark.parametrize("microbatch", [1, 2, 5, fp.TokenBudget(20)])
def test_microbatches_change_nothing(microbatch: Any) -> None:
    module = models.two_lines()
    pair = module, adamw(module)
    trained(*pair)
    whole, cut = (StatefulProbe(*pair, microbatch=m).run(*batches(True)) for m in (None, microbatch))
    assert_equal(cut, fp.Estimate(whole.H_orig, whole.H_upd, whole.deltaH_true, whole.deltaH1), whole.param_update)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("per", ["token", "sequence"])
def test_the_prediction_is_the_derivative_of_the_measurement(weighting: str, per: str) -> None:
    """Taylor, without funcprobe: ΔH(η) − δH₁(η) = O(η²), so a tenth of η leaves a hundredth of the remainder.

    Without momentum and decay Δθ is proportional to η. The slope 2 ± .1 stands for 10^±.1 on the ratio of remainders.
    """
    module = full()
    probe = StatefulProbe(module, torch.optim.SGD(module.parameters(), lr=1.0), weighting=weighting, per=per)
    remainders = []
    for lr in (1e-3, 1e-4):
        found = probe.run(*batches(), lr=lr)
        remainders.append(abs(found.deltaH_true - found.deltaH1))
        assert remainders[-1] < 0.1 * abs(found.deltaH1)
    assert math.log10(remainders[0] / remainders[1]) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_float32_differs_by_the_rounding_of_scores(model: str, weighting: str) -> None:
    """Both systems in float32, from the same float32 parameters, within a bound made of the rounding of their scores.

    Let ε be the largest difference of any score of either system from the same score in float64, at θ and at θ′, in
    nats. Sums of scores are float64 and add nothing. From `dH = Σ c dlogp + e dh`, with Σ e = 1 and C = Σ |c|:

    * H_orig: the weights are exact (every log-ratio is exactly 0), so either system is off by at most ε.
    * H_upd: a log-ratio is a difference of two rounded log-probabilities, so either system is off by at most
      `ε (1 + 2C)`. The gradients of the two systems differ by rounding and so do their θ′, which moves H by at most
      `D = Σ |∇H ⊙ (Δθ_f − Δθ_s)|`. Both to first order, with c and ∇H at θ in place of θ′: 1.1 pays for the rest.
    * δH₁: a derivative goes through the operations of the scores forth and back, so relative to Σ|terms| either system
      is off by twice the relative rounding of scores, ε over the mean log-probability of a token; and by D, with the
      functional update, a value of the step, against the buffer, a difference of stored parameters.
    """
    module = MODELS[model](torch.float32)
    pair = module, adamw(module)
    trained(*pair)
    evaluation, update = batches()
    mine = StatefulProbe(*pair, objective="grpo", microbatch=4, weighting=weighting).run(evaluation, update)
    observable = fp.entropy(weighting=weighting)
    found, delta = functional(pair, "grpo", evaluation, update, observables=observable, keep_delta=True)
    estimate, pure_update = found.family[observable.name], found.delta
    assert pure_update is not None

    checkpoint = fp.from_training(*pair)
    places = [checkpoint.params, tree.add(checkpoint.params, delta)]
    epsilon = max(rounding_of_scores(module, place, evaluation) for place in places)
    assert epsilon < 1e-5  # some 50 ulp of a log-probability of 2: the bound is worth something
    with undisturbed(*pair):
        anchor = scores(module, evaluation, None)
        coefficients = gradient_coefficients(anchor, evaluation, weighting, "token")
        accumulate_entropy_gradient(module, evaluation, coefficients, None)
        apart, predicted = (dot(module, tree.sub(mine.param_update, other))[1] for other in (delta, pure_update))
    total = float(coefficients[0].abs().sum())
    relative = epsilon / float(anchor.logp[evaluation.completion_mask].abs().mean())
    bounds = {
        "H_orig": 2 * epsilon,
        "H_upd": 1.1 * (2 * epsilon * (1 + 2 * total) + apart),
        "deltaH1": 2 * 2 * relative * mine.terms_scale["deltaH1"] + predicted,
    }
    bounds["deltaH_true"] = bounds["H_orig"] + bounds["H_upd"]
    for name, expected in named(estimate).items():
        assert abs(getattr(mine, name) - expected) <= bounds[name], (name, getattr(mine, name), expected, bounds[name])


def rounding_of_scores(module: nn.Module, at: Params, evaluation: Rollouts) -> float:
    """Return the largest difference of any score of either system at the given leaves from float64, in nats."""
    narrow, wide = copy.deepcopy(module).eval(), copy.deepcopy(module).eval().double()
    with torch.no_grad():
        for twin in (narrow, wide):
            for name, p in trainable(twin).items():
                p.copy_(at[name])
    exact, mine = scores(wide, evaluation, None), scores(narrow, evaluation, 4)
    with math_attention():  # as a probe in forward mode does
        theirs = fp.score(*fp.from_module(narrow), evaluation)
    gaps = [a - b for found in (mine, theirs) for a, b in zip(found[:2], exact, strict=True)]
    return max(float(gap.detach().abs().max()) for gap in gaps)
