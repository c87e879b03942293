"""Vocabulary entries that a model bans: probability 0, and every derivative that of the softmax over the others."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe import engine
from funcprobe.attribution.predictors import STATS
from funcprobe.errors import NumericsError
from funcprobe.policy import scoring
from funcprobe.types import Params, Rollouts
from tests.cases import models

#: The entries that stay, of `models.VOCABULARY`: banned ones stand first, last and between.
ALLOWED = [1, 2, 4, 5]
BANNED = [0, 3, 6]


class Banning(nn.Module):
    """The two-line policy with banned entries, by the name of a way to ban them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = models.two_lines(), how
        self.register_buffer("bias", torch.zeros(models.VOCABULARY, dtype=torch.float64))
        self.bias[BANNED] = -torch.inf

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.inner(ids)
        if self.how == "added":
            return logits + self.bias
        value = {"filled": -torch.inf, "float64": -1.79e308, "float32": -3.4e38, "float16": -65504.0, "1e9": -1e9}
        return logits.masked_fill(self.bias < 0, value[self.how])


WAYS = ["added", "filled", "float64", "float32", "float16", "1e9"]


def batch(temperature: tuple[float, ...] = (0.7, 1.0, 1.9)) -> Rollouts:
    """Return rollouts of allowed tokens at several temperatures."""
    completions = [[1, 2, 4], [5], [4, 4], [2, 1, 5], [1], [5, 2]]
    return fp.rollouts_from_lists(
        [[1, 2], [3]] * 3, completions, temperature=temperature * 2, rewards=[1.0, 0.0, 0.3, 0.0, 1.0, 0.2]
    )


def fields(policy: fp.Policy, params: Params, rollouts: Rollouts) -> Tensor:
    """Return all fields of the scores, `[4, B, T]`."""
    return engine.fields(fp.score(policy, params, rollouts, STATS))


def oracle(params: Params, rollouts: Rollouts) -> Tensor:
    """Return the same from the softmax over the allowed columns, a token at a time."""
    entries = []
    for row, t in rollouts.completion_mask.nonzero().tolist():
        column = int(rollouts.prompt_lengths[row]) + t
        before, token = int(rollouts.ids[row, column - 1]), int(rollouts.ids[row, column])
        hidden = torch.tanh(params["inner.embed.weight"][before])
        logits = hidden @ params["inner.head.weight"].T + params["inner.head.bias"]
        q = (logits[ALLOWED] / rollouts.temperature[row]).log_softmax(-1)
        p = q.exp()
        entries.append(torch.stack([q[ALLOWED.index(token)], -(p * q).sum(), (p**2).sum(), (p**2 * q).sum()]))
    place = torch.full(rollouts.completion_mask.shape, len(entries))
    place[rollouts.completion_mask] = torch.arange(len(entries))
    return torch.stack([*entries, torch.zeros(4, dtype=torch.float64)])[place].movedim(-1, 0)


def two(how: str) -> tuple[fp.Policy, Params, Rollouts]:
    policy, params = fp.from_module(Banning(how))
    return policy, params, batch()


#: Rounding of a sum of seven terms of order one and its derivatives, float64: some tens of 1.1e-16.
ROUNDING = {"rtol": 1e-13, "atol": 1e-14}


