"""Columns of a file as rollouts: all of them, or those of one training step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from funcprobe.data.ragged import Array, Ragged, pad
from funcprobe.data.rollouts import rollouts_from_ragged
from funcprobe.data.schema import Table
from funcprobe.data.validation import LOGP_FIELDS, validate
from funcprobe.errors import InputError
from funcprobe.types import Rollouts

#: Per-row columns whose field has another name.
FIELD_OF = {"reward": "rewards", "advantage": "advantages", "group_id": "group_ids"}


#: Tokens of a batch at most, padding included: 16 GiB of ids.
PADDED = 2**31


def rollouts_of(table: Table, vocab_size: int | None = None, max_length: int | None = None) -> Rollouts:
    """Return the rollouts that the columns of a file hold, validated.

    Raises:
        InputError: If there is no row, one is longer than `max_length`, or the columns do not make rollouts.
    """
    found: dict[str, Any] = dict(table.columns)
    if not found:
        raise InputError("the file holds 0 rows; expected at least one sequence.")
    prompts, completions, masks = (
        found.pop(name, None) for name in ("prompt_ids", "completion_ids", "completion_mask")
    )
    _check_lengths(prompts.lengths + completions.lengths, max_length)
    logps = {name: found.pop(name) for name in LOGP_FIELDS if name in found}
    by_token = found.pop("advantage") if isinstance(found.get("advantage"), Ragged) else None
    per_row = {FIELD_OF.get(name, name): column for name, column in found.items()}
    rollouts = rollouts_from_ragged(
        prompts, completions, completion_masks=masks, logps=logps, vocab_size=vocab_size, **per_row
    )
    return rollouts if by_token is None else _with_advantages(rollouts, completions, by_token)


def _with_advantages(rollouts: Rollouts, completions: Ragged, advantages: Ragged) -> Rollouts:
    """Return the rollouts with advantages of tokens `[B, T]`, or `[B]` where those of every row are equal.

    Raises:
        InputError: If a row has another number of them than tokens, or one is not finite.
    """
    for row in np.flatnonzero(advantages.lengths != completions.lengths)[:1]:
        found, expected = advantages.lengths[row], completions.lengths[row]
        raise InputError(f"Row {row}: advantage has {found} values for {expected} completion tokens; give one a token.")
    mask = rollouts.completion_mask
    values = torch.from_numpy(pad(advantages, mask.shape[1], np.float64))
    first = values[:, :1]  # a completion with advantages of tokens begins at the first token that the policy chose
    is_by_row = bool((values == first)[mask].all())
    return validate(rollouts._replace(advantages=first[:, 0] if is_by_row else torch.where(mask, values, 0.0)))


def _check_lengths(lengths: Array, max_length: int | None) -> None:
    """Refuse rows that are too long for a model, or beside the others, before they are padded to the longest.

    Raises:
        InputError: Naming the longest row.
    """
    row, rows = int(lengths.argmax()), len(lengths)
    longest = int(lengths[row])
    if max_length is not None and longest > max_length:
        raise InputError(
            f"Row {row} has {longest:,} tokens, and the model has positions for {max_length:,}; drop or cut the row."
        )
    if rows * longest > PADDED:
        raise InputError(
            f"Row {row} has {longest:,} tokens, and padding {rows:,} rows to that makes {rows * longest:,}, of which "
            f"{int(lengths.sum()):,} are real; expected at most {PADDED:,}. Drop or cut the row, or give fewer rows."
        )


def one_step(table: Table, step: int | None) -> Table:
    """Return the columns of a dump, whose rows are of one step unless one is named.

    Raises:
        InputError: If they are of several.
    """
    steps = np.unique(np.asarray(table.columns.get("step", ())))
    if step is None and len(steps) > 1:
        raise InputError(
            f"the file holds {len(steps)} steps from {steps[0]} to {steps[-1]}, the rows of each drawn by another "
            "policy; choose one with step=.",
            kind="several steps",
        )
    return table


def rows_of_step(table: Table, step: int) -> Table:
    """Return the rows that were drawn at a step.

    Raises:
        InputError: If there is none.
    """
    keep = of_step(table.columns.get("step"), step)
    return table._replace(columns={name: _keep(column, keep) for name, column in table.columns.items()})


def of_step(steps: Any, step: int) -> Array:
    """Return which rows were drawn at that step.

    Raises:
        InputError: If there is none.
    """
    if steps is None:
        raise InputError(f"step {step} was asked for, but the file has no column 'step'.")
    steps = np.asarray(steps)
    keep: Array = steps == step
    if not keep.any():
        known = np.unique(steps)
        raise InputError(f"no row is of step {step}; the file has {len(known)} steps from {known[0]} to {known[-1]}.")
    return keep


def _keep(column: Ragged | Array, keep: Array) -> Ragged | Array:
    if not isinstance(column, Ragged):
        return column[keep]
    return Ragged(column.values[np.repeat(keep, column.lengths)], column.lengths[keep])
