"""Leaves of which every process holds a part: how they are cut, and how they are put together and taken apart again.

A leaf is cut flat and evenly, `⌈n / N⌉` entries a process; the last ones may hold fewer, or none. `gather` makes whole
leaves of parts inside a function that is differentiated. It is linear, so its tangent is a gather of tangents, and its
transpose takes a gradient apart: every process keeps its part of the *sum* of all processes' gradients. So each of them
has to run rows of its own, and all of them have to gather the same leaves in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    return {Part(name, leaf.shape, _summed): _own_part(leaf) for name, leaf in leaves.items()}


def cut_state(state: OptState, shards: Params) -> OptState:
    """Return this process's part of an optimizer's state, read leaf by leaf; counts of steps stay whole.

    Raises:
        InputError: If the shards are none, or a leaf has no state.
    """
    if missing := [name for name in shards if name not in state]:
        raise InputError(f"The optimizer state has no entry for '{missing[0]}'; take it from the same checkpoint.")
    return {
        name: {key: x if key == "step" else _own_part(x) for key, x in state[name].items()} for name in _parts(shards)
    }


def whole(shards: Leaves) -> Params:
    """Return the whole leaves of a tree of parts, without derivatives, in every process.

    Raises:
        InputError: If it is no such tree.
    """
    return {str(name): _put_together(name, shards[name].detach()) for name in _parts(shards)}


def scattered(names: Sequence[Part], kinds: Sequence[Kind], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return this process's parts of the sums over processes of gradients; None where no process has any.

    A process without a gradient counts as one of zero; `kinds` are the dtypes and devices of the leaves.
    """
    there = _summed(torch.tensor([int(g is not None) for g in gradients])).tolist()
    found: list[Tensor | None] = []
    for name, kind, g, some in zip(names, kinds, gradients, there, strict=True):
        own = _zeros(name, kind) if g is None and some else g
        found.append(None if own is None else _taken_apart(name, own))
    return found


def _summed(x: Tensor) -> Tensor:
    """Return the sum over processes of a small tensor.

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
    own = world()
    return own.sum_of(x.to(own.device)).to(x.device)


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


def _put_together(name: Part, part: Tensor) -> Tensor:
    """Return `[..., *shape]` of parts `[..., n]`: a view of one array where there are no axes before the leaf's."""
    size, most, lead = world().size, _share(name.shape), part.shape[:-1]
    found = part.new_empty(size, *lead, most)
    own = torch.nn.functional.pad(part, (0, most - part.shape[-1])).contiguous()
    dist.all_gather(list(found.unbind(0)), own)
    flat = found.movedim(0, -2).reshape((*lead, size * most))
    return flat[..., : math.prod(name.shape)].reshape((*lead, *name.shape))


def _taken_apart(name: Part, leaf: Tensor) -> Tensor:
    """Return this process's part `[..., n]` of the sum over processes of `[..., *shape]`."""
    own, most = world(), _share(name.shape)
    lead, entries = leaf.shape[: leaf.dim() - len(name.shape)], math.prod(name.shape)
    flat = torch.nn.functional.pad(leaf.reshape((*lead, entries)), (0, own.size * most - entries))
    pieces = [piece.contiguous() for piece in flat.unflatten(-1, (own.size, most)).unbind(-2)]
    found = torch.empty_like(pieces[0])
    dist.reduce_scatter(found, pieces)
    return found[..., : max(0, min(most, entries - own.rank * most))].clone()


class _Gather(torch.autograd.Function):
    """Parts of several leaves -> the whole leaves, in every process."""

    @staticmethod
    def forward(cut: Cut, *parts: Tensor) -> tuple[Tensor, ...]:
        any_inside()
        return tuple(_put_together(name, part) for name, part in zip(cut.names, parts, strict=True))

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
        return tuple(_taken_apart(name, g) for name, g in zip(cut.names, gradients, strict=True))

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
