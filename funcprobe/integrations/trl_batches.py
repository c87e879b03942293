"""The batches that TRL's `compute_loss` gets, as rollouts: every mask, log-probability and advantage of one step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcprobe.data.rollouts import rollouts_from_padded, validate
from funcprobe.errors import FuncprobeWarning, InputError, listed
from funcprobe.types import Rollouts

#: What `compute_loss` gets: a mapping of tensors by TRL's names.
Inputs = Mapping[str, Any]

REQUIRED = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
#: Fields of images, which a causal language model of tokens alone does not score.
IMAGES = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "image_sizes")


def rollouts_from_trl(
    inputs: Inputs | Sequence[Inputs],
    *,
    temperature: float,
    top_p: float | None = None,
    top_k: int | None = None,
    vocab_size: int | None = None,
) -> Rollouts:
    """Return the batch that one optimizer step trains on: a `compute_loss` inputs dict, or all its micro-batches.

    Rows keep their order, micro-batch after micro-batch; groups are rows of equal prompts, since TRL shuffles them.
    The completion mask is `completion_mask · tool_mask`; a row whose mask is empty (a truncated completion under
    `mask_truncated_completions`) stays, because it counts in means over sequences. Advantages are TRL's own, `[B]`, or
    `[B, T]` where they differ within a row; `importance_sampling_ratio`, which multiplies the policy loss, is in them.
    RLOO's `old_logps [B]`, one sum a row, is spread evenly over the row's tokens: only its sum is ever read.

    vLLM leaves NaN where it reports no log-probability; `old_per_token_logps` takes its place, as TRL's ratio of 1
    does. Without those, `sampling_logps` is left out with a FuncprobeWarning.

    Args:
        inputs: One mapping, or a sequence of them, of TRL's names and tensors on any device.
        temperature: That of `args.temperature`, which TRL divides the scores by as well.
        top_p: That of `args.top_p`, where it is below 1.
        top_k: That of `args.top_k`, where it is not 0.
        vocab_size: Where given, ids are checked against it.

    Raises:
        InputError: If a field is missing, in some micro-batches only, or does not fit; or if there are images.
    """
    batches = micro_batches(inputs)
    prompts, positions = (max(b[name].shape[1] for b in batches) for name in ("prompt_ids", "completion_ids"))
    side_by_side = {
        name: torch.cat(
            [_joined(batches, f"prompt_{name}", prompts, left=True), _joined(batches, f"completion_{name}", positions)],
            1,
        )
        for name in ("ids", "mask")
    }
    chosen = chosen_tokens(batches, positions)
    found = rollouts_from_padded(
        side_by_side["ids"],
        side_by_side["mask"],
        torch.cat([torch.zeros(len(chosen), prompts, dtype=torch.int64), chosen], 1),
        prompt_lengths=side_by_side["mask"][:, :prompts].sum(1),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        vocab_size=vocab_size,
        **_logps(batches, chosen.bool(), positions),
    )
    advantages = _advantages(batches, chosen.bool(), positions)
    width = found.completion_mask.shape[1]
    return validate(found._replace(advantages=advantages if advantages.ndim == 1 else advantages[:, :width]))


def evaluation_from_trl(
    inputs: Inputs | Sequence[Inputs],
    *,
    temperature: float,
    top_p: float | None = None,
    top_k: int | None = None,
    max_length: int | None = None,
) -> Rollouts:
    """Return the rollouts of a generation as E: all that the policy drew, with rows that the loss leaves out.

    `mask_truncated_completions` empties the rows of completions that reached `max_length` without an end; they were
    drawn all the same, and E without them would be one of short completions. Advantages stay behind.

    Raises:
        InputError: As `rollouts_from_trl`.
    """
    whole = [_with_truncated(batch, max_length) for batch in micro_batches(inputs)]
    drawn = rollouts_from_trl(whole, temperature=temperature, top_p=top_p, top_k=top_k)
    by_token = not any(batch.get("old_logps") is not None for batch in whole)  # RLOO's are one sum a row
    return drawn._replace(advantages=None, old_logps=drawn.old_logps if by_token else None)


def _with_truncated(batch: Inputs, max_length: int | None) -> Inputs:
    """Return a micro-batch in which rows that were emptied for their length have their tokens again."""
    mask = batch["completion_mask"]
    if max_length is None or mask.shape[1] < max_length:
        return batch
    emptied = mask.sum(1, keepdim=True) == 0
    return {**batch, "completion_mask": torch.where(emptied, torch.ones_like(mask), mask)}


def micro_batches(inputs: Inputs | Sequence[Inputs]) -> list[Inputs]:
    """Return the micro-batches of one optimizer step as a list, each with the fields that a batch needs.

    Raises:
        InputError: If there is none, if one is no mapping or lacks a field, or if there are images.
    """
    batches = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    if not batches:
        raise InputError("There is no micro-batch; give the inputs that compute_loss got since the last step began.")
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise InputError(f"Micro-batch {number} is a {type(batch).__name__}; expected the inputs of compute_loss.")
        if missing := [name for name in REQUIRED if name not in batch]:
            raise InputError(
                f"Micro-batch {number} has no {listed(missing)}; expected the inputs that GRPOTrainer.compute_loss "
                f"gets, which hold {listed(REQUIRED)}."
            )
        if images := [name for name in IMAGES if batch.get(name) is not None]:
            raise InputError(
                f"Micro-batch {number} holds images ({listed(images)}), and rollouts are token ids alone; probe a run "
                "on text."
            )
    return batches


def _joined(batches: Sequence[Inputs], name: str, width: int, *, left: bool = False) -> Tensor:
    """Return a field of all micro-batches `[B, width]`, padded with 0 where their widths differ."""
    return torch.cat([_widened(batch[name], width, left) for batch in batches])


def _widened(rows: Tensor, width: int, left: bool = False) -> Tensor:
    rows = rows.detach().cpu()
    rows = rows.long() if not rows.is_floating_point() else rows.double()
    padding = rows.new_zeros(len(rows), width - rows.shape[1])
    return torch.cat([padding, rows] if left else [rows, padding], 1)


def chosen_tokens(batches: Sequence[Inputs], width: int) -> Tensor:
    """Return 1 `[B, T]` on the tokens that the policy chose: neither padding, nor truncated, nor a tool's."""
    masks = _joined(batches, "completion_mask", width)
    return masks * _joined(batches, "tool_mask", width) if _everywhere(batches, "tool_mask") else masks


