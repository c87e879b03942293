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

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from funcprobe.data.rollouts import rollouts_from_padded
from funcprobe.errors import InputError
from funcprobe.types import Rollouts

#: A batch of the stateful system, or rollouts as they are.
Batch = Mapping[str, Any] | Rollouts


def to_rollouts(batch: Batch, temperature: float = 1.0, eos: Collection[int] = ()) -> Rollouts:
    """Return B·G rows, prompt by prompt; group ids number the prompts.

    The completion of a row is its `gen_lens` tokens or, without these, all that the mask attends to after the prompt,
    and the end-of-sequence token behind it where the mask left that out (as `sequences != pad` does where pad equals
    eos). Tokens of the prompt are those from the first that is attended to. Completions have no holes.

    Args:
        batch: The dictionary. Rollouts come back as they are.
        temperature: At which the rows were sampled, unless the batch says so itself.
        eos: Ids of end-of-sequence tokens.

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
    starts = _per_prompt(batch, "prompt_lens", prompts)
    if bool(((starts < 1) | (starts >= width)).any()):
        raise InputError(f"prompt_lens are {starts.tolist()}; expected 1 to {width - 1}, as sequences have {width}.")
    ends = _ends(batch, ids, attended, starts, eos)
    column, start = torch.arange(width), starts[:, None, None]
    first = torch.where(attended, column, width).amin(-1, keepdim=True)
    completion = (column >= start) & (column < ends[:, :, None])
    real = completion | ((column >= first) & (column < start))
    _check_holes(attended, real, ids, eos)
    return rollouts_from_padded(
        ids.flatten(0, 1),
        real.flatten(0, 1),
        completion.flatten(0, 1),
        temperature=batch.get("temperature", temperature),
        group_ids=torch.arange(prompts).repeat_interleave(group_size),
        advantages=_per_row(batch, "advantages", (prompts, group_size)),
        rewards=_per_row(batch, "rewards", (prompts, group_size)),
        old_logps=_per_row(batch, "old_logps", tuple(ids.shape)),
    )


def for_the_loss(batch: Batch, rollouts: Rollouts) -> Rollouts:
    """Return U with base weights `a_i = 1 / (B_U G_b L_max,b)`, b the prompt of row i.

    Under them a loss that sums its tokens, `Σ_i a_i Σ_t −A m logp`, is the stateful system's
    `(1/B_U) Σ_b −Σ_{g,t} A m logp / (G L_max,b)`.

    Raises:
        InputError: If there is not one `max_lengths` a prompt, at least 1.
    """
    groups, row = torch.unique(rollouts.group_ids, return_inverse=True)
    sizes = torch.bincount(row, minlength=len(groups))
    given = None if isinstance(batch, Rollouts) else batch.get("max_lengths")
    if given is None:
        lengths = rollouts.completion_mask.sum(1)
        longest = torch.zeros_like(sizes).scatter_reduce(0, row, lengths, "amax")
    else:
        longest = _per_prompt({"max_lengths": given}, "max_lengths", len(groups))
        if bool((longest < 1).any()):
            raise InputError(f"max_lengths are {longest.tolist()}; expected at least 1 for every prompt.")
    return rollouts._replace(weight=rollouts.weight / (len(groups) * sizes * longest).double()[row])


def prompts_in(batch: Batch | None) -> int:
    """Return the number of prompts B of a batch, 0 without one."""
    if batch is None:
        return 0
    return len(batch.group_ids.unique()) if isinstance(batch, Rollouts) else len(batch["sequences"])


def rows_of_prompts(prompts: int, rollouts: Rollouts) -> int:
    """Return how many rows the completions of so many prompts are: a microbatch."""
    return prompts * max(1, len(rollouts.ids) // len(rollouts.group_ids.unique()))


def _tensors(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    if missing := [key for key in ("sequences", "attention_masks", "prompt_lens") if batch.get(key) is None]:
        raise InputError(f"The batch has no '{missing[0]}'; it holds {sorted(batch)}.")
    ids = torch.as_tensor(batch["sequences"]).detach().cpu().long()
    attended = torch.as_tensor(batch["attention_masks"]).detach().cpu().bool()
    if ids.ndim != 3 or 0 in ids.shape or attended.shape != ids.shape:
        raise InputError(
            f"sequences have shape {tuple(ids.shape)}, attention_masks {tuple(attended.shape)}; expected [B, G, T] for "
            "both, and nothing empty."
        )
    for key, found in {"num_prompts": ids.shape[0], "num_responses_per_prompt": ids.shape[1]}.items():
        if batch.get(key) not in (None, found):
            raise InputError(f"{key} is {batch[key]}, and sequences have shape {tuple(ids.shape)}; they must agree.")
    return ids, attended


def _ends(batch: Mapping[str, Any], ids: Tensor, attended: Tensor, starts: Tensor, eos: Collection[int]) -> Tensor:
    """Return the column after the last completion token, `[B, G]`.

    Raises:
        InputError: If `gen_lens` and the mask contradict each other.
    """
    width, start = ids.shape[-1], starts[:, None]
    column = torch.arange(width)
    last = torch.where(attended & (column >= start[:, :, None]), column, -1).amax(-1)
    seen = torch.where(last >= 0, last + 1, start)
    lengths = batch.get("gen_lens", batch.get("gen_lengths"))
    if lengths is None:
        return seen + _ended_unseen(ids, seen, start, eos)
    ends = start + torch.as_tensor(lengths).cpu().long().reshape(ids.shape[:2])
    if bool(((ends < seen) | (ends > width)).any()):
        b, g = ((ends < seen) | (ends > width)).nonzero()[0].tolist()
        raise InputError(
            f"gen_lens of prompt {b}, completion {g} is {int(ends[b, g] - starts[b])}, and the attention mask counts "
            f"{int(seen[b, g] - starts[b])} tokens after the padded prompt, of {width - int(starts[b])} columns. Count "
            "from the padded prompt length on, and the end-of-sequence token with the rest."
        )
    return ends


def _ended_unseen(ids: Tensor, seen: Tensor, start: Tensor, eos: Collection[int]) -> Tensor:
    """Return 1 where the column after the completion holds an end token, and no end token has been seen: `[B, G]`."""
    is_end = torch.isin(ids, torch.tensor(sorted(eos), dtype=ids.dtype))
    at = is_end.gather(-1, seen.clamp(max=ids.shape[-1] - 1)[..., None])[..., 0] & (seen < ids.shape[-1])
    before = is_end.gather(-1, (seen - 1)[..., None])[..., 0] & (seen > start)
    return (at & ~before).long()


def _check_holes(attended: Tensor, real: Tensor, ids: Tensor, eos: Collection[int]) -> None:
    # pad equals eos: `sequences != pad` leaves out end tokens inside a prompt too
    hole = real & ~attended & ~torch.isin(ids, torch.tensor(sorted(eos), dtype=ids.dtype))
    beyond = attended & ~real
    # without gen_lens nothing beyond; with them the last column that they count need not be attended to
    ends = torch.where(real, torch.arange(real.shape[-1]), -1).amax(-1, keepdim=True)
    hole = hole & (torch.arange(real.shape[-1]) < ends)
    if bool((hole | beyond).any()):
        b, g, t = (hole | beyond).nonzero()[0].tolist()
        raise InputError(
            f"The attention mask of prompt {b}, completion {g} has a hole at column {t} (token {int(ids[b, g, t])}); "
            "padding is left of the prompt and right of the completion only."
        )


def _per_prompt(batch: Mapping[str, Any], name: str, prompts: int) -> Tensor:
    values = torch.as_tensor(batch[name]).cpu().long().reshape(-1)
    if len(values) == 1 and prompts > 1 and not torch.as_tensor(batch[name]).ndim:
        values = values.expand(prompts)
    if len(values) != prompts:
        raise InputError(f"'{name}' has {len(values)} values; expected {prompts}, one a prompt.")
    return values


def _per_row(batch: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Tensor | None:
    if batch.get(name) is None:
        return None
    values = torch.as_tensor(batch[name]).detach().cpu().double()
    if tuple(values.shape) != shape:
        raise InputError(f"'{name}' has shape {tuple(values.shape)}; expected {list(shape)}.")
    return values.flatten(0, 1)
