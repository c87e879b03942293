from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import funcprobe as fp
from funcprobe import engine
from funcprobe.attribution.predictors import PREDICTORS, STATS, Predictions, predictions
from funcprobe.errors import FuncprobeWarning, InputError, NumericsError
from funcprobe.types import Rollouts, TokenScores
from tests.cases import models, tables
from tests.cases.probes import Case, U

CLOSE = {"rtol": 1e-11, "atol": 1e-13}
ADVANTAGES = [1.7, -0.4, 0.0, -2.2, 0.6, 3.1, -0.9, 0.2, -1.3]


def predict(
    policy: fp.Policy, params: Any, batch: Rollouts, *, objective: Any = None, lr: float = 1.0, **options: Any
) -> Predictions:
    """Return the predictions for an update that a step on the batch makes; only its learning rate is read of SGD."""
    step = fp.make_step(policy, objective or fp.grpo(), fp.sgd(1.0))
    return fp.predict(fp.Update.from_step(step, params, step.optimizer.init(params), batch, lr), **options)


# The slow reference: one forward pass a token, explicit sums over the vocabulary, explicit means over tokens.


def by_loops(module: nn.Module, rollouts: Rollouts, lr: float) -> Predictions:
    assert rollouts.advantages is not None
    seen = []  # (row, position, weight, log p of the token, the distribution, advantage)
    for b, t in rollouts.completion_mask.nonzero().tolist():
        if float(rollouts.weight[b]) == 0:
            continue
        column = int(rollouts.prompt_lengths[b]) + t
        out = module(rollouts.ids[b : b + 1, :column])
        logits = getattr(out, "logits", out)[0, -1] / rollouts.temperature[b]
        logs = torch.log_softmax(logits.double(), -1).tolist()
        seen.append((b, t, float(rollouts.weight[b]), logs[int(rollouts.ids[b, column])], logs, rollouts.advantages[b]))
    whole = sum(a for _, _, a, *_ in seen)
    mean_logp = sum(a * logp for _, _, a, logp, *_ in seen) / whole
    mean_pa = sum(a * math.exp(logp) * float(A) for _, _, a, logp, _, A in seen) / whole
    mean_a = sum(a * float(A) for _, _, a, _, _, A in seen) / whole
    tokens = {name: torch.zeros(rollouts.completion_mask.shape, dtype=torch.float64) for name in PREDICTORS}
    totals = dict.fromkeys(PREDICTORS, 0.0)
    for b, t, a, logp, logs, A in seen:
        h = -sum(math.exp(x) * x for x in logs)
        expected = sum(math.exp(x) * (math.exp(x) * (h + x)) for x in logs)
        found = {
            "cov_pg": -lr * (logp - mean_logp) * (math.exp(logp) * float(A) - mean_pa),
            "cov_npg": -lr * (logp - mean_logp) * (float(A) - mean_a),
            "discriminant": -lr * (math.exp(logp) * (h + logp) - expected) * float(A),
        }
        for name, value in found.items():
            tokens[name][b, t] = value
            totals[name] += a * value / whole
    return Predictions(tokens, totals)


@pytest.mark.parametrize("model", ["two lines", "gpt2"])
def test_predict_is_what_explicit_loops_find(model: str) -> None:
    module = tables.POLICIES[model]().eval()
    weight = torch.tensor([1, 2, 0, 1, 0.5, 1, 0, 3, 1], dtype=torch.float64)
    rollouts = models.rollouts(holes=True)._replace(weight=weight, advantages=torch.tensor(ADVANTAGES).double())
    assert not bool(rollouts.completion_mask[:, :-1].all()), "a case without a hole or padding shows nothing"
    with torch.no_grad():
        expected = by_loops(module, rollouts, 0.3)
    found = predict(*fp.from_module(module), rollouts, lr=0.3)
    assert found.tokens.keys() == found.totals.keys() == PREDICTORS.keys()
    same(found, expected)
    assert {x.dtype for x in found.tokens.values()} == {torch.float64}