def _everywhere(batches: Sequence[Inputs], name: str) -> bool:
    """Return whether a field is there; it is in all micro-batches of a step, or in none.

    Raises:
        InputError: If it is in some only.
    """
    there = [batch.get(name) is not None for batch in batches]
    if any(there) and not all(there):
        raise InputError(
            f"'{name}' is missing in micro-batch {there.index(False)} and present in others; give micro-batches of one "
            "optimizer step."
        )
    return all(there)


def _logps(batches: Sequence[Inputs], chosen: Tensor, width: int) -> dict[str, Tensor]:
    theirs = {"old_logps": "old_per_token_logps", "ref_logps": "ref_per_token_logps"}
    found = {ours: _joined(batches, name, width) for ours, name in theirs.items() if _everywhere(batches, name)}
    if _everywhere(batches, "old_logps"):
        sums = torch.cat([batch["old_logps"].detach().cpu().double() for batch in batches])
        found["old_logps"] = (sums / chosen.sum(1).clamp(min=1))[:, None].expand(chosen.shape)
    if _everywhere(batches, "sampling_per_token_logps"):
        sampling = _scored(_joined(batches, "sampling_per_token_logps", width), found.get("old_logps"), chosen)
        found |= {} if sampling is None else {"sampling_logps": sampling}
    return found


def _scored(sampling: Tensor, old: Tensor | None, chosen: Tensor) -> Tensor | None:
    """Return the sampler's log-probabilities, the old policy's where it reported none; None where neither is known."""
    unscored = sampling.isnan() & chosen
    if not bool(unscored.any()):
        return sampling
    if old is not None:
        return torch.where(unscored, old, sampling)
    warnings.warn(
        f"The sampler reported no log-probability for {int(unscored.sum())} of {int(chosen.sum())} tokens and there "
        "are no old_per_token_logps to stand in, so sampling_logps are left out.",
        FuncprobeWarning,
        stacklevel=4,
    )
    return None


def _advantages(batches: Sequence[Inputs], chosen: Tensor, width: int) -> Tensor:
    """Return the advantages times the sampler's ratio, which is not negative: `[B]` where a row has one value."""
    values = _per_token(batches, "advantages", width)
    if _everywhere(batches, "importance_sampling_ratio"):
        values = values * _per_token(batches, "importance_sampling_ratio", width)
    first = values.gather(1, chosen.int().argmax(1, keepdim=True))  # an empty row has no token that says more
    return first[:, 0] if bool((values == first)[chosen].all()) else torch.where(chosen, values, 0.0)


def _per_token(batches: Sequence[Inputs], name: str, width: int) -> Tensor:
    """Return a field of shape `[B]`, `[B, 1]` or `[B, T]` as `[B, T]` float64."""
    rows = []
    for batch in batches:
        value = batch[name].detach().cpu().double()
        value = value[:, None] if value.ndim == 1 else value
        rows.append(value.expand(-1, width) if value.shape[1] == 1 else _widened(value, width))
    return torch.cat(rows)