@pytest.mark.parametrize("how", WAYS)
def test_scores_and_first_derivatives_are_those_of_the_entries_that_stay(how: str) -> None:
    policy, params, rollouts = two(how)
    v = models.direction(params, 1.0)
    run, expected = partial(fields, policy, rollouts=rollouts), partial(oracle, rollouts=rollouts)
    torch.testing.assert_close(run(params), expected(params), **ROUNDING)
    # the named statistics are constants to both modes, so their tangents are 0 and are left out
    _, tangent = torch.func.jvp(run, (params,), (v,))
    torch.testing.assert_close(tangent[:2], torch.func.jvp(expected, (params,), (v,))[1][:2], **ROUNDING)
    c = torch.randn(tangent.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    c[2:] = 0
    pulled, wanted = (torch.func.vjp(f, params)[1](c)[0] for f in (run, expected))
    torch.testing.assert_close(pulled, wanted, **ROUNDING)


@pytest.mark.parametrize("how", WAYS)
def test_the_tangent_is_a_central_difference(how: str) -> None:
    policy, params, rollouts = two(how)
    v, h = models.direction(params, 1.0), 1e-4
    _, tangent = torch.func.jvp(partial(fields, policy, rollouts=rollouts), (params,), (v,))
    ends = [oracle({n: p + s * h * v[n] for n, p in params.items()}, rollouts) for s in (1, -1)]
    # truncation h²/6 times a third derivative of order 10 (τ = .7 cubed divides it): 2e-8; rounding 1e-16 / h = 1e-12
    torch.testing.assert_close(tangent[:2], ((ends[0] - ends[1]) / (2 * h))[:2], rtol=0, atol=1e-7)


@pytest.mark.parametrize("how", WAYS)
def test_second_derivatives_by_every_composition(how: str) -> None:
    policy, params, rollouts = two(how)
    v = models.direction(params, 1.0)

    def second(f: object, kind: str) -> object:
        def total(p: Params) -> Tensor:
            return f(p)[:2].sin().sum()  # type: ignore[operator]

        if kind == "nested jvp":
            return torch.func.jvp(lambda p: torch.func.jvp(total, (p,), (v,))[1], (params,), (v,))[1]
        if kind == "jvp of grad":
            return torch.func.jvp(torch.func.grad(total), (params,), (v,))[1]
        return torch.func.grad(lambda p: sum((g**2).sum() for g in torch.func.grad(total)(p).values()))(params)

    for kind in ("nested jvp", "jvp of grad", "grad of grad"):
        found = second(partial(fields, policy, rollouts=rollouts), kind)
        wanted = second(partial(oracle, rollouts=rollouts), kind)
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12, msg=kind)


