"""Attention as it is asked for, the blocks of its matrix in which something is seen, and the heads made at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Point(NamedTuple):
    """Attention where its tangent is taken, of heads `[B, H, T, D]`."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None  #: [B | 1, H | 1, T | 1, S | 1]
    causal: bool
    scale: float


class Moves(NamedTuple):
    """The tangents of K directions, `[K, ...]` each, None where nothing moves."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    mask: Tensor | None

    @property
    def many(self) -> int:
        """The number of directions, K."""
        return next(x.shape[0] for x in self if x is not None)


class Block(NamedTuple):
    """A range of queries and one of keys."""

    queries: slice
    keys: slice
    whole: bool  #: whether every query sees every key, so that nothing is to be hidden

    @property
    def diagonal(self) -> int:
        """The diagonal of the block up to which a causal mask shows: torch aligns it with the first query and key."""
        return int(self.queries.start - self.keys.start)


def blocks_of(mask: Tensor | None, causal: bool, queries: int, keys: int, step: tuple[int, int]) -> list[list[Block]]:
    """Return the blocks in which something is seen, by rows of blocks."""
    seen, whole = _counts(mask, queries, keys, step)
    rows = []
    for i, start in enumerate(range(0, queries, step[0])):
        stop = min(start + step[0], queries)
        last = min(stop, keys) if causal else keys
        row = []
        for j, first in enumerate(range(0, last, step[1])):
            end = min(first + step[1], last)
            if seen is None or whole is None:
                row.append(Block(slice(start, stop), slice(first, end), not causal or end <= start + 1))
            elif seen[i][j]:
                row.append(Block(slice(start, stop), slice(first, end), whole[i][j]))
        rows.append(row)
    return rows


def _counts(
    mask: Tensor | None, queries: int, keys: int, step: tuple[int, int]
) -> tuple[list[list[bool]], list[list[bool]]] | tuple[None, None]:
    """Return for each block whether a mask shows anything in it to anybody, and whether it leaves it as it is."""
    if mask is None:
        return None, None

    def any_in_block(x: Tensor) -> list[list[bool]]:
        x = padded(x.flatten(0, -3).any(0).expand(queries, keys), step, False)
        return in_blocks(x, step).any(-1).any(-2).tolist()

    return any_in_block(shown(mask)), [[not cut for cut in row] for row in any_in_block(~plain(mask))]


def shown(mask: Tensor) -> Tensor:
    """Return where a mask lets a query see a key; NaN does, so that it comes out in the value."""
    # half of the lowest number is below all that is added, and what stands for -∞ is below that
    return mask if mask.dtype == torch.bool else ~(mask <= torch.finfo(mask.dtype).min / 2)


def plain(mask: Tensor) -> Tensor:
    """Return where a mask leaves a score as it is."""
    return mask if mask.dtype == torch.bool else mask == 0


def padded(x: Tensor, step: tuple[int, int], value: float) -> Tensor:
    """Return `[..., T, S]` with T and S up to whole blocks."""
    pad = (0, -x.shape[-1] % step[1], 0, -x.shape[-2] % step[0])
    return torch.nn.functional.pad(x, pad, value=value) if any(pad) else x


def in_blocks(x: Tensor, step: tuple[int, int]) -> Tensor:
    """Return `[..., T, S]` of whole blocks as `[..., rows of blocks, t, columns of blocks, s]`."""
    return x.unflatten(-1, (-1, step[1])).unflatten(-3, (-1, step[0]))


class Chunk(NamedTuple):
    """Some heads of keys, of one sequence or of several."""

    batch: slice
    heads: slice

    def rows(self, x: Tensor, at: slice) -> Tensor:
        """Return `[n, G t, D]` of `[B, H, G, T, D]`: the queries of a group meet the same keys."""
        return x[self.batch, self.heads, :, at].flatten(2, 3).flatten(0, 1)

    def columns(self, x: Tensor, at: slice) -> Tensor:
        """Return `[n, s, D]` of `[B, H, S, D]`."""
        return x[self.batch, self.heads, at].flatten(0, 1)

    def place(self, part: Tensor, whole: Tensor, at: slice) -> None:
        """Write `[n, G t, D]` to its place in `[B, H, G, T, D]`."""
        where = whole[self.batch, self.heads, :, at]
        where.copy_(part.view(where.shape))

    def of_mask(self, mask: Tensor, block: Block, heads: int, groups: int) -> Tensor:
        """Return `[n | 1, G | 1, t | 1, s | 1]` of a mask `[B | 1, H | 1, T | 1, S | 1]`."""
        mask = mask[..., block.queries if mask.shape[-2] > 1 else slice(None), :]
        mask = mask[..., block.keys if mask.shape[-1] > 1 else slice(None)]
        mask = mask[self.batch] if mask.shape[0] > 1 else mask
        if mask.shape[:2] == (1, 1):
            return mask
        batch = self.batch.stop - self.batch.start
        mask = mask.expand(batch, heads * groups, *mask.shape[2:]).unflatten(1, (heads, groups))
        return mask[:, self.heads].flatten(0, 1)


def chunks_of(batch: int, heads: int, entries: int, budget: int) -> Iterator[Chunk]:
    """Cut batch and heads so that a block of a chunk keeps to the budget; entries: those of a block of one head."""
    many = max(1, budget // entries)
    if many >= heads:
        each = many // heads
        for b in range(0, batch, each):
            yield Chunk(slice(b, min(b + each, batch)), slice(0, heads))
    else:
        for b in range(batch):
            for h in range(0, heads, many):
                yield Chunk(slice(b, b + 1), slice(h, min(h + many, heads)))
