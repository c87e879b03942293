"""All parts of a step sum to δF₁: parameters, tokens of E, and tokens of U with momentum and weight decay."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import funcprobe as fp
from funcprobe.errors import FuncprobeWarning
from funcprobe.objectives.variants import top_entropy_quantile
from tests.cases.attributions import Stepped, holed, weighted
from tests.cases.probes import E, U
from tests.cases.tables import FLOAT64, POLICIES, observables

#: Relative to Σ|parts|, as promised. What is measured on these cases is 5e-15 and 3e-6.
LIMIT = {name: 1e-9 if name in FLOAT64 else 1e-4 for name in POLICIES}

#: Of losses that differ in a number alone, the one whose clip bites on these batches.
LOSSES = [
    "reinforce",
    "grpo",
    "grpo, kl",
    "dr_grpo",
    "dapo, narrow",
    "gspo, wide",
    "gspo, kl",
    "cispo",
    "rloo",
    "rloo, kl without the ratio",
    "entropy_bonus",
    "drop_negatives over dapo",
    "top_entropy_quantile",
    "clip_cov",
    "kl_cov",
    "two modifiers",
]
#: Of optimizers, one for each set of rows that a ledger can have; the others are held to their parts in test_updates.
STEPS = [
    *("sgd", "sgd, momentum", "sgd, nesterov", "sgd, groups"),
    *("adam, coupled", "adam, amsgrad", "adamw", "adamw, groups"),
]
#: What has a first order, and one of those with a control variate, which leaves the parts as they are.
LINEAR = {**{o.name: o for o in fp.entropy_family()}, **observables("controlled", "reward", "length", "collision")}

#: An example runs a model many times: a failure is reported as it was drawn, and not made smaller for minutes.
AS_DRAWN = (Phase.explicit, Phase.generate)

SETTINGS = st.fixed_dictionaries(
    {
        "optimizer": st.sampled_from(STEPS),
        "observable": st.sampled_from(sorted(LINEAR)),
        "clip": st.sampled_from([None, 0.02]),
        "cold": st.booleans(),
        "odd": st.booleans(),
        "form": st.sampled_from(["additive", "jacobian"]),
        "lr": st.sampled_from([None, 1e-4, 0.1]),
        "microbatch": st.sampled_from([None, 1, 4, fp.TokenBudget(20)]),
    }
)


def attributed(model: str, objective: str, **drawn: Any) -> fp.Attribution:
    """Attribute one of the cases; `odd` puts holes into completions and gives rows weights, one of them 0."""
    evaluation, update = (weighted(holed(x)) if drawn["odd"] else x for x in (E, U))
    case = Stepped(model, objective, drawn["optimizer"], drawn["clip"], cold=drawn["cold"], batch=update)
    case.step = fp.make_step(case.policy, case.step.objective, case.optimizer, drawn["clip"], drawn["microbatch"])
    with warnings.catch_warnings():  # of large steps and of groups with one learning rate: no matter here
        warnings.simplefilter("ignore", FuncprobeWarning)
        return case.attribute(
            LINEAR[drawn["observable"]],
            evaluation=evaluation,
            form=drawn["form"],
            lr=drawn["lr"],
            microbatch=drawn["microbatch"],
        )


def assert_complete(found: fp.Attribution, limit: float) -> None:
    """Every sum of parts is the whole, and the whole is that of the parts: summed here anew."""
    whole = found.first_order
    offsets = {row: value for row, value in found.ledger.items() if row != "gradient on U"}
    assert list(offsets) == (["momentum", "weight decay"] if found.form == "additive" else ["rest"])
    sums = {
        "parameters": [part.contribution for part in found.leaves],
        "evaluation tokens": [x for through in found.evaluation.through.values() for x in through.flatten().tolist()],
        "batch tokens": [
            *(x for through in found.batch.through.values() for x in through.flatten().tolist()),
            *offsets.values(),
        ],
    }
    assert list(found.completeness) == list(sums)
    for name, parts in sums.items():
        size = math.fsum(map(abs, parts))
        assert abs(math.fsum(parts) - whole) <= limit * size, (name, math.fsum(parts), whole, size)
    assert found.completeness_error <= limit
    assert found.completeness_error == max(found.completeness.values())


@pytest.mark.parametrize("objective", LOSSES)
@settings(max_examples=3, phases=AS_DRAWN)
@given(drawn=SETTINGS, model=st.sampled_from(["gpt2", "two lines", "gpt2, float32", "two lines, float32"]))
def test_every_objective(objective: str, drawn: dict[str, Any], model: str) -> None:
    assert_complete(attributed(model, objective, **drawn), LIMIT[model])


@pytest.mark.parametrize("model", POLICIES)
@settings(max_examples=4, phases=AS_DRAWN)
@given(drawn=SETTINGS, objective=st.sampled_from(LOSSES))
def test_every_model(model: str, drawn: dict[str, Any], objective: str) -> None:
    assert_complete(attributed(model, objective, **drawn), LIMIT[model])


@pytest.mark.parametrize("optimizer", STEPS)
def test_every_optimizer(optimizer: str) -> None:
    found = Stepped("gpt2", "grpo, kl", optimizer, 0.05).attribute(fp.expected_reward())
    assert_complete(found, LIMIT["gpt2"])
    assert found.probe.outcome.info["clip_coefficient"] < 0.5
    assert found.probe.outcome.info["clip_fraction"] > 0.1
    # every row that this optimizer has is there, and none that it has not
    stateful = optimizer != "sgd"
    decays = optimizer not in ("sgd", "adam, amsgrad")
    assert (found.ledger["momentum"] != 0.0, found.ledger["weight decay"] != 0.0) == (stateful, decays)
    assert found.ledger["gradient on U"] != 0.0


@pytest.mark.parametrize("observable", LINEAR)
def test_every_observable(observable: str) -> None:
    found = Stepped("gpt2").attribute(LINEAR[observable])
    assert_complete(found, LIMIT["gpt2"])
    assert found.unit == LINEAR[observable].unit
    fields = {"reward": {"logp"}, "length": {"logp"}, "collision": {"logp", "collision"}}
    surprisal = observable.startswith("surprisal")
    assert set(found.evaluation.through) == fields.get(observable, {"logp"} if surprisal else {"logp", "entropy"})


def test_a_divergence_has_no_first_order_and_no_parts() -> None:
    found = Stepped("gpt2").attribute(fp.kl())
    assert found.first_order == 0.0
    assert found.completeness_error == 0.0
    assert not found.batch.total.any()
    assert not found.evaluation.total.any()


@pytest.mark.parametrize(
    "model", ["two lines, float32", "gpt2, float32", "qwen2, tied, float32", "qwen2, lora, float32"]
)
@pytest.mark.parametrize("share", [0.2, 0.35, 0.5, 0.8])
def test_tokens_that_tie_are_picked_as_the_gradient_picked_them(model: str, share: float) -> None:
    """The first tokens of a prompt's completions share one entropy, and rounding differs between passes."""
    objective = top_entropy_quantile("grpo", top_entropy_quantile=share)
    found = Stepped(model, objective, "sgd").attribute()
    assert_complete(found, LIMIT[model])
    picked = float((found.batch.through["logp"] != 0).sum() / found.batch.mask.sum())
    assert picked <= 1 - found.probe.outcome.info["top_entropy_quantile_fraction"] + 1e-12


