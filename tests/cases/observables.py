"""What the suites of observables share: all of them, ragged prompts with holes, scores apart from an anchor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from funcprobe.types import Observable, Rollouts, TokenScores
from tests.cases import models
from tests.cases.tables import CONTROLLED, OBSERVABLES

VARIATES = CONTROLLED
#: All but what reads a statistic, which no score here has.
EVERY = tuple(o for name, o in OBSERVABLES.items() if name != "collision")
of_every = pytest.mark.parametrize("o", EVERY, ids=lambda o: o.name)
of_variates = pytest.mark.parametrize("o", VARIATES, ids=lambda o: o.name)


def scored(rollouts: Rollouts, seed: int, spread: float = 0.3) -> tuple[TokenScores, TokenScores]:
    """Return (scores, anchor): random ones, `spread` nats apart."""
    g = torch.Generator().manual_seed(seed)
    mask = rollouts.completion_mask
    logp, entropy, moved, more = (torch.rand(mask.shape, generator=g, dtype=torch.float64) for _ in range(4))
    anchor = TokenScores(-3 * logp * mask, 2 * entropy * mask)
    moved = spread * (2 * moved - 1) * mask
    return TokenScores(anchor.logp + moved, anchor.entropy + spread * (more - 0.4) * mask), anchor


def batch(sizes: list[int], seed: int) -> Rollouts:
    """Return prompts of the given numbers of rollouts, ragged, with holes and rewards."""
    rollouts = models.rollouts(sum(sizes), seed, holes=True)
    groups = [10 * number for number, size in enumerate(sizes) for _ in range(size)]
    shuffled = torch.tensor(groups)[torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))]
    # a prompt's rollouts need not stand together; all of its tokens are the prompt's number, since no model is run
    prompt = torch.arange(rollouts.ids.shape[1]) < rollouts.prompt_lengths.min()
    ids = torch.where(prompt, shuffled[:, None], rollouts.ids)
    return rollouts._replace(
        group_ids=shuffled, ids=ids, prompt_lengths=torch.full_like(rollouts.prompt_lengths, int(prompt.sum()))
    )


sizes = st.lists(st.integers(2, 4), min_size=2, max_size=4)
seeds = st.integers(0, 99)
few = settings(max_examples=8)  # of each of some twenty observables


def both(o: Observable, scores: TokenScores, anchor: TokenScores, rollouts: Rollouts) -> Tensor:
    """Return [2]: the value, and the derivative along scores − anchor."""
    tangents = TokenScores(scores.logp - anchor.logp, scores.entropy - anchor.entropy)
    return torch.stack(torch.func.jvp(lambda s: o(s, anchor, rollouts), (scores,), (tangents,)))  # type: ignore[arg-type]


def rows_of(scores: TokenScores, rows: Tensor, width: int) -> TokenScores:
    return TokenScores(scores.logp[rows, :width], scores.entropy[rows, :width])
