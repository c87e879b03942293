"""`shard`: a policy and its leaves, shared out over the processes of a run, so that each holds an N-th of them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from funcprobe.arguments import checked
from funcprobe.errors import InputError, percent
from funcprobe.parallel.blocks import install
from funcprobe.parallel.shards import Cut, cut
from funcprobe.policy.binding import Bound
from funcprobe.policy.checks import ROUNDING_UNITS, gap
from funcprobe.policy.module import Policy
from funcprobe.tree import Part
from funcprobe.types import Params

#: Below this share of trained entries, parts of them save next to nothing: the frozen rest is whole in every process.
WORTH_SHARING = 0.5


@checked
def shard(policy: Policy, params: Params) -> tuple[Policy, Params]:
    """Return a policy whose leaves are parts, and this process's parts `[n]` of the leaves.

    Every process of the run calls it, with the same whole leaves, and lets these go. It then holds an N-th of the
    leaves, and of what has their shape: gradients, Δθ, and an optimizer's state (`shard_state`). A layer's leaves are
    whole while it runs. Verbs give the numbers of whole leaves; a step is taken on parts by SGD, Adam and AdamW.

    The policy that is given lives on in the one that is returned, and cannot be used by itself any more.

    Raises:
        InputError: If this process is alone; or if the model cannot run layer by layer: it is no copy of a module, has
            no list of layers, runs every row by itself, writes to itself inside a layer, mostly stays frozen, is
            float16, or reads a leaf elsewhere than in the module that holds it.
    """
    body = policy.body
    if policy.is_sharded:
        raise InputError("The leaves are parts already; shard the policy and the leaves that from_module returned.")
    if body is None:
        raise InputError(
            "This policy is not one pass of a module a batch (every row runs by itself, or it was made by hand), so "
            "all processes cannot run its layers together; use whole leaves."
        )
    _refuse_frozen(body, params)
    _refuse_state(body)
    parts = cut(params)
    rows = _trial(policy)
    expected = _logits(policy, params, rows)
    names = {str(name): name for name in parts if isinstance(name, Part)}
    install(body, names)
    readout = [names[name] for name in policy.readout_names]
    made = dataclasses.replace(
        policy,
        names=tuple(parts),
        readout_names=tuple(readout),
        decode=None,
        gather=lambda own: Cut([names[name] for name in own]).gather({names[n]: x for n, x in own.items()}),
    )
    _refuse_other(made, parts, rows, expected)
    _let_go(body)
    return made, parts


def _refuse_frozen(body: Bound, params: Params) -> None:
    """Check that most of a model is trained.

    Raises:
        InputError: If it is not.
    """
    total = sum(p.numel() for p in body.skeleton.module.parameters())
    trained = sum(p.numel() for p in params.values())
    if trained < WORTH_SHARING * total:
        raise InputError(
            f"{percent(trained / total)} of the model is trained and can be shared out; the rest is frozen, and whole "
            "in every process, so parts would save next to nothing: use whole leaves, which also share out E and U."
        )


def _refuse_state(body: Bound) -> None:
    """Check that nothing that runs writes to itself.

    Raises:
        InputError: If something does.
    """
    if body.skeleton.stateful:
        raise InputError(
            f"{type(body.skeleton.stateful[0]).__name__} writes to itself in forward, and a layer that runs again in a "
            "backward pass would write twice; use whole leaves."
        )


def _refuse_other(policy: Policy, parts: Params, rows: tuple[Tensor, Tensor], expected: Tensor) -> None:
    """Check that the logits on parts are those on whole leaves.

    Raises:
        InputError: If it does not.
    """
    try:
        off = gap(_logits(policy, parts, rows), expected)
    except (RuntimeError, IndexError) as error:
        raise InputError(
            f"The model reads a leaf elsewhere than in the module that holds it ({type(error).__name__}: "
            f"{next(iter(str(error).splitlines()), '')}), where only a part of it lies; use whole leaves."
        ) from error
    eps = torch.finfo(expected.dtype).eps
    if not off <= ROUNDING_UNITS * eps * (1 + float(expected.abs().nan_to_num(0.0, 0.0, 0.0).max())):
        raise InputError(
            f"The model reads a leaf elsewhere than in the module that holds it (its logits are off by {off:.1e}), "
            "where only a part of it lies; use whole leaves."
        )


def _let_go(body: Bound) -> None:
    """Take whole leaves out of the copy; whatever runs it puts others in their place."""
    empty: dict[int, nn.Parameter] = {}
    for module in (body.skeleton.module, body.module):
        for owner in module.modules():
            for name, p in owner._parameters.items():
                if p is not None and id(p) in body.skeleton.leaves:
                    empty.setdefault(id(p), nn.Parameter(p.new_empty(0)))
                    owner._parameters[name] = empty[id(p)]


def _trial(policy: Policy) -> tuple[Tensor, Tensor]:
    """Return (ids [2, L], mask [2, L]) of two short rows of small ids."""
    width = min(4, policy.max_length or 4)
    ids = 1 + torch.arange(2 * width, device=policy.device).view(2, width).remainder(
        max(1, min(policy.vocab_size, 64) - 1)
    )
    return ids, torch.ones_like(ids, dtype=torch.bool)


@torch.no_grad()
def _logits(policy: Policy, params: Params, rows: tuple[Tensor, Tensor]) -> Tensor:
    hidden = policy.features(params, *rows)
    return policy.readout(policy.readout_leaves(params), hidden.flatten(0, 1))
