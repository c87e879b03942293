from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from funcprobe import objectives
from funcprobe.data.rollouts import take
from funcprobe.errors import FuncprobeWarning, InputError
from funcprobe.objectives.by_name import objective
from funcprobe.objectives.losses import BASES
from funcprobe.objectives.policy_gradient import AGGREGATIONS, PolicyGradient
from funcprobe.types import Objective, Rollouts, TokenScores
from tests.cases.scored import Batch, batch, law, law_of_a_table, masks, seeds
from tests.oracles.variants import loop_loss

# Sums of at most 30 terms below 100 in float64: 30 · 100 · 2^-53 < 1e-12.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}

#: (name, options of the factory): every objective, and every option that changes a formula.
TABLE: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in BASES),
    *((name, {"beta": 0.3}) for name in BASES),
    *(("reinforce", {"aggregation": aggregation}) for aggregation in AGGREGATIONS),
    ("reinforce", {"scale_rewards": "batch"}),
    ("grpo", {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.5, "beta": 0.1, "use_bias_correction_kl": False}),
    ("bnpo", {"delta": 1.1, "scale_rewards": "none"}),
    ("dr_grpo", {"max_completion_length": 7}),
    ("gspo", {"epsilon": 0.1, "epsilon_high": 0.1, "delta": 1.2, "beta": 0.2}),
    ("cispo", {"epsilon_high": 1.1}),
    ("rloo", {"delta": 1.2, "beta": 0.2, "use_bias_correction_kl": False}),
]
table = pytest.mark.parametrize(("name", "options"), TABLE, ids=[f"{n}-{'-'.join(o) or 'plain'}" for n, o in TABLE])

Gradients = tuple[Tensor, Tensor]


def value_and_gradient(loss: PolicyGradient, scores: TokenScores, rollouts: Rollouts) -> Gradients:
    gradient, value = torch.func.grad_and_value(lambda s: loss(s, rollouts)[0])(scores)
    return value, gradient.logp


def expected(loss: PolicyGradient, case: Batch) -> Gradients:
    logp = case.scores.logp.clone().requires_grad_()
    value = loop_loss(loss, loss.name, case.rollouts, logp, case.scores.entropy)
    value = value + 0 * logp.sum()  # a loss that is clipped everywhere is constant, and its gradient zero
    return value.detach(), torch.autograd.grad(value, logp)[0]


@table
@given(mask=masks(), seed=seeds, old=st.booleans())
@law_of_a_table
def test_loss_and_gradient_are_those_of_the_loop(
    name: str, options: dict[str, Any], mask: list[list[bool]], seed: int, old: bool
) -> None:
    loss, case = objective(name, **options), batch(mask, seed, old=old)
    for found, wanted in zip(value_and_gradient(loss, *reversed(case)), expected(loss, case), strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)


@table
@given(mask=masks(), seed=seeds, old=st.booleans(), data=st.data())
@law_of_a_table
def test_a_prepared_batch_is_the_sum_of_its_slices(
    name: str, options: dict[str, Any], mask: list[list[bool]], seed: int, old: bool, data: st.DataObject
) -> None:
    loss, case = objective(name, **options), batch(mask, seed, old=old)
    prepared = loss.prepare(case.rollouts)
    whole, gradient = value_and_gradient(loss, case.scores, prepared)
    order = torch.tensor(data.draw(st.permutations(range(len(mask)))))
    cut = data.draw(st.integers(1, len(mask) - 1))
    parts = torch.zeros((), dtype=torch.float64)
    rebuilt = torch.zeros_like(gradient)
    for rows in (order[:cut], order[cut:]):
        piece = take(prepared, rows)
        width = piece.completion_mask.shape[1]
        scores = TokenScores(case.scores.logp[rows, :width], case.scores.entropy[rows, :width])
        value, mine = value_and_gradient(loss, scores, piece)
        parts = parts + value
        rebuilt[rows, :width] = mine
    torch.testing.assert_close(parts, whole, **CLOSE)
    torch.testing.assert_close(rebuilt, gradient, **CLOSE)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(mask=masks(), seed=seeds, stored=st.booleans())
@law
def test_every_objective_has_one_gradient_at_ratio_one(
    aggregation: str, mask: list[list[bool]], seed: int, stored: bool
) -> None:
    rollouts, scores = batch(mask, seed, old=False, spread=0.0)
    rollouts = rollouts._replace(advantages=rollouts.rewards, old_logps=scores.logp if stored else None)
    found = {
        name: value_and_gradient(replace(objective(name), aggregation=aggregation), scores, rollouts)[1]
        for name in BASES
    }
    assert bool((found["reinforce"] != 0).any())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, found["reinforce"], **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


