"""Cut and join batches: rows, microbatches, prompts; and the overlap of two batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcprobe.data.grouping import numbered, two_prompts
from funcprobe.data.validation import COLUMN_FIELDS, TOKEN_FIELDS
from funcprobe.errors import FuncprobeWarning, InputError
from funcprobe.types import Microbatch, Rollouts, TokenBudget


class Overlap(NamedTuple):
    """The rows and prompts of evaluation rollouts E that also occur in the batch U of the step."""

    sequences: int  #: evaluation rows whose prompt and completion occur token for token in batch U
    prompts: int  #: distinct evaluation prompts that occur there


def take(rollouts: Rollouts, index: Tensor | Sequence[int] | slice) -> Rollouts:
    """Return the rows at `index` (positions, a mask [B] or a slice) as a batch, trimmed to its longest row.

    Raises:
        InputError: If no row is left, or an index is out of range.

    Example:
        >>> from funcprobe.data.rollouts import rollouts_from_lists
        >>> take(rollouts_from_lists([[1], [2]], [[3, 4], [5]], temperature=1.0), [1]).ids
        tensor([[2, 5]])
    """
    rows = _positions(rollouts, index)
    picked = _map(rollouts, lambda name, value: value[rows])
    return _trim(picked)


def members(rollouts: Rollouts, by: str) -> Iterator[tuple[int, Tensor]]:
    """Yield (label, row indices) of every sequence ("sequences"), or of every prompt ("prompts": its group id)."""
    if by == "sequences":
        yield from ((row, torch.tensor([row])) for row in range(len(rollouts.ids)))
        return
    for group in rollouts.group_ids.unique().tolist():
        yield group, (rollouts.group_ids == group).nonzero().flatten()


def concatenate(batches: Sequence[Rollouts]) -> Rollouts:
    """Return one batch of all rows in order, padded to common widths.

    Group ids are taken as they are where none carries two prompts. Where one does, batches whose ids are the default
    ones (equal prompts, numbered by first appearance) are numbered anew, together, by numbers that no other batch
    uses; ids of the caller's own stay, with a FuncprobeWarning that names one that carries two prompts.

    Raises:
        InputError: If there is no batch, or an optional field is present in some batches only.
    """
    if not batches:
        raise InputError("There is nothing to concatenate; give at least one batch.")
    columns, positions = max(b.ids.shape[1] for b in batches), max(b.completion_mask.shape[1] for b in batches)
    joined: dict[str, Tensor | None] = {}
    for name in Rollouts._fields:
        values = [getattr(batch, name) for batch in batches]
        absent = [number for number, value in enumerate(values) if value is None]
        if 0 < len(absent) < len(values):
            raise InputError(
                f"'{name}' is missing in batch {absent[0]} and present in others; give it in all of them or in none."
            )
        if name == "advantages" and any(value is not None and value.ndim == 2 for value in values):
            values = [_by_token(value, batch) for value, batch in zip(values, batches, strict=True)]
        width = columns if name in COLUMN_FIELDS else positions if _is_by_token(name, values) else None
        joined[name] = None if absent else torch.cat([_widen(value, width) for value in values])
    return _rollouts(joined | {"group_ids": _joined_groups(batches)})


def _joined_groups(batches: Sequence[Rollouts]) -> Tensor:
    """Return the group ids of all rows, default ones numbered anew where an id would carry two prompts."""
    prompts = [_keys(batch, batch.prompt_lengths) for batch in batches]
    ids = [batch.group_ids.tolist() for batch in batches]
    every = [key for keys in prompts for key in keys]
    device = batches[0].group_ids.device
    if two_prompts(list(chain(*ids)), every) is None:
        return torch.cat([batch.group_ids for batch in batches])
    default = [own == numbered(keys).tolist() for own, keys in zip(ids, prompts, strict=True)]
    taken = {name for own, plain in zip(ids, default, strict=True) if not plain for name in own}
    free, renumbered = (n for n in count() if n not in taken), dict[bytes, int]()
    for k, keys in enumerate(prompts):
        if default[k]:
            ids[k] = [renumbered[key] if key in renumbered else renumbered.setdefault(key, next(free)) for key in keys]
    if (text := two_prompts(list(chain(*ids)), every)) is not None:
        warnings.warn(text, FuncprobeWarning, stacklevel=3)
    return torch.tensor(list(chain(*ids)), dtype=torch.int64, device=device)


def split(rollouts: Rollouts, fraction: float, generator: torch.Generator) -> tuple[Rollouts, Rollouts]:
    """Return two batches that share no prompt (group), the first with about `fraction` of them, drawn at random.

    Rows keep their order. Each part gets at least one prompt.

    Raises:
        InputError: If `fraction` is not between 0 and 1, or there are fewer than two prompts.
    """
    groups, member = torch.unique(rollouts.group_ids, return_inverse=True)
    if not 0 < fraction < 1:
        raise InputError(f"The fraction is {fraction}; expected a number between 0 and 1.")
    if len(groups) < 2:
        raise InputError("The batch has one prompt (group) only; a split by prompts needs at least two.")
    count = min(max(round(fraction * len(groups)), 1), len(groups) - 1)
    order = torch.randperm(len(groups), generator=generator, device=generator.device)
    first = torch.isin(member, order[:count].to(member.device))
    return take(rollouts, first), take(rollouts, ~first)


def microbatches(rollouts: Rollouts, microbatch: Microbatch) -> list[Tensor]:
    """Return row indices [n] that cover every row once: rows of similar length together, so that padding is small.

    A number cuts the rows, sorted by length, into pieces of that many; a `TokenBudget` takes as many rows as fit with
    padding included (rows x longest <= tokens), at least one; None is one piece in the given order.

    Raises:
        InputError: If the number or the budget is below 1.
    """
    rows = len(rollouts.ids)
    if microbatch is None:
        return [torch.arange(rows, device=rollouts.ids.device)]
    size = microbatch.tokens if isinstance(microbatch, TokenBudget) else microbatch
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InputError(f"The microbatch size is {size!r}; expected a whole number of at least 1, or None.")
    lengths, order = torch.sort(rollouts.attention_mask.sum(1), stable=True)
    if isinstance(microbatch, TokenBudget):
        return list(torch.split(order, _sizes_within(lengths.tolist(), size)))
    return list(torch.split(order, size))


def overlap(evaluation: Rollouts, batch: Rollouts) -> Overlap:
    """Return how many evaluation sequences, and how many evaluation prompts, occur token for token in `batch`.

    An evaluation batch drawn independently of `batch` keeps the error bars honest; overlap makes them optimistic.
    """
    sequences = set(_keys(batch, batch.attention_mask.sum(1)))
    prompts = set(_keys(batch, batch.prompt_lengths))
    return Overlap(
        sequences=sum(key in sequences for key in _keys(evaluation, evaluation.attention_mask.sum(1))),
        prompts=len(prompts & set(_keys(evaluation, evaluation.prompt_lengths))),
    )


def to_device(rollouts: Rollouts, device: torch.device | str) -> Rollouts:
    """Return the batch with every tensor on `device`; the dtypes stay."""
    return _map(rollouts, lambda name, value: value.to(device))


def _map(rollouts: Rollouts, function: Callable[[str, Tensor], Tensor]) -> Rollouts:
    fields = {name: None if value is None else function(name, value) for name, value in rollouts._asdict().items()}
    return _rollouts(fields)


def _rollouts(fields: dict[str, Any]) -> Rollouts:
    return Rollouts(**fields)


def _positions(rollouts: Rollouts, index: Tensor | Sequence[int] | slice) -> Tensor:
    rows, device = len(rollouts.ids), rollouts.ids.device
    every = torch.arange(rows, device=device)
    if isinstance(index, slice):
        picked = every[index]
    else:
        chosen = torch.as_tensor(index, device=device)
        chosen = chosen if chosen.numel() else chosen.long()
        if chosen.dtype != torch.bool and chosen.numel() and not -rows <= int(chosen.min()) <= int(chosen.max()) < rows:
            raise InputError(
                f"The index reaches from {int(chosen.min())} to {int(chosen.max())}; there are {rows} rows."
            )
        picked = every[chosen].reshape(-1)
    if picked.numel() == 0:
        raise InputError(f"The index picks none of the {rows} rows; a batch has at least one.")
    return picked


def _trim(rollouts: Rollouts) -> Rollouts:
    lengths = rollouts.attention_mask.sum(1)
    columns, positions = int(lengths.max()), max(1, int((lengths - rollouts.prompt_lengths).max()))

    def trimmed(name: str, value: Tensor) -> Tensor:
        if name in COLUMN_FIELDS:
            return value[:, :columns].contiguous()
        return value[:, :positions].contiguous() if _is_by_token(name, [value]) else value

    return _map(rollouts, trimmed)


def _is_by_token(name: str, values: Sequence[Tensor | None]) -> bool:
    """Return whether a field has a value for every completion position; advantages may have or not."""
    return name in TOKEN_FIELDS or (
        name == "advantages" and any(value is not None and value.ndim == 2 for value in values)
    )


def _by_token(advantages: Tensor | None, rollouts: Rollouts) -> Tensor | None:
    """Return advantages of rows as those of their tokens, so that batches of both kinds join."""
    if advantages is None or advantages.ndim == 2:
        return advantages
    return torch.where(rollouts.completion_mask, advantages[:, None], 0.0)


def _widen(value: Tensor, width: int | None) -> Tensor:
    if width is None or value.shape[1] == width:
        return value
    return torch.nn.functional.pad(value, (0, width - value.shape[1]))


def _sizes_within(lengths: list[int], tokens: int) -> list[int]:
    """Cut ascending lengths greedily: a row joins while (rows so far + 1) x its length still fits."""
    sizes = [0]
    for length in lengths:
        if sizes[-1] and (sizes[-1] + 1) * length > tokens:
            sizes.append(0)
        sizes[-1] += 1
    return sizes


def _keys(rollouts: Rollouts, lengths: Tensor) -> list[bytes]:
    """Return the first `lengths` [B] tokens of every row, hashable."""
    ids = rollouts.ids.cpu().numpy()
    return [row[:n].tobytes() for row, n in zip(ids, lengths.tolist(), strict=True)]
