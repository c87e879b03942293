"""The variants by name, composed, refused, and their gradients through a real model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe import engine
from funcprobe.errors import InputError
from funcprobe.objectives.by_name import OBJECTIVES, objective, options_of
from funcprobe.objectives.losses import dapo, grpo
from funcprobe.objectives.policy_gradient import PolicyGradient
from funcprobe.objectives.token_selection import ClipCov
from funcprobe.objectives.variants import (
    VARIANTS,
    clip_cov,
    drop_negatives,
    entropy_bonus,
    kl_cov,
    top_entropy_quantile,
)
from funcprobe.training.step import make_step
from funcprobe.types import Objective, Params, Rollouts, TokenScores
from tests.cases import models
from tests.oracles.variants import OWN, loop_loss

#: Several tokens are picked, and by more than rounding.
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, own) for name, own in OWN if own or name != "clip_cov"),
    ("clip_cov", {"base": "dapo", "beta": 0.2, "clip_cov_ratio": 0.3, "clip_cov_lb": 0.1}),
    ("kl_cov", {"base": "bnpo", "epsilon": 1e9, "kl_cov_ratio": 0.3}),
    ("entropy_bonus", {"base": "dr_grpo", "entropy_coef": 0.5, "max_completion_length": 9}),
    ("top_entropy_quantile", {"base": "rloo", "beta": 0.1}),
    ("drop_negatives", {"base": "cispo", "beta": 0.1}),
]


def update(old: bool) -> tuple[nn.Module, Rollouts]:
    """A GPT-2 in float64 and rollouts with holes, with or without log-probs of an older policy."""
    module = models.gpt2().eval()
    made = models.rollouts(holes=True)
    logp, _ = whole_scores(module, made)
    g = torch.Generator().manual_seed(11)
    noise = torch.randn(logp.shape, generator=g, dtype=torch.float64)
    ref = torch.where(made.completion_mask, logp.detach() + noise, 0.0)
    stored = torch.where(made.completion_mask, logp.detach() + 0.3 * noise.flip(1), 0.0)
    return module, made._replace(ref_logps=ref, old_logps=stored if old else None)


def whole_scores(module: nn.Module, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """logp and entropy [B, T] of the whole batch at once, by plain autograd and loops over tokens."""
    logits = module(rollouts.ids, attention_mask=rollouts.attention_mask).logits
    log_probs = (logits / rollouts.temperature[:, None, None]).log_softmax(-1)
    logp, entropy = (list(torch.zeros(2, *rollouts.completion_mask.shape, dtype=torch.float64)[k]) for k in (0, 1))
    logp, entropy = [list(row) for row in logp], [list(row) for row in entropy]
    for b, t in rollouts.completion_mask.nonzero().tolist():
        column = int(rollouts.prompt_lengths[b]) + t
        distribution = log_probs[b, column - 1]
        logp[b][t] = distribution[rollouts.ids[b, column]]
        entropy[b][t] = -(distribution.exp() * distribution).sum()
    return torch.stack([torch.stack(row) for row in logp]), torch.stack([torch.stack(row) for row in entropy])


def autograd(module: nn.Module, value: Tensor) -> Params:
    names, leaves = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(value, leaves, materialize_grads=True), strict=True))


@pytest.mark.filterwarnings("ignore:The rollouts have no old_logps")
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in CASES])
def test_the_engine_s_gradient_is_that_of_autograd_however_the_batch_is_cut(
    name: str, options: dict[str, Any], old: bool
) -> None:
    loss = objective(name, **options)
    module, rollouts = update(old)
    value = loop_loss(loss, options.get("base", "grpo"), rollouts, *whole_scores(module, rollouts))
    wanted = autograd(module, value)
    policy, params = fp.from_module(module)
    for microbatch in (1, 4, None):
        step = make_step(policy, loss, fp.sgd(0.1), microbatch=microbatch)
        found, info = step.gradient(params, rollouts)
        assert info["loss"] == pytest.approx(float(value.detach()), rel=1e-12, abs=1e-14)
        assert 0.0 < info.get(f"{name}_fraction", 0.5) < 1.0 or options.get("clip_cov_ratio") == 1.0
        for leaf, g in wanted.items():
            # about 40 tokens' contributions in another order: 1e-16 of terms below 10
            torch.testing.assert_close(found[leaf], g, rtol=1e-11, atol=1e-13, msg=lambda m, n=leaf: f"{n}: {m}")


def test_the_gradient_of_the_entropy_is_found_where_the_first_slice_had_none() -> None:
    """Rows of weight 0 have no cotangent: a slice of them tells nothing about the next one."""
    module, rollouts = update(old=False)
    shortest = int(rollouts.attention_mask.sum(1).argmin())
    weight = torch.ones(len(rollouts.ids), dtype=torch.float64)
    weight[shortest] = 0.0
    rollouts = rollouts._replace(weight=weight, advantages=torch.zeros(len(weight), dtype=torch.float64))
    loss = entropy_bonus("bnpo", entropy_coef=0.7)
    _, entropy = whole_scores(module, rollouts)
    counted = rollouts.completion_mask & (weight > 0)[:, None]
    wanted = autograd(module, -0.7 * (entropy * counted).sum() / counted.sum())
    policy, params = fp.from_module(module)
    with pytest.warns(fp.errors.FuncprobeWarning, match="the entropy bonus, momentum"):
        prepared = loss.prepare(rollouts)
    for microbatch in (1, 2, None):
        found = engine.gradient(loss, policy, params, prepared, separable=True, microbatch=microbatch).gradient
        assert max(float(g.abs().max()) for g in found.values()) > 1e-3
        for leaf, g in wanted.items():
            torch.testing.assert_close(found[leaf], g, rtol=1e-11, atol=1e-13)


def test_an_entropy_bonus_is_the_gradient_of_the_mean_entropy() -> None:
    module, rollouts = update(old=True)
    policy, params = fp.from_module(module)
    plain, _ = make_step(policy, dapo(), fp.sgd(0.1), microbatch=2).gradient(params, rollouts)
    bonus, _ = make_step(policy, entropy_bonus(dapo(), entropy_coef=0.1), fp.sgd(0.1)).gradient(params, rollouts)
    mean = whole_scores(module, rollouts)[1].sum() / rollouts.completion_mask.sum()
    for leaf, g in autograd(module, mean).items():
        torch.testing.assert_close((plain[leaf] - bonus[leaf]) / 0.1, g, rtol=1e-9, atol=1e-11)


def test_a_pick_in_slices_would_be_another_one() -> None:
    """Why covariance and quantile are not separable: slices picked from on their own give another loss."""
    module, rollouts = update(old=True)
    policy, params = fp.from_module(module)
    for loss in (clip_cov(clip_cov_ratio=0.2, clip_cov_lb=0.0), kl_cov(kl_cov_ratio=0.2), top_entropy_quantile()):
        prepared = loss.prepare(rollouts)
        whole = engine.gradient(loss, policy, params, prepared, separable=False, microbatch=1)
        sliced = engine.gradient(loss, policy, params, prepared, separable=True, microbatch=1)
        assert fp.tree.norm(fp.tree.sub(whole.gradient, sliced.gradient)) > 1e-3 * fp.tree.norm(whole.gradient)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_fills_the_protocol_under_both_names(name: str) -> None:
    loss = objective(name)
    assert isinstance(loss, Objective)
    assert (loss.name, dict(loss.stats)) == (f"{name}(grpo)", {})
    assert hash(loss) == hash(objective(name))
    assert loss == VARIANTS[name]("grpo") == VARIANTS[name](grpo()) == OBJECTIVES[name]()
    assert replace(loss, name="grpo", modifiers=()) == grpo()


def test_variants_compose_and_keep_the_base_s_options() -> None:
    made = entropy_bonus(clip_cov("dapo", epsilon=0.1, seed=4), entropy_coef=0.01)
    assert made.name == "entropy_bonus(clip_cov(dapo))"
    assert made == entropy_bonus(clip_cov(dapo(epsilon=0.1), seed=4), entropy_coef=0.01)
    assert [m.name for m in made.modifiers] == ["clip_cov", "entropy_bonus"]
    assert (made.epsilon, made.epsilon_high, made.aggregation) == (0.1, 0.28, "token_mean")
    assert made.modifiers[0] == ClipCov(seed=4)
    assert objective("clip_cov", base=dapo(beta=0.1)).beta == 0.1


def test_defaults_are_those_of_the_papers() -> None:
    found = {name: repr(objective(name).modifiers) for name in VARIANTS}
    assert found == {
        "clip_cov": "(ClipCov(clip_cov_ratio=0.0002, clip_cov_lb=1.0, clip_cov_ub=5.0, seed=0),)",
        "kl_cov": "(KlCov(kl_cov_ratio=0.0002, ppo_kl_coef=1.0),)",
        "entropy_bonus": "(EntropyBonus(entropy_coef=0.001),)",
        "top_entropy_quantile": "(TopEntropyQuantile(top_entropy_quantile=0.2),)",
        "drop_negatives": "(DropNegatives(),)",
    }


def test_the_options_of_a_variant_are_its_own_and_its_base_s() -> None:
    assert list(options_of("kl_cov", "cispo"))[:4] == ["base", "kl_cov_ratio", "ppo_kl_coef", "epsilon_high"]
    assert list(options_of("drop_negatives", grpo())) == ["base"]
    assert "epsilon" in options_of("drop_negatives")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clip_cov", {"clip_cov_ratio": 0}, "clip_cov_ratio is 0; it must be a number above 0 and at most 1"),
        ("clip_cov", {"clip_cov_ratio": 1.5}, "clip_cov_ratio is 1.5"),
        ("clip_cov", {"clip_cov_lb": float("inf")}, "clip_cov_lb is inf; it must be a finite number"),
        ("clip_cov", {"clip_cov_lb": 5.0}, "clip_cov_lb is 5.0 and clip_cov_ub is 5.0; the lower bound must be below"),
        ("clip_cov", {"seed": -1}, "seed is -1; it must be a whole number at or above 0"),
        ("clip_cov", {"seed": True}, "seed is True"),
        ("kl_cov", {"kl_cov_ratio": -0.1}, "kl_cov_ratio is -0.1"),
        ("kl_cov", {"ppo_kl_coef": -1.0}, "ppo_kl_coef is -1.0; it must be a number at or above 0"),
        ("entropy_bonus", {"entropy_coef": "much"}, "entropy_coef is 'much'; it must be a finite number"),
        ("entropy_bonus", {"entropy_coef": float("nan")}, "entropy_coef is nan"),
        ("top_entropy_quantile", {"top_entropy_quantile": 20}, "top_entropy_quantile is 20; .* from 0 to 1"),
        ("drop_negatives", {"base": "gpro"}, "base is 'gpro'; it must be one of reinforce, rloo, .*, or an objective"),
        ("drop_negatives", {"base": 3}, "base is 3; it must be one of"),
        ("drop_negatives", {"base": "kl_cov"}, "base is 'kl_cov'; it must be one of"),
        ("clip_cov", {"base": "cispo", "epsilon": 0.1}, "'clip_cov' over 'cispo' has no option 'epsilon'; its options"),
        ("clip_cov", {"epsilon": -0.1}, "epsilon is -0.1; it must be a number at or above 0"),
        (
            "clip_cov",
            {"base": grpo(), "epsilon": 0.1},
            "'clip_cov' has no option 'epsilon'; its options are base, clip",
        ),
    ],
)
def test_options_out_of_range_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        objective(name, **options)


def test_a_factory_says_which_option_is_nobody_s() -> None:
    with pytest.raises(InputError, match=r"Neither 'kl_cov' nor its base 'cispo' has an option 'epsilon'; those of"):
        kl_cov("cispo", epsilon=0.1)
    with pytest.raises(InputError, match=r"epsilon stands beside 'grpo', which is already made; give it to the base"):
        drop_negatives(grpo(), epsilon=0.1)


def test_the_draw_leaves_the_global_generator_alone() -> None:
    loss: PolicyGradient = clip_cov(clip_cov_ratio=0.5, clip_cov_lb=-50.0, clip_cov_ub=50.0)
    _, rollouts = update(old=False)
    scores = TokenScores(*(torch.rand(2, *rollouts.completion_mask.shape, dtype=torch.float64) - 1))
    before = torch.get_rng_state()
    first = loss(scores, rollouts)[0]
    torch.rand(3)
    torch.set_rng_state(before)
    assert torch.equal(loss(scores, rollouts)[0], first)
    assert torch.equal(torch.get_rng_state(), before)