@pytest.mark.parametrize("how", WAYS)
def test_vmap_over_parameters_and_rematerialised_chunks(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, params, rollouts = two(how)
    several = {n: torch.stack([p, 1.1 * p, -p]) for n, p in params.items()}
    run = partial(fields, policy, rollouts=rollouts)
    found = torch.vmap(lambda p: torch.func.jvp(run, (p,), (p,))[1])(several)
    for k in range(3):
        one = {n: p[k] for n, p in several.items()}
        wanted = torch.func.jvp(partial(oracle, rollouts=rollouts), (one,), (one,))[1]
        torch.testing.assert_close(found[k][:2], wanted[:2], **ROUNDING)
    monkeypatch.setattr(scoring, "LOGITS_BUDGET", 2 * policy.vocab_size)
    remade = torch.func.vjp(partial(fp.score, policy, rollouts=rollouts, rematerialise=True), params)[1]
    ones = torch.ones(2, *rollouts.completion_mask.shape, dtype=torch.float64)
    plain = torch.func.vjp(lambda p: oracle(p, rollouts)[:2], params)[1](ones)[0]
    torch.testing.assert_close(remade(fp.TokenScores(ones[0], ones[1], {}))[0], plain, **ROUNDING)


def test_a_statistic_of_the_users_own_may_multiply_by_log_probabilities() -> None:
    """Varentropy Σ p log² p: 0 · ∞ where a banned entry were −inf, in value and in every derivative."""
    policy, params, rollouts = two("added")

    def run(p: Params) -> Tensor:
        return fp.score(policy, p, rollouts, {"v": lambda q, y: (q.exp() * q**2).sum(-1)}).extra["v"]

    def expected(p: Params) -> Tensor:
        rows = []
        for row, t in rollouts.completion_mask.nonzero().tolist():
            hidden = torch.tanh(
                p["inner.embed.weight"][int(rollouts.ids[row, int(rollouts.prompt_lengths[row]) + t - 1])]
            )
            logits = (hidden @ p["inner.head.weight"].T + p["inner.head.bias"])[ALLOWED]
            q = (logits / rollouts.temperature[row]).log_softmax(-1)
            rows.append((q.exp() * q**2).sum())
        return torch.stack(rows)

    v = models.direction(params, 1.0)
    (value, tangent), (wanted, slope) = (torch.func.jvp(f, (params,), (v,)) for f in (run, expected))
    torch.testing.assert_close(value[rollouts.completion_mask], wanted, **ROUNDING)
    torch.testing.assert_close(tangent[rollouts.completion_mask], slope, **ROUNDING)
    turned, turned_wanted = (torch.func.grad(lambda p, f=f: f(p).sum())(params) for f in (run, expected))
    torch.testing.assert_close(turned, turned_wanted, **ROUNDING)


@pytest.mark.parametrize("how", ["added", "filled", "float64", "float32"])
def test_a_token_drawn_of_probability_0_is_an_error_that_names_its_sequence(how: str) -> None:
    policy, params = fp.from_module(Banning(how))
    rollouts = fp.rollouts_from_lists(
        [[1]] * 3, [[1, 2], [4, BANNED[1]], [5]], temperature=1.0, rewards=[1.0, 0.0, 0.5]
    )
    with pytest.raises(NumericsError, match="not finite for sequence 1 "):
        fp.make_step(policy, fp.grpo(), fp.sgd(0.1)).gradient(params, rollouts)
    with pytest.raises(NumericsError, match="not finite for sequence 1 "):
        engine.directional(policy, params, params, rollouts)


def test_a_position_at_which_everything_is_banned_is_an_error_and_spoils_no_other_row() -> None:
    logits = torch.tensor([[-torch.inf] * 3, [0.0, -torch.inf, 1.0], [torch.nan, -torch.inf, 0.0], [0.0, 1.0, 2.0]])
    found = scoring._fields(logits, torch.tensor([0, 0, 2, 1]), torch.ones(4, dtype=torch.float64), {})
    assert torch.isfinite(found).all(1).tolist() == [False, True, False, True]


@pytest.mark.parametrize("how", WAYS)
def test_a_probe_and_samples_of_a_policy_that_bans_are_those_of_the_policy_without(how: str) -> None:
    policy, params, rollouts = two(how)
    evaluation = fp.sample(
        policy, params, [[1, 2], [3]], generator=torch.Generator().manual_seed(0), max_new_tokens=5, eos_id=None,
        group_size=20,
    )  # fmt: skip
    drawn = evaluation.ids[:, 2:][evaluation.attention_mask[:, 2:]]
    assert set(drawn.tolist()) <= set(ALLOWED)
    step = fp.make_step(policy, fp.grpo(scale_rewards="none"), fp.sgd(0.05))
    report = fp.probe(fp.Update.from_step(step, params, step.optimizer.init(params), rollouts), evaluation)
    mask = evaluation.completion_mask
    after = step(params, step.optimizer.init(params), rollouts).params
    before = oracle(params, evaluation)
    moved = oracle(after, evaluation)
    prefix = torch.cumsum(moved[0] - before[0], 1) - (moved[0] - before[0])
    w = prefix.exp() / prefix.exp().sum(0)
    change = (w * moved[1]).sum() / (w * mask).sum() - before[1].sum() / mask.sum()
    assert report.change == pytest.approx(float(change), rel=1e-9)
    # first order of the same by hand: the slope of that expression
    v = {n: after[n] - params[n] for n in params}

    def estimate(p: Params) -> Tensor:
        s = oracle(p, evaluation)
        e = torch.cumsum(s[0] - before[0], 1) - (s[0] - before[0])
        u = e.exp() / e.exp().sum(0)
        return (u * s[1]).sum() / (u * mask).sum()

    assert report.first_order == pytest.approx(float(torch.func.jvp(estimate, (params,), (v,))[1]), rel=1e-9)