def same(found: Predictions, expected: Predictions) -> None:
    for name in PREDICTORS:
        torch.testing.assert_close(
            found.tokens[name], expected.tokens[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert found.totals[name] == pytest.approx(expected.totals[name], rel=1e-11, abs=1e-13), name


# Laws of a tabular policy: what the predictors claim, against the exact derivative of an enumerated entropy.


class Context(NamedTuple):
    """One context of a tabular softmax policy, with an advantage of every action."""

    logits: Tensor  #: [V]
    advantage: Tensor  #: [V]
    lr: float

    @property
    def p(self) -> Tensor:
        return torch.softmax(self.logits, -1)

    def derivative(self, direction: Tensor) -> float:
        """Return dH along a direction of the logits."""

        def entropy(z: Tensor) -> Tensor:
            p = torch.softmax(z, -1)
            return -(p * torch.log(p)).sum()

        return float(torch.func.jvp(entropy, (self.logits,), (direction,))[1])

    def enumerated(self) -> Predictions:
        """Return the predictions from every action once, weighted by its probability."""
        v, logs = len(self.logits), torch.log_softmax(self.logits, -1)
        rollouts = fp.rollouts_from_lists(
            [[0]] * v, [[y] for y in range(v)], temperature=1.0, weight=self.p, advantages=self.advantage
        )
        return predictions(scores_of(logs.expand(v, v), torch.arange(v)), rollouts, self.lr)


def scores_of(log_probs: Tensor, token: Tensor) -> TokenScores:
    """Return scores [n, 1] of distributions [n, V]: one completion token a row."""
    extra = {name: statistic(log_probs, token)[:, None] for name, statistic in STATS.items()}
    entropy = -(log_probs.exp() * log_probs).sum(-1, keepdim=True)
    return TokenScores(log_probs.gather(1, token[:, None]), entropy, extra)


@st.composite
def contexts(draw: st.DrawFn) -> Context:
    v = draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits, advantage = torch.randn(2, v, generator=generator, dtype=torch.float64)
    sharpness = draw(st.sampled_from([0.0, 0.3, 1.0, 4.0]))
    return Context(sharpness * logits, 2 * advantage + 0.7, draw(st.sampled_from([1.0, 1e-3])))


@given(contexts())
def test_the_natural_gradient_covariance_is_exact_for_one_context(context: Context) -> None:
    exact = context.derivative(context.lr * context.advantage)
    assert context.enumerated().totals["cov_npg"] == pytest.approx(exact, rel=1e-9, abs=1e-13)


@given(contexts())
def test_the_policy_gradient_covariance_is_exact_along_pi_times_advantage(context: Context) -> None:
    exact = context.derivative(context.lr * context.p * context.advantage)
    assert context.enumerated().totals["cov_pg"] == pytest.approx(exact, rel=1e-9, abs=1e-13)


@given(contexts())
def test_the_discriminant_is_exact_along_the_expected_policy_gradient(context: Context) -> None:
    p, A = context.p, context.advantage
    exact = context.derivative(context.lr * p * (A - (p * A).sum()))
    assert context.enumerated().totals["discriminant"] == pytest.approx(exact, rel=1e-9, abs=1e-13)


@given(contexts())
def test_discriminant_and_covariance_agree_where_advantages_are_centred(context: Context) -> None:
    centred = context._replace(advantage=context.advantage - (context.p * context.advantage).sum())
    totals = centred.enumerated().totals
    assert totals["discriminant"] == pytest.approx(totals["cov_pg"], rel=1e-9, abs=1e-13)


@given(contexts())
def test_every_token_of_the_discriminant_is_the_derivative_along_its_own_gradient(context: Context) -> None:
    found = context.enumerated().tokens["discriminant"].flatten()
    for y, A in enumerate(context.advantage):
        own = torch.func.grad(lambda z, y=y, A=A: A * torch.log_softmax(z, -1)[y])(context.logits)
        assert float(found[y]) == pytest.approx(context.derivative(context.lr * own), rel=1e-9, abs=1e-13)


@given(contexts())
def test_the_statistics_make_the_expectation_of_the_discriminant(context: Context) -> None:
    logs = torch.log_softmax(context.logits, -1)
    h = -sum(math.exp(x) * x for x in logs.tolist())
    expected = sum(math.exp(x) * math.exp(x) * (h + x) for x in logs.tolist())
    parts = {name: float(statistic(logs[None], torch.tensor([0]))) for name, statistic in STATS.items()}
    assert h * parts["sum_p2"] + parts["sum_p2_logp"] == pytest.approx(expected, rel=1e-11, abs=1e-14)


class Table(nn.Module):
    """Logits by the previous token alone: one row of the table a context."""

    def __init__(self) -> None:
        super().__init__()
        with models.seeded(4):
            self.rows = nn.Embedding(6, 6).double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_discriminant_is_exact_for_an_sgd_step_on_contexts_that_differ(temperature: float) -> None:
    policy, params = fp.from_module(Table())
    rollouts = fp.rollouts_from_lists(  # previous tokens: 0, 3 | 1, 5 | 2
        [[0], [1], [2]], [[3, 4], [5, 0], [2]], temperature=temperature, advantages=[1.5, -0.7, 0.4]
    )
    n, lr = 5, 1e-2
    sgd = fp.make_step(policy, fp.reinforce(aggregation="token_mean"), fp.sgd(lr))
    update = sgd(params, sgd.optimizer.init(params), rollouts).delta
    along = engine.directional(policy, params, update, rollouts)
    moved = float(along.tangents.entropy.sum()) / n
    found = predict(policy, params, rollouts, lr=lr).totals
    assert moved == pytest.approx(found["discriminant"] / (n * temperature**2), rel=1e-9)
    assert abs(moved) > 1e-5
    assert found["cov_pg"] != pytest.approx(found["discriminant"], rel=1e-2), (
        "between contexts the covariance is biased"
    )


def test_a_covariance_is_not_zero_where_no_entropy_moves() -> None:
    # Uniform contexts of two sizes: no step moves their entropy at first order, and the batch still covaries.
    logs = [math.log(1 / 2), math.log(1 / 8)]
    rollouts = fp.rollouts_from_lists([[0], [1]], [[0], [1]], temperature=1.0, advantages=[1.0, -1.0])
    extra = {"sum_p2": column([1 / 2, 1 / 8]), "sum_p2_logp": column([1 / 2 * logs[0], 1 / 8 * logs[1]])}
    found = predictions(TokenScores(column(logs), -column(logs), extra), rollouts).totals
    assert found["discriminant"] == pytest.approx(0, abs=1e-15)
    assert found["cov_npg"] == pytest.approx(-math.log(2), rel=1e-12)


def column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


# Invariances of the pure function.


class Batch(NamedTuple):
    scores: TokenScores
    rollouts: Rollouts


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Made-up scores of ragged rows with holes, padding, weights of 0, and rows without a token that counts."""
    rows, width = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = torch.rand(rows, width, generator=g) < draw(st.sampled_from([0.4, 1.0]))
    mask[0, 0] = True
    weight = torch.randint(0, 4, (rows,), generator=g).double()
    weight[0] += 1
    logits = torch.randn(rows * width, 5, generator=g, dtype=torch.float64)
    flat = scores_of(torch.log_softmax(2 * logits, -1), torch.randint(5, (rows * width,), generator=g))
    scores = engine.each(lambda x: x.view(rows, width) * mask, flat)
    made = Rollouts(
        ids=torch.ones(rows, width + 1, dtype=torch.int64),
        attention_mask=torch.ones(rows, width + 1, dtype=torch.bool),
        prompt_lengths=torch.ones(rows, dtype=torch.int64),
        completion_mask=mask,
        temperature=torch.ones(rows, dtype=torch.float64),
        group_ids=torch.arange(rows),
        weight=weight,
        advantages=torch.randn(rows, generator=g, dtype=torch.float64),
    )
    return Batch(scores, made)


@given(batches(), st.integers(1, 3))
def test_padding_changes_nothing_whatever_stands_in_it(batch: Batch, extra: int) -> None:
    scores = engine.each(lambda x: torch.nn.functional.pad(x, (0, extra), value=torch.nan), batch.scores)
    mask = torch.nn.functional.pad(batch.rollouts.completion_mask, (0, extra))
    wide = predictions(scores, batch.rollouts._replace(completion_mask=mask))
    narrow = predictions(*batch)
    width = batch.scores.logp.shape[1]
    same(Predictions({n: x[:, :width] for n, x in wide.tokens.items()}, wide.totals), narrow)
    assert all(not bool(x[:, width:].any()) for x in wide.tokens.values())


@given(batches())
def test_holes_and_rows_of_weight_zero_are_never_looked_at(batch: Batch) -> None:
    counted = batch.rollouts.completion_mask & (batch.rollouts.weight > 0)[:, None]
    spoilt = engine.each(lambda x: torch.where(counted, x, torch.nan), batch.scores)
    advantages = torch.where(batch.rollouts.weight > 0, batch.rollouts.advantages, torch.nan)
    found = predictions(spoilt, batch.rollouts._replace(advantages=advantages))
    same(found, predictions(*batch))
    assert all(not bool(x[~counted].any()) for x in found.tokens.values())


@given(batches(), st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(batch: Batch, random: Any) -> None:
    order = list(range(len(batch.rollouts.ids)))
    random.shuffle(order)
    found = predictions(*rows_of(batch, order))
    expected = predictions(*batch)
    same(found, Predictions({n: x[order] for n, x in expected.tokens.items()}, expected.totals))


@given(batches())
def test_a_weight_of_k_is_k_copies_of_the_row(batch: Batch) -> None:
    copies = [b for b, a in enumerate(batch.rollouts.weight.tolist()) for _ in range(int(a))]
    many = rows_of(batch, copies)
    found = predictions(many.scores, many.rollouts._replace(weight=torch.ones(len(copies)).double())).totals
    assert found == pytest.approx(predictions(*batch).totals, rel=1e-10, abs=1e-13)


@given(batches(), st.floats(0.0, 10.0))
def test_predictions_are_proportional_to_lr_and_odd_in_the_advantages(batch: Batch, lr: float) -> None:
    assert batch.rollouts.advantages is not None
    turned = batch.rollouts._replace(advantages=-batch.rollouts.advantages)
    unit, scaled, odd = predictions(*batch), predictions(*batch, lr), predictions(batch.scores, turned)
    for name in PREDICTORS:
        torch.testing.assert_close(scaled.tokens[name], lr * unit.tokens[name], **CLOSE)
        torch.testing.assert_close(odd.tokens[name], -unit.tokens[name], **CLOSE)
        assert scaled.totals[name] == pytest.approx(lr * unit.totals[name], rel=1e-10, abs=1e-13)


@given(batches(), st.floats(-3.0, 3.0))
def test_a_constant_advantage_is_nothing_to_the_natural_gradient(batch: Batch, shift: float) -> None:
    assert batch.rollouts.advantages is not None
    shifted = batch.rollouts._replace(advantages=batch.rollouts.advantages + shift)
    found, expected = predictions(batch.scores, shifted), predictions(*batch)
    torch.testing.assert_close(found.tokens["cov_npg"], expected.tokens["cov_npg"], rtol=1e-9, atol=1e-12)


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    kept = {name: None if x is None else x[rows] for name, x in batch.rollouts._asdict().items()}
    return Batch(engine.each(lambda x: x[rows], batch.scores), Rollouts(**kept))


# The pass itself.


def test_the_microbatch_changes_nothing() -> None:
    case = Case("gpt2")
    whole = predict(case.policy, case.params, U, microbatch=None)
    for microbatch in (1, 5, fp.TokenBudget(20)):
        same(predict(case.policy, case.params, U, microbatch=microbatch), whole)


def test_it_takes_one_pass_over_u_and_reports_it() -> None:
    calls: list[str] = []
    case = Case().watched(calls)
    done: list[tuple[str, int, int]] = []
    predict(case.step.policy, case.params, U, microbatch=None, progress=lambda *told: done.append(told))
    assert calls == ["U"]
    assert done == [("U, predictors", len(U.ids), len(U.ids))]


def test_advantages_are_the_objectives_own() -> None:
    case = Case()
    default, scaled = predict(case.policy, case.params, U), predict(case.policy, case.params, U, objective=fp.grpo())
    same(default, scaled)
    for objective in (fp.dr_grpo(), fp.rloo()):
        prepared = objective.prepare(U)
        scores = engine.scores(case.policy, case.params, U, stats=STATS)
        found = predict(case.policy, case.params, U, objective=objective)
        same(found, predictions(scores, prepared))
        assert found.totals["cov_npg"] != pytest.approx(default.totals["cov_npg"], rel=1e-3)


@pytest.mark.parametrize("order", [1, 2])
def test_the_statistics_are_constants_to_forward_mode(order: Any) -> None:
    case = Case("gpt2")
    direction = models.direction(case.params)
    along = engine.directional(case.policy, case.params, direction, U, order=order, stats=STATS)
    plain = engine.scores(case.policy, case.params, U, stats=STATS, order=order)
    prepared = fp.grpo().prepare(U)
    same(predictions(along.scores, prepared), predictions(plain, prepared))
    moved = [along.tangents] if along.curvatures is None else [along.tangents, along.curvatures]
    for tangents in moved:
        assert bool(tangents.entropy.any())
        assert all(not bool(x.any()) for x in tangents.extra.values())


# Bad input.


def test_a_batch_without_rewards_says_what_to_add() -> None:
    case = Case()
    with pytest.raises(InputError, match="neither rewards nor advantages"):
        predict(case.policy, case.params, U._replace(rewards=None))
    with pytest.raises(InputError, match="no advantages, which every predictor needs"):
        predictions(engine.scores(case.policy, case.params, U, stats=STATS), U)


def test_a_batch_without_completion_tokens_is_refused() -> None:
    case = Case()
    empty = U._replace(completion_mask=torch.zeros_like(U.completion_mask))
    with pytest.raises(InputError, match="no completion token"), pytest.warns(FuncprobeWarning, match="are zero"):
        predict(case.policy, case.params, empty)
    prepared = fp.grpo().prepare(U)
    scores = engine.scores(case.policy, case.params, U, stats=STATS)
    for nothing in ({"completion_mask": empty.completion_mask}, {"weight": torch.zeros_like(U.weight)}):
        with pytest.raises(InputError, match="no completion token with a weight above 0"):
            predictions(scores, prepared._replace(**nothing))


def test_scores_of_other_rollouts_or_without_statistics_are_refused() -> None:
    case = Case()
    prepared = fp.grpo().prepare(U)
    with pytest.raises(InputError, match=r"no statistic 'sum_p2'.*predictors\.STATS"):
        predictions(engine.scores(case.policy, case.params, U), prepared)
    others = engine.scores(case.policy, case.params, models.rollouts(5), stats=STATS)
    with pytest.raises(InputError, match="pass the rollouts that were scored"):
        predictions(others, prepared)


@pytest.mark.parametrize("field", ["logp", "entropy", "sum_p2", "advantages"])
def test_nan_names_the_sequence(field: str) -> None:
    case = Case()
    scores, rollouts = engine.scores(case.policy, case.params, U, stats=STATS), fp.grpo().prepare(U)
    assert rollouts.advantages is not None
    if field == "advantages":
        rollouts.advantages[3] = torch.nan
    else:
        {"logp": scores.logp, "entropy": scores.entropy, **scores.extra}[field][3, 0] = torch.nan
    with pytest.raises(NumericsError, match=r"not finite for sequence 3;"):
        predictions(scores, rollouts)


def test_nan_in_the_model_or_the_rewards_is_said_before_anything_is_predicted() -> None:
    case = Case()
    broken = {name: leaf * torch.nan for name, leaf in case.params.items()}
    with pytest.raises(NumericsError, match=r"not finite for sequence 0, 1, .* \(in: U, predictors\)"):
        predict(case.policy, broken, U)
    with pytest.raises(InputError, match="Row 2: rewards is nan"):
        predict(case.policy, case.params, U._replace(rewards=U.rewards.index_fill(0, torch.tensor([2]), torch.nan)))


@pytest.mark.parametrize("lr", [-1.0, math.nan, "fast"])
def test_a_learning_rate_out_of_range_is_refused(lr: Any) -> None:
    case = Case()
    with pytest.raises(InputError, match="learning rate"):
        predict(case.policy, case.params, U, lr=lr)
    scores = engine.scores(case.policy, case.params, U, stats=STATS)
    with pytest.raises(InputError, match="learning rate"):
        predictions(scores, fp.grpo().prepare(U), lr)


def test_equal_rewards_predict_nothing_and_say_so() -> None:
    case = Case()
    with pytest.warns(FuncprobeWarning, match="All advantages are zero"):
        found = predict(case.policy, case.params, U._replace(rewards=torch.ones_like(U.rewards)))
    assert found.totals == pytest.approx(dict.fromkeys(PREDICTORS, 0.0), abs=1e-15)
