"""Blocks cover what is seen, once, and chunks all heads."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprobe.engine.attention_blocks import blocks_of, chunks_of

SIZES = st.integers(1, 12)


@given(SIZES, SIZES, SIZES, SIZES, st.integers(0, 99), st.sampled_from(["none", "causal", "boolean", "additive"]))
def test_blocks_cover_what_is_seen_once(queries: int, keys: int, t: int, s: int, seed: int, kind: str) -> None:
    g = torch.Generator().manual_seed(seed)
    seen = torch.rand(2, 1, queries, keys, generator=g) > 0.8
    given_mask = {"boolean": seen, "additive": torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)}.get(kind)
    if kind not in ("boolean", "additive"):
        seen = torch.ones(1, 1, queries, keys, dtype=torch.bool)
        seen = seen.tril() if kind == "causal" else seen
    count = torch.zeros(queries, keys, dtype=torch.int64)
    for row in blocks_of(given_mask, kind == "causal", queries, keys, (t, s)):
        for block in row:
            part = seen[..., block.queries, block.keys]
            count[block.queries, block.keys] += 1
            assert bool(part.any())
            assert block.whole == bool(part.all())
            assert len({b.queries.start for b in row}) == 1
    assert int(count.max()) <= 1
    assert bool((count >= seen.any(0).any(0)).all())


@given(SIZES, SIZES, SIZES, SIZES)
def test_chunks_cover_all_heads_within_the_budget(batch: int, heads: int, entries: int, budget: int) -> None:
    count = torch.zeros(batch, heads, dtype=torch.int64)
    for chunk in chunks_of(batch, heads, entries, budget):
        part = count[chunk.batch, chunk.heads]
        part += 1
        assert part.numel() == 1 or part.numel() * entries <= budget
    assert bool((count == 1).all())
