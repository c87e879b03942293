"""The update between two checkpoint folders of one run: Δθ, whoever took the steps."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from funcprobe.checkpoints.checkpoint import Checkpoint
from funcprobe.checkpoints.folder import load_checkpoint
from funcprobe.errors import CheckpointError
from funcprobe.measurement.move import displacement
from funcprobe.measurement.update import Update
from funcprobe.types import Params

#: Tokens of the row on which the two models are held against each other.
TRIED_TOKENS = 8


def between(
    before: str | Path | Checkpoint,
    after: str | Path,
    base_model: str | Path | nn.Module | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
) -> Update:
    """Return the update that leads from one checkpoint folder to another: one step of a run, or many.

    Δθ is their difference, subtracted in float64; θ′ is the second checkpoint as it is. It knows its parameters alone:
    no gradient, no tokens, no learning rate. What is measured with it is the whole way between the two, so rollouts E
    have to be drawn from the first.

    Args:
        before: Folder of θ, or the checkpoint that was loaded from it: its updates can then be compared with this one.
        after: Folder of θ′.
        base_model: As in `load_checkpoint`, for adapters.
        dtype: What folders are loaded as; float32 holds bfloat16 and float16 files exactly.
        device: Where the policy and its parameters go. A loaded checkpoint has both already.

    Raises:
        CheckpointError: If either cannot be read, or they are not checkpoints of one model with the same trainable
            leaves.
        MissingExtraError: If transformers, or for an adapter peft, is not installed.
    """
    load = partial(load_checkpoint, base_model=base_model, optimizer=None)
    if isinstance(before, Checkpoint):
        first, named = before, "the loaded checkpoint"
        leaf = next(iter(first.params.values()))
        dtype, device = leaf.dtype, leaf.device
    else:
        first, named = load(before, dtype=dtype, device=device), str(before)
    second = load(after, dtype=dtype, device=device)
    _check_leaves(first, second, named, str(after))
    _check_frozen(first, second, named, str(after))
    return Update.from_delta(first.policy, first.params, displacement(first.params, second.params), second.params)


def _check_leaves(first: Checkpoint, second: Checkpoint, before: str, after: str) -> None:
    a, b = (_shapes(each.params) for each in (first, second))
    if a != b:
        odd = sorted(a.items() ^ b.items())[0][0]
        raise CheckpointError(
            f"{before} and {after} have different trainable leaves (such as '{odd}'); give two checkpoints of one run."
        )


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in params.items()}


def _check_frozen(first: Checkpoint, second: Checkpoint, before: str, after: str) -> None:
    """Check that the two models are one function of the trainable leaves: frozen weights and settings agree.

    Raises:
        CheckpointError: If they say different things of one short row at the same leaves.
    """
    ids = torch.arange(TRIED_TOKENS, device=first.policy.device)[None] % first.policy.vocab_size
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        one, two = (_logits(each, second.params, ids, mask) for each in (first, second))
    if not torch.equal(one, two):
        raise CheckpointError(
            f"The models in {before} and {after} differ in more than their trainable leaves (another base model, or "
            "other settings); give two checkpoints of one run."
        )


def _logits(checkpoint: Checkpoint, params: Params, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    policy = checkpoint.policy
    return policy.readout(params, policy.features(params, ids, mask)[0])
