"""Batches with scores that no model gave: what the laws of objectives draw."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from funcprobe.types import Rollouts, TokenScores

law = settings(max_examples=30)
law_of_a_table = settings(max_examples=12)  # each of dozens of rows that share their terms


class Batch(NamedTuple):
    """Rollouts with the scores that a policy gave them."""

    rollouts: Rollouts
    scores: TokenScores


def batch(
    mask: list[list[bool]] | Tensor,
    seed: int = 0,
    *,
    old: bool = True,
    ref: bool = True,
    spread: float = 0.4,
    **fields: Any,
) -> Batch:
    """A batch with this mask: groups of two, random rewards, NaN wherever nothing should ever be looked at."""
    mask = torch.as_tensor(mask)
    rows, width = mask.shape
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    logp = -2 * torch.rand(rows, width, generator=g, dtype=torch.float64) - 0.01
    stored = {
        "old_logps": torch.where(mask, logp + spread * normal(rows, width), torch.nan),
        "ref_logps": torch.where(mask, logp + normal(rows, width), torch.nan),
    }
    entropy = torch.rand(rows, width, generator=g, dtype=torch.float64)
    rollouts = Rollouts(
        ids=torch.zeros(rows, width + 1, dtype=torch.int64),
        attention_mask=torch.ones(rows, width + 1, dtype=torch.bool),
        prompt_lengths=torch.ones(rows, dtype=torch.int64),
        completion_mask=mask,
        temperature=torch.ones(rows, dtype=torch.float64),
        group_ids=torch.arange(rows) // 2,
        weight=torch.ones(rows, dtype=torch.float64),
        rewards=normal(rows),
        old_logps=stored["old_logps"] if old else None,
        ref_logps=stored["ref_logps"] if ref else None,
    )
    scores = TokenScores(torch.where(mask, logp, 0.0), torch.where(mask, entropy, 0.0))
    return Batch(rollouts._replace(**fields), scores)


@st.composite
def masks(draw: st.DrawFn, max_pairs: int = 3, max_tokens: int = 5) -> list[list[bool]]:
    """A [B, T] mask with B even: holes anywhere, rows without a token, at least one token in all."""
    rows, width = 2 * draw(st.integers(1, max_pairs)), draw(st.integers(1, max_tokens))
    row = st.lists(st.booleans(), min_size=width, max_size=width)
    mask = draw(st.lists(row, min_size=rows, max_size=rows))
    mask[draw(st.integers(0, rows - 1))][draw(st.integers(0, width - 1))] = True
    return mask


seeds = st.integers(0, 2**31)
