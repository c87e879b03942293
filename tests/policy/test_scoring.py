"""Scores: what stands in them, in which precision, and how much memory they take."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import funcprobe as fp
from funcprobe.errors import InputError
from funcprobe.policy import scoring
from funcprobe.types import Params
from tests.cases import models


def squares(log_probs: Tensor, token: Tensor) -> Tensor:
    """Return Σp², one of the statistics that the published predictors need."""
    return (2 * log_probs).exp().sum(-1)


def test_named_statistics_come_back_in_float64_and_zero_where_masked() -> None:
    policy, params = fp.from_module(models.two_lines(torch.float32))
    rollouts = models.rollouts(holes=True)
    found = fp.score(policy, params, rollouts, {"collision": squares})
    assert {f.dtype for f in (found.logp, found.entropy, found.extra["collision"])} == {torch.float64}
    assert torch.equal(found.extra["collision"] > 0, rollouts.completion_mask)
    # Σp² lies between 1/V and 1, and Jensen bounds it by exp(−H) from below
    inside = found.extra["collision"][rollouts.completion_mask]
    assert bool((inside >= torch.exp(-found.entropy[rollouts.completion_mask]) - 1e-6).all())


def test_low_precision_models_are_normalised_in_float32() -> None:
    """Fault 3 of the older system: entropy in bfloat16 is off by .03 nats a token."""
    rollouts = models.rollouts(40)
    low = models.two_lines(torch.bfloat16)
    policy, params = fp.from_module(low)
    found = fp.score(policy, params, rollouts)
    row, t = rollouts.completion_mask.nonzero(as_tuple=True)
    before = rollouts.ids[row, rollouts.prompt_lengths[row] + t - 1]
    with torch.no_grad():
        logits = low(before.unsqueeze(1)).squeeze(1).double()  # the model's own bfloat16 logits, then float64
    log_probs = torch.log_softmax(logits / 0.8, dim=-1)
    exact = -(log_probs.exp() * log_probs).sum(-1)
    # float32 sums of seven terms of order one: a few times 6e-8; bfloat16 would be off by 1e-2
    assert float((found.entropy[row, t] - exact).abs().max()) < 2e-6


def test_float32_logits_lose_nothing_in_the_softmax() -> None:
    g, rows, vocabulary = torch.Generator().manual_seed(0), 20, 151_936
    logits, token = 3 * torch.randn(rows, vocabulary, generator=g), torch.randint(vocabulary, (rows,), generator=g)
    found = scoring._fields(logits, token, torch.ones(rows, dtype=torch.float64), {})
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    exact = torch.stack([log_probs[torch.arange(rows), token], -(log_probs.exp() * log_probs).sum(-1)], dim=-1)
    # the shift z − max is rounded once per entry: half an ulp of 16, 9.5e-7, on logp. The entropy averages such ones; a
    # run of 64 that holds the largest entry is rounded at 6e-8 in each of six pairwise additions, 3.6e-7 at worst.
    # A float32 log-softmax is off by 2e-5 and 8e-5 here.
    assert float((found - exact)[:, 0].abs().max()) <= 9.5e-7 + 3.6e-7
    assert float((found - exact)[:, 1].abs().max()) <= 3.6e-7


@pytest.mark.parametrize("remake", [False, True])
def test_logits_never_exist_at_once(remake: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, params = fp.from_module(models.two_lines())
    policy_split, sizes = _spied(policy, params)
    monkeypatch.setattr(scoring, "LOGITS_BUDGET", 5 * policy.vocab_size)
    rollouts = models.rollouts()
    run = functools.partial(fp.score, policy_split, rollouts=rollouts, rematerialise=remake)
    scores, pull = torch.func.vjp(run, params)
    pull(fp.TokenScores(torch.ones_like(scores.logp), scores.entropy, {}))
    assert max(sizes) == 5
    tokens = int(rollouts.completion_mask.sum())
    assert sum(sizes) == tokens * (2 if remake else 1)


def _spied(policy: fp.Policy, params: Params) -> tuple[fp.Policy, list[int]]:
    sizes: list[int] = []

    def readout(params: Params, hidden: Tensor) -> Tensor:
        sizes.append(hidden.shape[0])
        return policy.readout(params, hidden)

    return fp.Policy(policy.features, readout, policy.names, policy.vocab_size, policy.device), sizes


def test_temperature_is_the_rows_own() -> None:
    policy, params = fp.from_module(models.two_lines())
    rollouts = models.rollouts(6)
    mixed = rollouts._replace(temperature=torch.tensor([0.5, 2.0] * 3, dtype=torch.float64))
    found = fp.score(policy, params, mixed)
    for row, tau in enumerate([0.5, 2.0] * 3):
        alone = fp.score(policy, params, rollouts._replace(temperature=torch.full((6,), tau, dtype=torch.float64)))
        assert torch.equal(found.entropy[row], alone.entropy[row])
    assert float(found.entropy[1].sum()) != float(fp.score(policy, params, rollouts).entropy[1].sum())


def test_what_stands_in_padded_columns_is_never_looked_at() -> None:
    policy, params = fp.from_module(models.gpt2())
    rollouts = models.rollouts()
    filled = rollouts._replace(ids=rollouts.ids.masked_fill(~rollouts.attention_mask, -100))
    assert torch.equal(fp.score(policy, params, filled).logp, fp.score(policy, params, rollouts).logp)


def test_ids_outside_the_vocabulary_and_rows_too_long_are_refused() -> None:
    policy, params = fp.from_module(models.two_lines())
    with pytest.raises(InputError, match="Token id 8 is outside the vocabulary of 7"):
        fp.score(policy, params, fp.rollouts_from_lists([[1]], [[2, 8]], temperature=1.0))
    policy, params = fp.from_module(models.gpt2())
    with pytest.raises(InputError, match="70 tokens is longer than the model's 64 positions"):
        fp.score(policy, params, fp.rollouts_from_lists([[1] * 60], [[2] * 10], temperature=1.0))
