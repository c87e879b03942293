"""Is this batch usable? One calm error for the first thing that is not, with the row it is in."""

from __future__ import annotations

import torch
from torch import Tensor

from funcprobe.errors import InputError
from funcprobe.types import Rollouts

#: Nats by which a stored log-probability may exceed 0: float32 log-sum-exp of logits near 100 rounds by about 1e-5.
LOGP_SLACK = 1e-4

#: Fields of shape [B, L], [B, T] and those of log-probabilities.
COLUMN_FIELDS = ("ids", "attention_mask")
TOKEN_FIELDS = ("completion_mask", "sampling_logps", "old_logps", "ref_logps", "token_weights")
LOGP_FIELDS = ("sampling_logps", "old_logps", "ref_logps")
INTEGER_FIELDS = ("ids", "prompt_lengths", "group_ids", "top_k", "step")
BOOLEAN_FIELDS = ("attention_mask", "completion_mask")


def validate(rollouts: Rollouts, vocab_size: int | None = None) -> Rollouts:
    """Return the rollouts unchanged, or raise an error that names the fault of the first row that cannot be used.

    Checked: shapes and dtypes, right padding, token ids in [0, vocab_size), at least one completion token in the batch
    and none over the prompt or the padding (a row may have none: a completion that is masked out whole counts in
    baselines and in means over sequences), temperature > 0, finite rewards and advantages, finite log-probabilities
    that are at most 0 (up to rounding) where the completion mask is 1, weights that are not negative nor all zero,
    0 < top_p <= 1, top_k >= 0. Rows are counted from 0.

    Raises:
        InputError: On the first failure, with its row number and what to do.
    """
    _check_shapes(rollouts)
    _check_padding(rollouts)
    _check_ids(rollouts, vocab_size)
    _check_completions(rollouts)
    _check_row_values(rollouts)
    _check_weight(rollouts.weight)
    for name in LOGP_FIELDS:
        _check_logps(name, getattr(rollouts, name), rollouts.completion_mask)
    return rollouts


def _check_shapes(rollouts: Rollouts) -> None:
    if rollouts.ids.ndim != 2 or len(rollouts.ids) == 0:
        raise InputError(
            f"The batch is empty: ids have shape {tuple(rollouts.ids.shape)}; expected [B, L] with B >= 1."
        )
    rows, width = rollouts.ids.shape
    positions = rollouts.completion_mask.shape[-1]
    for name, value in rollouts._asdict().items():
        if value is None:
            continue
        by_token = name in TOKEN_FIELDS or (name == "advantages" and value.ndim == 2)
        shape = (rows, width) if name in COLUMN_FIELDS else (rows, positions) if by_token else (rows,)
        if tuple(value.shape) != shape:
            raise InputError(f"'{name}' has shape {tuple(value.shape)}; expected {shape} for {rows} rows.")
        if value.dtype != _dtype(name):
            raise InputError(f"'{name}' has dtype {value.dtype}; expected {_dtype(name)}.")


def _dtype(name: str) -> torch.dtype:
    return torch.int64 if name in INTEGER_FIELDS else torch.bool if name in BOOLEAN_FIELDS else torch.float64


def _check_padding(rollouts: Rollouts) -> None:
    mask = rollouts.attention_mask
    if (row := _first(mask[:, 1:] & ~mask[:, :-1])) is not None:
        raise InputError(
            f"Row {row} is not right-padded: a real token follows padding. Build the batch with rollouts_from_padded, "
            "which compacts every row by its attention mask."
        )


def _check_ids(rollouts: Rollouts, vocab_size: int | None) -> None:
    _check_range(rollouts, rollouts.ids < 0, "is negative; token ids start at 0")
    if vocab_size is not None:
        what = f"is outside the vocabulary of {vocab_size} entries; were the rollouts made with another tokenizer?"
        _check_range(rollouts, rollouts.ids >= vocab_size, what)


def _check_range(rollouts: Rollouts, outside: Tensor, what: str) -> None:
    outside = outside & rollouts.attention_mask
    if (row := _first(outside)) is not None:
        column = int(outside[row].int().argmax())
        raise InputError(f"Row {row}: token id {int(rollouts.ids[row, column])} at position {column} {what}.")


def _check_completions(rollouts: Rollouts) -> None:
    mask, start = rollouts.completion_mask, rollouts.prompt_lengths
    length = rollouts.attention_mask.sum(1) - start
    if (row := _first(start < 1)) is not None:
        raise InputError(
            f"Row {row}: the completion starts at token {int(start[row])}, so that its completion mask reaches over "
            "the prompt; every row needs at least one prompt token (the start-of-sequence token will do)."
        )
    if not bool(mask.any()):
        raise InputError(
            f"Row 0 has no completion token: its completion mask is empty, and so is that of every row ({len(mask)}). "
            "Mark the tokens that the policy chose with 1."
        )
    beyond = mask & (torch.arange(mask.shape[1], device=mask.device) >= length[:, None])
    if (row := _first(beyond)) is not None:
        raise InputError(
            f"Row {row}: the completion mask marks {int(beyond[row].sum())} positions past the last real token, and "
            f"the completion has {max(0, int(length[row]))} tokens; it must be 0 on padding."
        )


def _check_row_values(rollouts: Rollouts) -> None:
    t, top_p, top_k = rollouts.temperature, rollouts.top_p, rollouts.top_k
    hint = "give the temperature that the row was sampled at, a number above 0 (greedy decoding has no log-probability)"
    _check_rows("temperature", t, ~torch.isfinite(t) | (t <= 0), hint)
    for name in ("rewards", "advantages"):
        value = getattr(rollouts, name)
        if value is not None:
            wrong = ~torch.isfinite(value) & (rollouts.completion_mask if value.ndim == 2 else True)
            _check_rows(name, value, wrong, "every row needs a finite number; drop or mend the row")
    if top_p is not None:
        _check_rows("top_p", top_p, ~((top_p > 0) & (top_p <= 1)), "expected 0 < top_p <= 1, 1 when unrestricted")
    if top_k is not None:
        _check_rows("top_k", top_k, top_k < 0, "expected top_k >= 0, 0 when unrestricted")


def _check_rows(name: str, value: Tensor, wrong: Tensor, hint: str) -> None:
    if (row := _first(wrong)) is not None:
        first = value[row].reshape(-1)[wrong[row].reshape(-1)][0]
        raise InputError(f"Row {row}: {name} is {first.item()}; {hint}.")


def _check_weight(weight: Tensor) -> None:
    _check_rows("weight", weight, ~torch.isfinite(weight) | (weight < 0), "weights are finite and not negative")
    if not bool((weight > 0).any()):
        raise InputError(f"All {len(weight)} weights are 0; at least one row must count. The default weight is 1.")


def _check_logps(name: str, logps: Tensor | None, mask: Tensor) -> None:
    if logps is None:
        return
    wrong = mask & (~torch.isfinite(logps) | (logps > LOGP_SLACK))
    if (row := _first(wrong)) is not None:
        position = int(wrong[row].int().argmax())
        raise InputError(
            f"Row {row}: {name} is {float(logps[row, position])} at completion position {position}; expected a finite "
            "log-probability in nats, at most 0. Probabilities and negated values must be converted first."
        )


def _first(wrong: Tensor) -> int | None:
    """Return the first row in which anything is wrong."""
    rows = wrong.reshape(len(wrong), -1).any(1)
    return int(rows.int().argmax()) if bool(rows.any()) else None
