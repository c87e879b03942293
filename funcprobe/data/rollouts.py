"""Build a batch of rollouts: from lists of token ids, or from padded arrays of any padding side.

Whatever comes in, `Rollouts` comes out right-padded (prompt, completion, padding), validated, on the CPU. Only masks
decide what is a token: an end-of-sequence token used as padding, or one inside a completion, changes nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funcprobe.data.grouping import as_numbers, group_names, numbered, two_prompts
from funcprobe.data.ragged import Array, Ragged, as_dtype, columns, pad, ragged_from_dense, ragged_from_lists, to_array
from funcprobe.data.slicing import Overlap, concatenate, members, microbatches, overlap, split, take, to_device
from funcprobe.data.validation import validate
from funcprobe.errors import FuncprobeWarning, InputError
from funcprobe.types import Rollouts

__all__ = [
    "Overlap",
    "concatenate",
    "members",
    "microbatches",
    "overlap",
    "rollouts_from_lists",
    "rollouts_from_padded",
    "rollouts_from_ragged",
    "split",
    "take",
    "to_device",
    "validate",
]

#: Optional per-row fields and the type of their numbers.
ROW_FIELDS = {"rewards": float, "advantages": float, "top_p": float, "top_k": int, "step": int}


def rollouts_from_lists(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    temperature: Any,
    rewards: Any = None,
    advantages: Any = None,
    group_ids: Any = None,
    completion_masks: Sequence[Any] | None = None,
    sampling_logps: Sequence[Any] | None = None,
    old_logps: Sequence[Any] | None = None,
    ref_logps: Sequence[Any] | None = None,
    weight: Any = None,
    top_p: Any = None,
    top_k: Any = None,
    step: Any = None,
    vocab_size: int | None = None,
) -> Rollouts:
    """Return the batch of B prompts and completions given as lists (or arrays) of token ids, without padding.

    `completion_masks` and the log-probabilities are lists aligned with the completions; the mask defaults to all ones.
    Per-row fields are one number for all rows or B numbers. `group_ids` default to equal prompts, numbered by first
    appearance; integers of 64 bits stay as they are, and anything else that can be a key (text, a UUID, a tuple, larger
    integers) is numbered by first appearance. `weight` defaults to 1. A log-probability where the mask is 0 is stored
    as 0. A row may have no chosen token; the batch needs one.

    Raises:
        InputError: If the lists do not fit one another, or the batch fails `validate`.

    Example:
        >>> batch = rollouts_from_lists([[1, 2], [1]], [[3], [4, 5]], temperature=1.0)
        >>> batch.ids.tolist(), batch.prompt_lengths.tolist()
        ([[1, 2, 3], [1, 4, 5]], [2, 1])
    """
    logps = {"sampling_logps": sampling_logps, "old_logps": old_logps, "ref_logps": ref_logps}
    return rollouts_from_ragged(
        ragged_from_lists(prompts, "prompts", int),
        ragged_from_lists(completions, "completions", int),
        completion_masks=_optional(completion_masks, "completion_masks", bool),
        logps={name: ragged_from_lists(rows, name, float) for name, rows in logps.items() if rows is not None},
        vocab_size=vocab_size,
        temperature=temperature,
        group_ids=group_ids,
        weight=weight,
        rewards=rewards,
        advantages=advantages,
        top_p=top_p,
        top_k=top_k,
        step=step,
    )


def rollouts_from_padded(
    ids: Any,
    attention_mask: Any,
    completion_mask: Any,
    *,
    temperature: Any,
    prompt_lengths: Any = None,
    rewards: Any = None,
    advantages: Any = None,
    group_ids: Any = None,
    sampling_logps: Any = None,
    old_logps: Any = None,
    ref_logps: Any = None,
    weight: Any = None,
    top_p: Any = None,
    top_k: Any = None,
    step: Any = None,
    vocab_size: int | None = None,
) -> Rollouts:
    """Return the batch of [B, L] ids padded on any side (left, right, or between prompt and completion).

    Every row is compacted to its tokens with attention mask 1. The completion starts at the first token whose
    `completion_mask` [B, L] is 1; for completions that begin with a hole give `prompt_lengths` [B], in real tokens. A
    row without such a token (one that was truncated, say) has the longest prompt of another row that it begins with;
    where it begins with none, it is all prompt.
    Log-probabilities are [B, L] aligned with ids, or [B, T] with column t at completion position t, as TRL has them.
    Per-row fields are as in `rollouts_from_lists`.

    Raises:
        InputError: If the shapes do not fit, a completion mask lies on padding or over the prompt, or the batch
            fails `validate`.

    Example:
        >>> rollouts_from_padded([[0, 7, 8, 0]], [[0, 1, 1, 0]], [[0, 0, 1, 0]], temperature=1.0).ids
        tensor([[7, 8]])
    """
    tokens = as_dtype(to_array(ids, "ids"), "ids", int)
    attention = _mask_like(attention_mask, tokens, "attention_mask")
    chosen = _mask_like(completion_mask, tokens, "completion_mask")
    starts = _completion_starts(attention, chosen, prompt_lengths)
    if prompt_lengths is None:
        starts = _starts_of_others(tokens, attention, chosen, starts)
    in_completion = attention & (attention.cumsum(axis=1) > starts[:, None])
    logps = {"sampling_logps": sampling_logps, "old_logps": old_logps, "ref_logps": ref_logps}
    return rollouts_from_ragged(
        ragged_from_dense(tokens, attention & ~in_completion),
        ragged_from_dense(tokens, in_completion),
        completion_masks=ragged_from_dense(chosen, in_completion),
        logps={name: _compact(value, name, in_completion) for name, value in logps.items() if value is not None},
        vocab_size=vocab_size,
        temperature=temperature,
        group_ids=group_ids,
        weight=weight,
        rewards=rewards,
        advantages=advantages,
        top_p=top_p,
        top_k=top_k,
        step=step,
    )


def rollouts_from_ragged(
    prompts: Ragged,
    completions: Ragged,
    *,
    temperature: Any,
    completion_masks: Ragged | None = None,
    logps: dict[str, Ragged] | None = None,
    group_ids: Any = None,
    weight: Any = None,
    vocab_size: int | None = None,
    **per_row: Any,
) -> Rollouts:
    """Return the batch of prompts and completions laid end to end: the one place where rollouts are assembled.

    `logps` are by field name and aligned with the completions; `per_row` are the fields of `ROW_FIELDS`.

    Raises:
        InputError: If the rows do not fit one another, or the batch fails `validate`.
    """
    _check_counts(prompts, completions)
    if temperature is None:
        raise InputError(
            "The temperature is missing; give the one that the rows were sampled at, one number or one per row. Scores "
            "and samples at different temperatures make entropies and ratios wrong."
        )
    starts, lengths = prompts.lengths, prompts.lengths + completions.lengths
    mask = _completion_mask(prompts, completions, completion_masks)
    tokens = {name: _token_field(name, ragged, completions, mask) for name, ragged in (logps or {}).items()}
    rows = len(starts)
    rollouts = Rollouts(
        ids=torch.from_numpy(_join(prompts, completions)),
        attention_mask=torch.from_numpy(columns(_width(lengths)) < lengths[:, None]),
        prompt_lengths=torch.from_numpy(starts.astype(np.int64)),
        completion_mask=torch.from_numpy(mask),
        temperature=_row_values(temperature, "temperature", rows, float),
        group_ids=torch.from_numpy(_groups(prompts, group_ids)),
        weight=_row_values(1.0 if weight is None else weight, "weight", rows, float),
        **tokens,
        **{name: _row_field(per_row.get(name), name, rows, dtype) for name, dtype in ROW_FIELDS.items()},
    )
    return _warn_if_truncated(validate(_unrestricted_top_k(rollouts), vocab_size))


def _optional(rows: Sequence[Any] | None, what: str, dtype: type) -> Ragged | None:
    return None if rows is None else ragged_from_lists(rows, what, dtype)


def _check_counts(prompts: Ragged, completions: Ragged) -> None:
    if len(prompts.lengths) != len(completions.lengths):
        raise InputError(
            f"There are {len(prompts.lengths)} prompts and {len(completions.lengths)} completions; expected one prompt "
            "per completion (repeat the prompt for every completion of a group)."
        )
    if len(prompts.lengths) == 0:
        raise InputError("The batch is empty: it has no rows; expected at least one prompt with its completion.")


def _width(lengths: Array) -> int:
    return max(1, int(lengths.max()))


def _join(prompts: Ragged, completions: Ragged) -> Array:
    """Lay prompt and completion of every row side by side; a boolean assignment fills row by row."""
    lengths = prompts.lengths + completions.lengths
    ids = pad(prompts, _width(lengths), np.int64)
    column = columns(ids.shape[1])
    ids[(column >= prompts.lengths[:, None]) & (column < lengths[:, None])] = completions.values
    return ids


def _completion_mask(prompts: Ragged, completions: Ragged, masks: Ragged | None) -> Array:
    width = _width(completions.lengths)
    if masks is None:
        return columns(width) < completions.lengths[:, None]
    if len(masks.lengths) != len(completions.lengths):
        raise InputError(f"There are {len(masks.lengths)} completion masks for {len(completions.lengths)} completions.")
    for row in np.flatnonzero(masks.lengths != completions.lengths)[:1]:
        found, expected = masks.lengths[row], completions.lengths[row]
        covers = found == expected + prompts.lengths[row]
        hint = " It seems to cover the prompt as well; leave that part out." if covers else ""
        raise InputError(f"Row {row}: the completion mask has {found} entries for {expected} completion tokens.{hint}")
    return pad(masks, width, np.bool_)


def _token_field(name: str, field: Ragged, completions: Ragged, mask: Array) -> Tensor:
    if len(field.lengths) != len(completions.lengths):
        raise InputError(f"'{name}' has {len(field.lengths)} rows; expected {len(completions.lengths)}, one per row.")
    for row in np.flatnonzero(field.lengths != completions.lengths)[:1]:
        found, expected = field.lengths[row], completions.lengths[row]
        raise InputError(f"Row {row}: {name} has {found} values for {expected} completion tokens; give one per token.")
    # What stands in a hole is never read, so it is stored as 0 (engines leave NaN or None there).
    return torch.from_numpy(np.where(mask, pad(field, mask.shape[1], np.float64), 0.0))


def _row_field(value: Any, name: str, rows: int, dtype: type) -> Tensor | None:
    return None if value is None else _row_values(value, name, rows, dtype)


def _row_values(value: Any, name: str, rows: int, dtype: type) -> Tensor:
    array = as_dtype(to_array(value, name), name, dtype)
    if array.shape not in ((), (rows,)):
        raise InputError(f"'{name}' has shape {array.shape}; expected one number, or {rows} numbers, one per row.")
    return torch.from_numpy(np.broadcast_to(array, (rows,)).copy())


def _groups(prompts: Ragged, group_ids: Any) -> Array:
    """Return the group ids [B] int64: equal prompts numbered by first appearance, or the given ids, as numbers."""
    ends = np.cumsum(prompts.lengths)
    keys = [prompts.values[end - n : end].tobytes() for end, n in zip(ends, prompts.lengths, strict=True)]
    if group_ids is None:
        return numbered(keys)
    names = group_names(group_ids, len(keys))
    if (text := two_prompts(names, keys)) is not None:
        warnings.warn(text, FuncprobeWarning, stacklevel=5)
    return as_numbers(names)


def _mask_like(mask: Any, tokens: Array, name: str) -> Array:
    array = as_dtype(to_array(mask, name), name, bool)
    if tokens.ndim != 2 or array.shape != tokens.shape:
        raise InputError(f"'{name}' has shape {array.shape}, ids {tokens.shape}; expected [B, L] for both.")
    return array


def _completion_starts(attention: Array, chosen: Array, prompt_lengths: Any) -> Array:
    # How many real tokens of every row come before its completion [B].
    for row in np.flatnonzero((chosen & ~attention).any(axis=1))[:1]:
        raise InputError(f"Row {row}: the completion mask is 1 on a padded column; it must be 0 where attention is 0.")
    # Rank of the first chosen token among the real ones; of a row without one, the number of real tokens.
    before = (attention & ~np.logical_or.accumulate(chosen, axis=1)).sum(axis=1, dtype=np.int64)
    if prompt_lengths is None:
        return before
    starts = _row_values(prompt_lengths, "prompt_lengths", len(attention), int).numpy()
    for row in np.flatnonzero((starts < 1) | (starts > before))[:1]:
        raise InputError(
            f"Row {row}: prompt_lengths is {starts[row]}, but the completion mask starts after {before[row]} real "
            "tokens; expected at least 1, and no completion token over the prompt."
        )
    return starts


def _starts_of_others(tokens: Array, attention: Array, chosen: Array, starts: Array) -> Array:
    # A row in which nothing is chosen does not say where its prompt ends; the other rows of its prompt do.
    silent = ~chosen.any(axis=1)
    if not silent.any():
        return starts
    real = [row[keep].tolist() for row, keep in zip(tokens, attention, strict=True)]
    prompts = {tuple(real[row][: starts[row]]) for row in np.flatnonzero(~silent)}
    found = starts.copy()
    for row in np.flatnonzero(silent):
        lengths = [n for n in range(1, len(real[row]) + 1) if tuple(real[row][:n]) in prompts]
        found[row] = max(lengths, default=starts[row])
    return found


def _compact(value: Any, name: str, in_completion: Array) -> Ragged:
    array = as_dtype(to_array(value, name), name, float)
    lengths = in_completion.sum(axis=1, dtype=np.int64)
    rows, width = in_completion.shape
    if array.shape == (rows, width):
        return ragged_from_dense(array, in_completion)
    if array.ndim != 2 or len(array) != rows or not _width(lengths) <= array.shape[1] < width:
        raise InputError(
            f"'{name}' has shape {array.shape}; expected [{rows}, {width}] aligned with ids, or [{rows}, T] aligned "
            f"with the completions, the longest of which has {_width(lengths)} tokens."
        )
    return ragged_from_dense(array, columns(array.shape[1]) < lengths[:, None])


def _unrestricted_top_k(rollouts: Rollouts) -> Rollouts:
    """Return top_k with 0 for no restriction, which some samplers write as -1."""
    top_k = rollouts.top_k
    return rollouts if top_k is None else rollouts._replace(top_k=torch.where(top_k == -1, 0, top_k))


def _warn_if_truncated(rollouts: Rollouts) -> Rollouts:
    truncated = torch.zeros_like(rollouts.group_ids, dtype=torch.bool)
    if rollouts.top_p is not None:
        truncated |= rollouts.top_p < 1
    if rollouts.top_k is not None:
        truncated |= rollouts.top_k > 0
    if bool(truncated.any()):
        warnings.warn(
            f"{int(truncated.sum())} of {len(truncated)} rows were sampled with top_p < 1 or top_k > 0: the sampler's "
            "log-probabilities are renormalised over a truncated support, so funcprobe recomputes its own from the "
            "policy and reports the mismatch.",
            FuncprobeWarning,
            stacklevel=4,
        )
    return rollouts