def test_offsets_know_nothing_of_the_gradient() -> None:
    """They are made of state and hyperparameters: another gradient leaves every bit of them."""
    other = U._replace(rewards=U.rewards.flip(0) ** 2)
    for optimizer in ("sgd, momentum", "sgd, nesterov", "sgd, groups"):
        case = Stepped("gpt2", "reinforce", optimizer)
        one, two = (case.attribute(batch=u) for u in (U, other))
        assert one.ledger["gradient on U"] != two.ledger["gradient on U"]
        for a, b in zip(one.leaves, two.leaves, strict=True):
            assert (a.momentum, a.decay) == (b.momentum, b.decay), (optimizer, a.name)
    # AdamW's decay stands beside the gradient; its momentum is divided by what the gradient is a part of
    case = Stepped("gpt2", "reinforce", "adamw")
    one, two = (case.attribute(batch=u) for u in (U, other))
    assert [part.decay for part in one.leaves] == [part.decay for part in two.leaves]
    assert [part.momentum for part in one.leaves] != [part.momentum for part in two.leaves]


def test_the_scale_knows_nothing_of_other_sequences_under_sgd() -> None:
    """Another advantage of one row leaves every bit of what the tokens of all others contribute."""
    advantages = torch.linspace(-1.0, 1.2, len(U.ids), dtype=torch.float64)
    case = Stepped("gpt2", "reinforce", "sgd, momentum")
    one = case.attribute(batch=U._replace(advantages=advantages)).batch.total
    changed = advantages.clone()
    changed[4] = 7.0
    two = case.attribute(batch=U._replace(advantages=changed)).batch.total
    others = torch.arange(len(U.ids)) != 4
    assert torch.equal(one[others], two[others])
    assert not torch.equal(one[4], two[4])


def test_a_step_without_a_gradient_is_momentum_and_decay() -> None:
    flat = U._replace(rewards=torch.ones(len(U.ids), dtype=torch.float64))
    with pytest.warns(FuncprobeWarning, match="momentum and weight decay"):
        found = Stepped("gpt2").attribute(batch=flat)
    assert not found.batch.total.any()
    assert_complete(found, LIMIT["gpt2"])
    assert found.first_order != 0.0


def test_no_learning_rate_no_parts() -> None:
    with pytest.warns(FuncprobeWarning, match="The step is zero at learning rate 0"):
        found = Stepped("gpt2").attribute(lr=0.0)
    assert (found.first_order, found.completeness_error, found.batch.magnitude()) == (0.0, 0.0, 0.0)
