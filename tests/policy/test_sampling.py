"""Sampling: from the right distribution, with the right log-probabilities, and from one generator alone."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe.errors import InputError, NumericsError
from funcprobe.policy.sampling import _choose, sample
from funcprobe.types import Params
from tests.cases import models
from tests.oracles import enumeration

PROMPTS = [[1, 2, 3], [4], [5, 6, 1, 2, 3, 4], [2, 2]]
EOS = 0


def build(name: str) -> tuple[fp.Policy, Params]:
    """Return a policy that decodes as its name says: by a cache, or by running the whole row each time."""
    module, _, way = name.partition(" / ")
    policy, params = fp.from_module(EVERY[module]())
    assert (policy.decode is not None) == (module != "two lines")
    return (policy if way == "cache" else dataclasses.replace(policy, decode=None)), params


EVERY = {
    "two lines": models.two_lines,
    "gpt2": models.gpt2,
    "qwen2": functools.partial(models.qwen2, torch.float32),
    "lora": functools.partial(models.lora, torch.float32),
}
WAYS = ["two lines / whole", "gpt2 / cache", "gpt2 / whole", "qwen2 / cache", "qwen2 / whole", "lora / cache"]


def draw(policy: fp.Policy, params: Params, seed: int = 0, **options: Any) -> fp.Rollouts:
    """Sample with defaults that end some rows early and some not at all."""
    options = {"max_new_tokens": 6, "eos_id": EOS, "temperature": 0.8, "group_size": 3, **options}
    prompts = options.pop("prompts", PROMPTS)
    return sample(policy, params, prompts, generator=torch.Generator().manual_seed(seed), **options)


def completions(rollouts: fp.Rollouts) -> list[list[int]]:
    """Return the completions as lists of ids."""
    starts, ends = rollouts.prompt_lengths.tolist(), rollouts.attention_mask.sum(1).tolist()
    return [row[a:b] for row, a, b in zip(rollouts.ids.tolist(), starts, ends, strict=True)]


@pytest.mark.parametrize("way", WAYS)
def test_recomputed_scores_are_the_sampling_logps(way: str) -> None:
    policy, params = build(way)
    drawn = draw(policy, params)
    assert drawn.sampling_logps is not None
    assert drawn.sampling_logps.dtype == torch.float64
    off = (fp.score(policy, params, drawn).logp - drawn.sampling_logps).abs().max()
    # float64: sums of some tens of terms of order ten. Qwen2 normalises in float32: logits of order ten, times 6e-8
    assert float(off) < (1e-12 if next(iter(params.values())).dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("way", WAYS)
def test_neither_batch_size_nor_way_of_decoding_changes_a_draw(way: str) -> None:
    policy, params = build(way)
    whole = dataclasses.replace(policy, decode=None)
    reference = draw(whole, params, batch_size=1)
    for batch_size in (1, 5, 64):
        drawn = draw(policy, params, batch_size=batch_size)
        assert torch.equal(drawn.ids, reference.ids)
        assert torch.equal(drawn.attention_mask, reference.attention_mask)
        assert torch.allclose(drawn.sampling_logps, reference.sampling_logps, rtol=0, atol=2e-5)


@pytest.mark.parametrize("way", ["two lines / whole", "gpt2 / cache"])
def test_the_end_token_belongs_to_the_completion_and_nothing_follows(way: str) -> None:
    drawn = draw(*build(way), group_size=30)
    rows = completions(drawn)
    assert {EOS in row for row in rows} == {False, True}  # some rows end, some are cut
    for row in rows:
        assert EOS not in row[:-1]
        assert len(row) == 6 or row[-1] == EOS
    lengths = torch.tensor([len(row) for row in rows])
    assert torch.equal(drawn.completion_mask, torch.arange(6) < lengths[:, None])


def forgetful(policy: fp.Policy, window: int) -> fp.Policy:
    """Return the policy with a cache that keeps a few tokens, as one does whose window is not the model's."""

    def decode(params: Params, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        seen = ids if cache is None else torch.cat([cache, ids], dim=1)
        lengths = mask.sum(1).clamp(max=window).tolist()
        found = [
            policy.features(params, row[None, -n:], mask[:1, -n:])[0, -1] for row, n in zip(seen, lengths, strict=True)
        ]
        return torch.stack(found), seen

    return dataclasses.replace(policy, decode=decode)


@pytest.mark.parametrize("window", [3, 8])
def test_a_cache_that_forgets_is_noticed_and_rows_are_decoded_whole(window: int) -> None:
    policy, params = build("qwen2 / cache")
    whole = draw(dataclasses.replace(policy, decode=None), params, batch_size=5)
    found = draw(forgetful(policy, window), params, batch_size=5)
    assert completions(found) == completions(whole)
    assert found.sampling_logps is not None
    off = (fp.score(policy, params, found).logp - found.sampling_logps).abs().max()
    assert float(off) < 2e-5  # as in the test of the sampling logps
    assert policy.checks is not None
    assert any("rows are decoded whole" in note for note in policy.checks.notes)


def test_a_cache_that_forgets_nothing_is_kept() -> None:
    policy, params = build("qwen2 / cache")
    calls = []

    def counted(*given: Any) -> tuple[Tensor, Any]:
        calls.append(given[1].shape)
        assert policy.decode is not None
        return policy.decode(*given)

    draw(dataclasses.replace(policy, decode=counted), params, max_new_tokens=6, eos_id=None, batch_size=5)
    assert len(calls) == 6 * 3  # 12 rows, 5 at a time, and a step for every token
    assert policy.checks is not None
    assert not any("whole" in note for note in policy.checks.notes)


@pytest.mark.parametrize("given", [torch.tensor(EOS), torch.tensor([EOS]), np.int64(EOS), [EOS]])
def test_an_end_token_may_come_as_an_array(given: Any) -> None:
    assert completions(draw(*build("two lines / whole"), eos_id=given)) == completions(
        draw(*build("two lines / whole"))
    )


def test_without_an_end_token_every_completion_is_full() -> None:
    assert {len(row) for row in completions(draw(*build("gpt2 / cache"), eos_id=None))} == {6}


def test_a_long_prompt_does_not_make_the_others_differ() -> None:
    policy, params = build("gpt2 / cache")
    alone = draw(policy, params, prompts=[[1, 2]], group_size=2)
    beside = draw(policy, params, prompts=[[1, 2], [3] * 40], group_size=2)
    assert completions(beside)[:2] == completions(alone)


@pytest.mark.parametrize("way", ["cache", "whole"])
def test_frequencies_are_the_exact_probabilities(way: str) -> None:
    """Every completion of an enumerable policy within 4 standard errors; the rare ones together."""
    module, n = models.gpt2(vocabulary=enumeration.SYMBOLS).eval(), 4000
    policy, params = fp.from_module(module)
    policy = policy if way == "cache" else dataclasses.replace(policy, decode=None)
    drawn = draw(
        policy,
        params,
        prompts=[enumeration.PROMPT],
        temperature=enumeration.TEMPERATURE,
        group_size=n,
        max_new_tokens=enumeration.LONGEST,
        eos_id=enumeration.END,
        batch_size=1000,
    )
    exact = dict(zip(map(tuple, enumeration.completions()), enumeration.probabilities(module), strict=True))
    counts = Counter(map(tuple, completions(drawn)))
    assert set(counts) <= set(exact)
    rare = {c for c, p in exact.items() if p * n < 10}
    cells = [(counts[c], p) for c, p in exact.items() if c not in rare]
    cells.append((sum(counts[c] for c in rare), sum(exact[c] for c in rare)))
    assert len(cells) > 12
    for count, p in cells:
        assert abs(count / n - p) <= 4 * (p * (1 - p) / n) ** 0.5


def test_only_the_generator_is_drawn_from_and_nothing_changes() -> None:
    module = models.lora()
    policy, params = fp.from_module(module)
    before = {name: p.clone() for name, p in module.state_dict().items()}
    training = [m.training for m in module.modules()]
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    first = draw(policy, params)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]  # noqa: NPY002
    assert all(torch.equal(p, before[name]) for name, p in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert [m.training for m in module.modules()] == training
    torch.manual_seed(123)
    assert torch.equal(draw(policy, params).ids, first.ids)
    assert not torch.equal(draw(policy, params, seed=1).ids, first.ids)


def test_the_rows_carry_what_is_known_about_them() -> None:
    policy, params = build("gpt2 / cache")
    seen: list[tuple[str, int, int]] = []
    drawn = draw(
        policy,
        params,
        prompts=[[1, 2], [3], [1, 2]],
        group_size=2,
        batch_size=4,
        step=7,
        progress=lambda *args: seen.append(args),
    )
    assert drawn.group_ids.tolist() == [0, 0, 1, 1, 0, 0]  # equal prompts are one group
    assert drawn.temperature.tolist() == [0.8] * 6
    assert drawn.step is not None
    assert drawn.step.tolist() == [7] * 6
    assert drawn.rewards is None
    assert seen == [("sampling", 4, 6), ("sampling", 6, 6)]


def test_rewards_come_in_the_order_of_the_prompts() -> None:
    def reward(prompts: list[list[int]], completions: list[list[int]]) -> list[float]:
        return [100 * p[0] + len(c) for p, c in zip(prompts, completions, strict=True)]

    drawn = draw(*build("two lines / whole"), reward=reward, batch_size=2)
    assert drawn.rewards is not None
    assert drawn.rewards.tolist() == [
        100 * int(row[0]) + len(c) for row, c in zip(drawn.ids, completions(drawn), strict=True)
    ]


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_a_token_of_probability_zero_is_never_chosen(u: float) -> None:
    """At both ends of the unit interval, for totals that round above and below 1."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 7, generator=generator)
    logits[:, [0, 3, 6]] = -torch.inf
    token, logp = _choose(logits, torch.full((500,), u, dtype=torch.float64), 0.7)
    assert not bool(torch.isin(token, torch.tensor([0, 3, 6])).any())
    assert bool(torch.isfinite(logp).all())
    assert u != 0 or set(token.tolist()) == {1}
    assert u != 1 - 2**-53 or set(token.tolist()) == {5}


class Poisoned(nn.Module):
    """NaN logits after the token 5, and 5 is drawn by no other prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6))

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.weight.expand(*ids.shape, 6).masked_fill(torch.arange(6) == 5, -torch.inf)
        return torch.where(ids.unsqueeze(-1) == 5, torch.nan, logits)