# torch's own decompositions, loaded at the first forward-mode derivative of a process, use what it deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@table
def test_forward_mode_contracts_the_gradient(name: str, options: dict[str, Any]) -> None:
    loss, case = objective(name, **options), batch([[True, False, True, True], [False] * 4, [True] * 4, [True] * 4], 3)
    rollouts = loss.prepare(case.rollouts)
    along = TokenScores(torch.linspace(-1, 2, 16).double().view(4, 4), torch.zeros(4, 4, dtype=torch.float64))
    _, directional = torch.func.jvp(lambda s: loss(s, rollouts)[0], (case.scores,), (along,))
    gradient = value_and_gradient(loss, case.scores, rollouts)[1]
    torch.testing.assert_close(directional, (gradient * along.logp).sum(), **CLOSE)


@table
@given(mask=masks(), seed=seeds, extra=st.integers(1, 3))
@law_of_a_table
def test_padding_changes_nothing(
    name: str, options: dict[str, Any], mask: list[list[bool]], seed: int, extra: int
) -> None:
    loss, case = objective(name, **options), batch(mask, seed)
    pad = torch.nn.functional.pad
    wide = case.rollouts._replace(
        completion_mask=pad(case.rollouts.completion_mask, (0, extra)),
        old_logps=pad(case.rollouts.old_logps, (0, extra), value=torch.nan),
        ref_logps=pad(case.rollouts.ref_logps, (0, extra), value=torch.nan),
    )
    scores = TokenScores(pad(case.scores.logp, (0, extra)), pad(case.scores.entropy, (0, extra)))
    value, gradient = value_and_gradient(loss, case.scores, case.rollouts)
    torch.testing.assert_close(loss(scores, wide)[0], value, **CLOSE)
    torch.testing.assert_close(value_and_gradient(loss, scores, wide)[1], pad(gradient, (0, extra)), **CLOSE)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_base_weight_counts_as_so_many_rows(aggregation: str) -> None:
    rollouts, scores = batch([[True, False, True], [True, True, True], [False, True, False], [True] * 3], 5)
    rollouts = rollouts._replace(advantages=rollouts.rewards)
    counts = torch.tensor([2, 0, 1, 3])
    repeated = torch.arange(4).repeat_interleave(counts)
    loss = objective("reinforce", aggregation=aggregation, max_completion_length=3, beta=0.1)
    weighted = loss(scores, rollouts._replace(weight=counts.double()))[0]
    rows = TokenScores(scores.logp[repeated], scores.entropy[repeated])
    torch.testing.assert_close(weighted, loss(rows, take(rollouts, repeated))[0], **CLOSE)


@pytest.mark.parametrize(("name", "divided_by"), [("grpo", 4), ("dapo", 8), ("dr_grpo", 12), ("rloo", 4)])
def test_a_normaliser_replaces_the_denominator_of_the_batch(name: str, divided_by: int) -> None:
    case = batch([[True, False, True], [True, True, True], [False, True, False], [True, False, True]], 5)
    natural, scaled = objective(name), objective(name, normaliser=2.5)
    value = natural(case.scores, case.rollouts)[0]
    torch.testing.assert_close(scaled(case.scores, case.rollouts)[0], value * divided_by / 2.5, **CLOSE)


def test_unprepared_rollouts_are_prepared_and_given_advantages_stay() -> None:
    rollouts, scores = batch([[True, True], [True, False]], 2)
    loss = objectives.grpo()
    assert torch.equal(loss(scores, rollouts)[0], loss(scores, loss.prepare(rollouts))[0])
    given = torch.tensor([0.5, -2.0], dtype=torch.float64)
    prepared = loss.prepare(rollouts._replace(advantages=given))
    assert torch.equal(prepared.advantages, given)
    assert prepared.token_weights.tolist() == [[0.25, 0.25], [0.5, 0.0]]


def test_info_on_numbers_written_by_hand() -> None:
    mask = [[True, True, False], [True, True, True]]
    ratios = torch.tensor([[2.0, 1.0, 9.0], [0.5, 1.0, 2.0]], dtype=torch.float64)
    rollouts, scores = batch(mask, 1, advantages=torch.tensor([1.0, -1.0], dtype=torch.float64))
    logs = ratios.log()
    rollouts = rollouts._replace(old_logps=scores.logp - logs, ref_logps=scores.logp + 1.0)
    _, info = objectives.dapo(beta=0.1)(scores, rollouts)
    on = torch.as_tensor(mask)
    assert {k: v.requires_grad for k, v in info.items()} == dict.fromkeys(
        ("ratio_mean", "clip_fraction", "approx_kl", "entropy", "kl"), False
    )
    approx = (ratios - 1 - logs)[on].mean()
    wanted = [6.5 / 5, 2 / 5, approx, scores.entropy[on].mean(), torch.e - 2]
    torch.testing.assert_close(torch.stack(list(info.values())), torch.tensor(wanted, dtype=torch.float64), **CLOSE)
    # cispo caps from above only; reinforce has nothing to clip
    assert float(objectives.cispo(epsilon_high=1.5)(scores, rollouts)[1]["clip_fraction"]) == pytest.approx(1 / 5)
    assert float(objectives.reinforce()(scores, rollouts)[1]["clip_fraction"]) == 0.0


