"""Leaves of which every process holds a part: how they are cut, and how they are put together and taken apart again.

A leaf is cut flat and evenly, `⌈n / N⌉` entries a process; the last ones may hold fewer, or none. `gather` makes whole
leaves of parts inside a function that is differentiated. It is linear, so its tangent is a gather of tangents, and its
transpose takes a gradient apart: every process keeps its part of the *sum* of all processes' gradients. So each of them
has to run rows of its own, and all of them have to gather the same leaves in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional
from torch import Tensor
from torch import distributed as dist

from funcprobe.errors import InputError
from funcprobe.parallel.phases import any_inside
from funcprobe.parallel.world import world
from funcprobe.tree import Part
from funcprobe.types import Leaves, OptState, Params

#: The dtype and the device of a leaf.
Kind = tuple[torch.dtype, torch.device]


class Cut:
    """The names of leaves that are gathered together, each with the shape of the whole leaf."""

    def __init__(self, names: Sequence[Part]) -> None:
        self.names = tuple(names)

    def gather(self, params: Leaves) -> Params:
        """Return the whole leaves of a tree of parts; differentiable in every mode, and under vmap."""
        return dict(zip(self.names, _Gather.apply(self, *(params[name] for name in self.names)), strict=True))


def cut(leaves: Leaves) -> Params:
    """Return this process's parts `[n]` of whole leaves, under names that say so; the leaves themselves may then go.

    Raises:
        InputError: If there are no other processes, or a leaf is of a dtype whose arithmetic needs all of it.
    """
    if world().size == 1:
        raise InputError(
            "Leaves are shared out over several processes, and this one is alone; start them with "
            "torchrun --nproc-per-node N, or leave out the shards."
        )
    if half := [name for name, leaf in leaves.items() if leaf.dtype == torch.float16]:
        raise InputError(
            f"The leaf '{half[0]}' is float16, which is not shared out over processes: its tangents are scaled by the "
            "largest entry; load the model in bfloat16 or float32."
        )
    return {Part(name, leaf.shape, _gathered): _own_part(leaf) for name, leaf in leaves.items()}


def shard_state(state: OptState, shards: Params) -> OptState:
    """Return this process's part of an optimizer's state, read leaf by leaf; counts of steps stay whole.

    Raises:
        InputError: If the shards are none, or a leaf has no state.
    """
    if missing := [name for name in shards if name not in state]:
        raise InputError(f"The optimizer state has no entry for '{missing[0]}'; take it from the same checkpoint.")
    return {
        name: {key: x if key == "step" else _own_part(x) for key, x in state[name].items()} for name in _parts(shards)
    }


def gather_leaves(shards: Leaves) -> Params:
    """Return the whole leaves of a tree of parts, without derivatives, in every process.

    Raises:
        InputError: If it is no such tree.
    """
    return {str(name): _put_together([name], [shards[name].detach()])[0] for name in _parts(shards)}


def scattered(names: Sequence[Part], kinds: Sequence[Kind], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return this process's parts of the sums over processes of gradients; None where no process has any.

    A process without a gradient counts as one of zero; `kinds` are the dtypes and devices of the leaves.
    """
    there = _gathered(torch.tensor([g is not None for g in gradients])).any(0).tolist()
    each = zip(names, kinds, gradients, there, strict=True)
    some = {name: _zeros(name, kind) if g is None else g for name, kind, g, somewhere in each if somewhere}
    parts = dict(zip(some, _by_kind(_taken_apart, list(some), list(some.values())), strict=True))
    return [parts.get(name) for name in names]


def _gathered(x: Tensor) -> Tensor:
    """Return the small tensors `[...]` of all N processes, `[N, ...]`.

    Raises:
        InputError: If a transform watches, which would sum nothing.
        FailedElsewhere: Inside a phase, if another process has failed.
    """
    if torch._C._are_functorch_transforms_active():
        raise InputError(
            "A reduction over leaves that lie in several processes was asked for inside a torch.func transform, which "
            "sees this process alone; take it outside."
        )
    any_inside()
    return world().stacked(x)


def _parts(shards: Mapping[Any, Any]) -> list[Part]:
    """Return the names of a tree of parts.

    Raises:
        InputError: If a leaf is whole.
    """
    if strange := [name for name in shards if not isinstance(name, Part)]:
        raise InputError(f"The leaf '{strange[0]}' is whole; expected the parts that `shard` returned.")
    return list(shards)