def test_probabilities_that_are_not_finite_name_the_prompt() -> None:
    with pytest.raises(NumericsError, match=r"not finite for prompt 1 \(counted from 0\)"):
        draw(*fp.from_module(Poisoned()), prompts=[[1], [5], [2]])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ends", [(0, 3), [5, 2, 4], torch.tensor([1, 6]), np.array([3])])
def test_a_completion_ends_with_the_first_of_several_tokens(way: str, ends: Any) -> None:
    policy, params = build(way)
    free, found = (completions(draw(policy, params, eos_id=end)) for end in (None, ends))
    stops = {int(end) for end in ends}
    for whole, cut in zip(free, found, strict=True):
        first = next((t for t, token in enumerate(whole) if token in stops), len(whole) - 1)
        assert cut == whole[: first + 1]
    assert any(len(cut) < len(whole) for whole, cut in zip(free, found, strict=True))


def test_one_end_token_is_a_list_of_one_and_none_an_empty_one() -> None:
    policy, params = build("gpt2 / cache")
    assert completions(draw(policy, params, eos_id=EOS)) == completions(draw(policy, params, eos_id=[EOS]))
    assert completions(draw(policy, params, eos_id=None)) == completions(draw(policy, params, eos_id=()))


BAD = [
    ({"temperature": 0.0}, "The temperature is 0.0; expected a number above 0"),
    ({"temperature": float("nan")}, "The temperature is nan"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0; expected a whole number of at least 1"),
    ({"group_size": 1.5}, "group_size is 1.5"),
    ({"batch_size": -1}, "batch_size is -1"),
    ({"eos_id": 7}, "eos_id is 7; expected a token id below 7, or None"),
    ({"eos_id": [0, 7]}, "eos_id is 7; expected a token id below 7, several of them, or None"),
    ({"eos_id": [-1]}, "eos_id is -1; expected a token id below 7"),
    ({"eos_id": 1.0}, "eos_id is 1.0; expected a token id below 7"),
    ({"eos_id": True}, "eos_id is True; expected a token id below 7"),
    ({"eos_id": "</s>"}, "eos_id is '<'; expected a token id below 7"),
    ({"prompts": []}, "There are no prompts"),
    ({"prompts": [[1], []]}, "Prompt 1 is empty"),
    ({"prompts": [[1, 7]]}, "Prompt 0 holds token id 7, outside the vocabulary of 7"),
    ({"prompts": [[1] * 60]}, "60 tokens, which with 6 new ones exceeds the 64 positions"),
    ({"reward": lambda prompts, completions: [1.0]}, "returned 1 values for 12 completions"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_input_is_refused_with_the_fix(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw(*build("gpt2 / cache"), **options)
