"""Batches of the stateful system, dictionaries of `[B, G, T]` tensors, as rollouts: right-padded, no token lost.

In such a dictionary prompts are left-padded to `prompt_lens[b]` columns, completions follow and are right-padded:

    sequences [B, G, T], attention_masks [B, G, T], prompt_lens [B]       required
    gen_lens [B][G]         completion tokens, the end-of-sequence token included
    advantages [B, G], rewards [B, G]
    max_lengths [B]         L_max of the loss, by default the longest completion of the prompt
    old_logps [B, G, T]     log-probabilities that the ratio is taken against, aligned with `sequences`
    temperature             at which all rows were sampled, in place of the configured one
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from funcprobe.checkpoints.live import unwrapped
from funcprobe.compat.settings import Settings
from funcprobe.data.rollouts import rollouts_from_lists
from funcprobe.errors import InputError
from funcprobe.types import Rollouts

#: A batch of the stateful system, or rollouts as they are.
Batch = Mapping[str, Any] | Rollouts


def to_rollouts(batch: Batch, temperature: float = 1.0, eos: Collection[int] = ()) -> Rollouts:
    """Return B·G rows, prompt by prompt; group ids number the prompts. Rollouts come back as they are.

    The completion of a row is its `gen_lens` tokens or, without these, all that the mask attends to after the prompt,
    and the end-of-sequence token (one of `eos`) behind it where the mask left that out, as `sequences != pad` does
    where pad equals eos. Tokens of the prompt are those from the first that is attended to.

    Raises:
        InputError: If a key is missing, shapes do not fit, a mask has a hole, or `gen_lens` leaves out attended tokens.

    Example:
        >>> ids, mask = torch.tensor([[[0, 5, 6, 0, 0]]]), torch.tensor([[[0, 1, 1, 0, 0]]])
        >>> batch = {"sequences": ids, "attention_masks": mask, "prompt_lens": [2], "advantages": [[1.0]]}
        >>> to_rollouts(batch, eos=[0]).ids  # left padding goes, one 0 stays: it ended the completion
        tensor([[5, 6, 0]])
    """
    if isinstance(batch, Rollouts):
        return batch
    ids, attended = _tensors(batch)
    prompts, group_size, width = ids.shape
    starts = _per_prompt(batch["prompt_lens"], "prompt_lens", prompts, width - 1).tolist()
    lengths = batch.get("gen_lens", batch.get("gen_lengths"))
    counts = None if lengths is None else torch.as_tensor(lengths).reshape(prompts, group_size).tolist()
    rows = ids.flatten(0, 1).tolist()
    cuts: list[tuple[slice, slice]] = []
    for b, g in itertools.product(range(prompts), range(group_size)):
        count, where = None if counts is None else counts[b][g], f"of prompt {b}, completion {g}"
        cuts.append(_cut(rows[len(cuts)], attended[b, g].tolist(), starts[b], count, eos, where))
    old_logps = _per_row(batch, "old_logps", ids.shape)
    return rollouts_from_lists(
        [row[prompt] for row, (prompt, _) in zip(rows, cuts, strict=True)],
        [row[completion] for row, (_, completion) in zip(rows, cuts, strict=True)],
        temperature=batch.get("temperature", temperature),
        group_ids=torch.arange(prompts).repeat_interleave(group_size),
        rewards=_per_row(batch, "rewards", ids.shape[:2]),
        advantages=_per_row(batch, "advantages", ids.shape[:2]),
        old_logps=None if old_logps is None else [x[c] for x, (_, c) in zip(old_logps, cuts, strict=True)],
    )


def _cut(
    ids: list[int], attended: list[bool], start: int, count: int | None, eos: Collection[int], where: str
) -> tuple[slice, slice]:
    """Return the columns of a row's prompt and of its completion, which begins at `start`.

    Raises:
        InputError: If `count`, its length by `gen_lens`, and the mask contradict each other, or the mask has a hole.
    """
    real = [t for t, is_attended in enumerate(attended) if is_attended]
    first, seen = min([start, *real]), max([start, *(t + 1 for t in real)])
    if count is None:  # an end token that the mask left out belongs to the completion, unless one has been seen
        ended = seen > start and ids[seen - 1] in eos
        end = seen + (not ended and seen < len(ids) and ids[seen] in eos)
    else:
        end = start + count
    if not seen <= end <= len(ids):
        raise InputError(
            f"gen_lens {where} is {count}, and the attention mask counts {seen - start} tokens after the padded "
            f"prompt, of {len(ids) - start} columns. Count from the padded prompt length on, and the end-of-sequence "
            "token with the rest."
        )
    # of what gen_lens count, the last need not be attended to; nor, where pad equals eos, end tokens of a prompt
    if holes := [t for t in range(first, end - 1) if not attended[t] and ids[t] not in eos]:
        raise InputError(
            f"The attention mask {where} has a hole at column {holes[0]} (token {ids[holes[0]]}); padding is left of "
            "the prompt and right of the completion only."
        )
    return slice(first, start), slice(start, end)


def configured(batch: Batch, settings: Settings, sequence_processor: Any, module: nn.Module) -> Rollouts:
    """Return a batch as rollouts, with the temperature and the end tokens of a configuration."""
    end = settings.end_tokens(sequence_processor, unwrapped(module))
    return to_rollouts(batch, settings.temperature(sequence_processor), end)


def for_the_loss(batch: Batch, rollouts: Rollouts) -> Rollouts:
    """Return U with base weights `a_i = 1 / (B_U G_b L_max,b)`, b the prompt of row i.

    Under them a loss that sums its tokens, `Σ_i a_i Σ_t −A m logp`, is the stateful system's
    `(1/B_U) Σ_b −Σ_{g,t} A m logp / (G L_max,b)`.

    Raises:
        InputError: If there is not one `max_lengths` a prompt, at least 1.
    """
    _, row, sizes = torch.unique(rollouts.group_ids, return_inverse=True, return_counts=True)
    longest = torch.zeros_like(sizes).scatter_reduce(0, row, rollouts.completion_mask.sum(1), "amax")
    if not isinstance(batch, Rollouts) and batch.get("max_lengths") is not None:
        longest = _per_prompt(batch["max_lengths"], "max_lengths", len(sizes))
    return rollouts._replace(weight=rollouts.weight / (len(sizes) * sizes * longest).double()[row])


def prompts_in(batch: Batch | None) -> int:
    """Return the number of prompts B of a batch, 0 without one."""
    if batch is None:
        return 0
    return len(batch.group_ids.unique()) if isinstance(batch, Rollouts) else len(batch["sequences"])


def rows_of_prompts(prompts: int, rollouts: Rollouts) -> int:
    """Return how many rows the completions of so many prompts are: a microbatch."""
    return prompts * max(1, len(rollouts.ids) // prompts_in(rollouts))


def _tensors(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    if missing := [key for key in ("sequences", "attention_masks", "prompt_lens") if batch.get(key) is None]:
        raise InputError(f"The batch has no '{missing[0]}'; it holds {sorted(batch)}.")
    ids, mask = (torch.as_tensor(batch[key]).detach().cpu() for key in ("sequences", "attention_masks"))
    if ids.ndim != 3 or 0 in ids.shape or mask.shape != ids.shape:
        raise InputError(
            f"sequences have shape {tuple(ids.shape)}, attention_masks {tuple(mask.shape)}; expected [B, G, T] for "
            "both, and nothing empty."
        )
    for key, found in {"num_prompts": ids.shape[0], "num_responses_per_prompt": ids.shape[1]}.items():
        if batch.get(key) not in (None, found):
            raise InputError(f"{key} is {batch[key]}, and sequences have shape {tuple(ids.shape)}; they must agree.")
    return ids.long(), mask.bool()


def _per_prompt(values: Any, name: str, prompts: int, most: float = math.inf) -> Tensor:
    found = torch.as_tensor(values).cpu().long()
    found = found.expand(prompts) if found.ndim == 0 else found.reshape(-1)
    if len(found) != prompts:
        raise InputError(f"'{name}' has {len(found)} values; expected {prompts}, one a prompt.")
    if bool(((found < 1) | (found > most)).any()):
        raise InputError(f"{name} are {found.tolist()}; expected 1 to {most} for every prompt.")
    return found


def _per_row(batch: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Tensor | None:
    if batch.get(name) is None:
        return None
    values = torch.as_tensor(batch[name]).detach().cpu().double()
    if values.shape != shape:
        raise InputError(f"'{name}' has shape {tuple(values.shape)}; expected {list(shape)}.")
    return values.flatten(0, 1)