@pytest.mark.parametrize("name", list(BASES))
def test_every_objective_fills_the_protocol(name: str) -> None:
    loss = objective(name)
    assert isinstance(loss, Objective)
    assert (loss.name, loss.separable, dict(loss.stats)) == (name, True, {})
    assert hash(loss) == hash(objective(name))


def test_a_plain_loss_prints_as_it_did_before_there_were_modifiers() -> None:
    """A sweep knows its own journal by what its objective prints as."""
    assert repr(objective("dapo", epsilon=0.1)) == (
        "PolicyGradient(name='dapo', surrogate='clip', aggregation='token_mean', ratio='token', baseline='group', "
        "scale_rewards='group', epsilon=0.1, epsilon_high=0.28, delta=None, beta=0.0, use_bias_correction_kl=True, "
        "max_completion_length=None, normaliser=None)"
    )


def test_defaults_are_those_of_the_field() -> None:
    found = {name: (o.epsilon, o.epsilon_high, o.scale_rewards, o.beta) for name, o in _all().items()}
    assert found["grpo"] == found["bnpo"] == (0.2, None, "group", 0.0)
    assert found["dapo"] == (0.2, 0.28, "group", 0.0)
    assert found["dr_grpo"] == (0.2, None, "none", 0.0)
    assert found["gspo"] == (3e-4, 4e-4, "group", 0.0)
    assert found["cispo"][1] == 5.0


def _all() -> dict[str, PolicyGradient]:
    return {name: objective(name) for name in BASES}


def test_unknown_names_and_options_list_the_valid_ones() -> None:
    with pytest.raises(InputError, match=r"no objective named 'gpro'.*reinforce, rloo, grpo"):
        objective("gpro")
    with pytest.raises(InputError, match=r"'cispo' has no option 'epsilon'; its options are epsilon_high, beta"):
        objective("cispo", epsilon=0.1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("grpo", {"epsilon": -0.1}, "epsilon is -0.1; it must be a number at or above 0"),
        ("grpo", {"epsilon": float("nan")}, "epsilon is nan"),
        ("grpo", {"epsilon_high": "wide"}, "epsilon_high is 'wide'; .*or none"),
        ("cispo", {"epsilon_high": True}, "epsilon_high is True"),
        ("cispo", {"epsilon_high": None}, "epsilon_high is None; it must be a number at or above 0"),
        ("grpo", {"beta": -1.0}, "beta is -1.0"),
        ("grpo", {"delta": 0.0}, "delta is 0.0; it must be a number above 0, or none"),
        ("grpo", {"scale_rewards": "rows"}, "scale_rewards is 'rows'; it must be one of group, batch, none"),
        ("reinforce", {"aggregation": "mean"}, "aggregation is 'mean'; it must be one of sequence_mean"),
        ("reinforce", {"baseline": "best"}, "baseline is 'best'"),
        ("dr_grpo", {"max_completion_length": -3}, "max_completion_length is -3"),
        ("dapo", {"normaliser": 0}, "normaliser is 0"),
    ],
)
def test_options_out_of_range_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        objective(name, **options)


@pytest.mark.parametrize(("beta", "left"), [(0.0, "momentum and weight decay alone"), (0.1, "the KL term, momentum")])
def test_all_advantages_zero_is_said(beta: float, left: str) -> None:
    equal = torch.full((4,), 0.1, dtype=torch.float64)  # a mean over 0.1 that is not exactly 0.1 must not hide it
    rollouts, scores = batch([[True]] * 4, rewards=equal)
    rollouts = rollouts._replace(group_ids=torch.tensor([0, 0, 0, 1]))
    with pytest.warns(FuncprobeWarning, match=f"All advantages are zero.*{left}"):
        value, _ = objectives.dr_grpo(beta=beta)(scores, rollouts)
    assert beta > 0 or float(value) == 0.0


def test_an_advantage_on_a_row_without_tokens_does_not_count() -> None:
    rollouts, _ = batch([[True], [False]], advantages=torch.tensor([0.0, 1.0], dtype=torch.float64))
    with pytest.warns(FuncprobeWarning, match="All advantages are zero"):
        objectives.grpo().prepare(rollouts)


def test_a_kl_term_needs_reference_log_probabilities() -> None:
    rollouts, scores = batch([[True], [True]], ref=False)
    with pytest.raises(InputError, match=r"beta is 0.1.*no ref_logps"):
        objectives.grpo(beta=0.1).prepare(rollouts)
    prepared = objectives.grpo().prepare(rollouts)
    with pytest.raises(InputError, match="no ref_logps"):
        objectives.grpo(beta=0.1)(scores, prepared)


def test_a_batch_without_tokens_is_refused() -> None:
    rollouts, _ = batch([[True], [True]], advantages=torch.ones(2, dtype=torch.float64))
    with pytest.raises(InputError, match="no completion token with a weight above 0"):
        objectives.grpo().prepare(rollouts._replace(weight=torch.zeros(2, dtype=torch.float64)))