def _share(shape: Sequence[int]) -> int:
    """Return the most entries of a leaf that a process holds."""
    return -(-math.prod(shape) // world().size)


def _own_part(leaf: Tensor) -> Tensor:
    own, flat, most = world(), leaf.detach().reshape(-1), _share(leaf.shape)
    start = min(own.rank * most, len(flat))
    return flat[start : min(start + most, len(flat))].clone()


def _put_together(names: Sequence[Part], parts: Sequence[Tensor]) -> list[Tensor]:
    """Return whole leaves `[..., *shape]` of parts `[..., n]` of one kind, which are sent together."""
    size, shares, lead = world().size, [_share(name.shape) for name in names], parts[0].shape[:-1]
    own = torch.cat([_filled(part, most) for part, most in zip(parts, shares, strict=True)], -1)
    found = own.new_empty(size, *own.shape)
    dist.all_gather(list(found.unbind(0)), own)
    # a leaf that is sent alone is a view of what came
    pieces = zip(names, found.split(shares, -1), shares, strict=True)
    flat = ((name, piece.movedim(0, -2).reshape((*lead, size * most))) for name, piece, most in pieces)
    return [x[..., : math.prod(name.shape)].reshape((*lead, *name.shape)) for name, x in flat]


def _taken_apart(names: Sequence[Part], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return this process's parts `[..., n]` of the sums over processes of `[..., *shape]` of one kind."""
    own, shares = world(), [_share(name.shape) for name in names]
    lead = leaves[0].shape[: leaves[0].dim() - len(names[0].shape)]
    flat = (x.reshape((*lead, math.prod(name.shape))) for name, x in zip(names, leaves, strict=True))
    cut = [_filled(x, own.size * most).unflatten(-1, (own.size, most)) for x, most in zip(flat, shares, strict=True)]
    sent = torch.cat(cut, -1).movedim(-2, 0).contiguous()
    found = torch.empty_like(sent[0])
    dist.reduce_scatter(found, list(sent.unbind(0)))
    pieces = zip(names, found.split(shares, -1), shares, strict=True)
    return [x[..., : _entries(name, most)].clone() for name, x, most in pieces]


def _entries(name: Part, most: int) -> int:
    """Return how many entries of a leaf this process holds, of at most so many."""
    return max(0, min(most, math.prod(name.shape) - world().rank * most))


def _filled(x: Tensor, entries: int) -> Tensor:
    missing = entries - x.shape[-1]
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def _by_kind(
    together: Callable[[Sequence[Part], Sequence[Tensor]], list[Tensor]], names: Sequence[Part], x: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return the results for all leaves, made of those of one dtype and device together."""
    found: dict[Part, Tensor] = {}
    kinds = dict.fromkeys((each.dtype, each.device) for each in x)
    for kind in kinds:
        mine = {name: each for name, each in zip(names, x, strict=True) if (each.dtype, each.device) == kind}
        found |= zip(mine, together(list(mine), list(mine.values())), strict=True)
    return tuple(found[name] for name in names)


class _Gather(torch.autograd.Function):
    """Parts of several leaves -> the whole leaves, in every process."""

    @staticmethod
    def forward(cut: Cut, *parts: Tensor) -> tuple[Tensor, ...]:
        any_inside()
        return _by_kind(_put_together, cut.names, parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.cut, *parts = inputs
        ctx.kinds = [(part.dtype, part.device) for part in parts]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        names = ctx.cut.names
        if not torch._C._are_functorch_transforms_active():
            return None, *scattered(names, ctx.kinds, gradients)
        known = zip(names, gradients, ctx.kinds, strict=True)
        return None, *_Scatter.apply(ctx.cut, *(_zeros(name, kind) if g is None else g for name, g, kind in known))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        moving = {name: x for name, x in zip(ctx.cut.names, tangents, strict=True) if x is not None}
        found = Cut(list(moving)).gather(moving)  # of what does not move nothing is sent
        known = zip(ctx.cut.names, ctx.kinds, strict=True)
        return tuple(found[name] if name in found else _zeros(name, kind) for name, kind in known)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], cut: Cut, *parts: Tensor) -> tuple[Any, Any]:
        return _Gather.apply(cut, *_first_axis(info, in_dims[1:], parts)), (0,) * len(parts)


class _Scatter(torch.autograd.Function):
    """Whole gradients of several leaves -> this process's parts of their sums over processes."""

    @staticmethod
    def forward(cut: Cut, *gradients: Tensor) -> tuple[Tensor, ...]:
        any_inside()
        return _by_kind(_taken_apart, cut.names, gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.cut = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_Gather.apply(ctx.cut, *cotangents)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = _Scatter.apply(ctx.cut, *tangents)
        return found

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], cut: Cut, *gradients: Tensor) -> tuple[Any, Any]:
        return _Scatter.apply(cut, *_first_axis(info, in_dims[1:], gradients)), (0,) * len(gradients)


def _first_axis(info: Any, in_dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors with the axis that is mapped over in front, where one is not mapped over the same for all."""
    return [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, in_dims, strict=True)
    ]


def _zeros(name: Part, kind: Kind) -> Tensor:
    return torch.zeros(name.shape, dtype=kind[0], device=kind[1])
