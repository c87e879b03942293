"""A policy whose leaves lie in parts: each block of its model gathers its own, runs, and lets them go.

A block is a member of a list of layers, or any other module with leaves of its own. Under forward mode and without
derivatives whole leaves live as long as their block runs. A backward pass would keep those of every layer; so there a
layer is one opaque node, which keeps its inputs and its parts, and in the backward pass gathers and runs once more.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import _get_current_function_mode_stack

from funcprobe.errors import InputError
from funcprobe.parallel.shards import Cut, Kind, scattered
from funcprobe.policy.binding import Bound
from funcprobe.tree import Part
from funcprobe.types import Params

#: What a layer may be called with: whatever it cannot write to, so that running it twice is running it once.
FIXED = (Tensor, bool, int, float, str, torch.dtype, torch.device)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Slot(NamedTuple):
    """A place in a module where a leaf stands while the module runs."""

    local: str  #: its name within the block
    owner: nn.Module
    attribute: str
    name: Part  #: of the policy's leaf

    @property
    def now(self) -> Tensor:
        """The tensor that stands there."""
        found = self.owner._parameters[self.attribute]
        assert found is not None
        return found


class Block:
    """A module that gathers leaves of its own whenever it runs."""

    def __init__(self, called: str, module: nn.Module, slots: Sequence[Slot], is_layer: bool) -> None:
        self.called, self.slots, self.is_layer = called, tuple(slots), is_layer
        self.cut = Cut(list(dict.fromkeys(slot.name for slot in slots)))
        self.inner = copy.copy(module)  # the same tensors and submodules, but for its own way of being called
        self.inner.__dict__ |= {hooks: OrderedDict() for hooks in _HOOKS}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's result, on whole leaves."""
        parts: Params = {slot.name: slot.now for slot in self.slots}
        if not (self.is_layer and _is_taped(parts)):
            return self.run(self.cut.gather(parts), args, kwargs)
        self._check((*args, *kwargs.values()))
        called: Any = (args, kwargs)
        given, spec = optree.tree_flatten(called)
        tensors = [x for x in given if isinstance(x, Tensor)]
        call = _Call(self, given, spec, _Surroundings(tensors[0].device.type if tensors else "cpu"))
        found = _Rematerialised.apply(call, len(parts), *parts.values(), *tensors)
        assert call.result is not None
        return optree.tree_unflatten(call.result, found)

    def run(self, leaves: Params, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Return the module's result on leaves that are whole."""
        local = {slot.local: leaves[slot.name] for slot in self.slots}
        return functional_call(self.inner, local, tuple(args), kwargs, tie_weights=False)

    def _check(self, given: Sequence[Any]) -> None:
        """Check that the module cannot write to its arguments.

        Raises:
            InputError: If it could.
        """
        for x in given:
            if type(x) is tuple:
                self._check(x)
            elif not (x is None or isinstance(x, FIXED)):
                raise InputError(
                    f"The layer '{self.called}' is called with a {type(x).__name__}, which it may write to, so it "
                    "cannot be run again in a backward pass; use whole leaves, or mode='forward' on an update that is "
                    "given as Δθ."
                )


def install(body: Bound, names: dict[str, Part]) -> int:
    """Set every block of a module to gather its own leaves when it runs, and return the number of layers.

    `names` are those of the policy's leaves. The module is a policy's own copy.

    Raises:
        InputError: If it has no list of layers.
    """
    layers = 0
    for called, module, is_layer in list(_blocks(body.module)):
        slots = list(_slots(body, called, module, names, deep=is_layer))
        if slots:
            layers += is_layer
            own = module.forward
            block = Block(called, module, slots, is_layer)
            module.forward = functools.wraps(own)(functools.partial(_called, block))
    if not layers:
        raise InputError(
            f"{type(body.module).__name__} has no list of layers with trained leaves (torch.nn.ModuleList or "
            "Sequential) to gather one at a time, so parts of leaves would save nothing; use whole leaves."
        )
    return layers


def _called(block: Block, *args: Any, **kwargs: Any) -> Any:
    return block(*args, **kwargs)


def _blocks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield (name, module, whether it is a layer) of every block: outermost layers, and modules outside."""
    yield prefix, module, False
    for name, child in module.named_children():
        called = f"{prefix}.{name}" if prefix else name
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            yield called, child, True
        else:
            yield from _blocks(child, called)


def _slots(body: Bound, called: str, module: nn.Module, names: dict[str, Part], *, deep: bool) -> Iterator[Slot]:
    """Yield the places of a module's leaves: those of its submodules too for a layer, else only its own."""
    owners = module.named_modules(remove_duplicate=False) if deep else [("", module)]
    for path, owner in owners:
        for attribute in owner._parameters:
            local = f"{path}.{attribute}" if path else attribute
            canonical = body.aliases.get(f"{called}.{local}" if called else local)
            if canonical is not None:
                yield Slot(local, owner, attribute, names[canonical])


def _is_taped(parts: Params) -> bool:
    """Return whether plain autograd is about to record a run, for a backward pass."""
    watched = torch._C._are_functorch_transforms_active()
    return not watched and torch.is_grad_enabled() and any(x.requires_grad for x in parts.values())


class _Surroundings:
    """The contexts around a call, to be entered again around its repetition."""

    def __init__(self, kind: str) -> None:
        self.kind, self.modes = kind, list(_get_current_function_mode_stack())
        has = torch.amp.is_autocast_available(kind)
        self.autocast = has and torch.is_autocast_enabled(kind)
        self.dtype = torch.get_autocast_dtype(kind) if has else None

    @contextmanager
    def again(self) -> Iterator[None]:
        """Return the contexts."""
        with ExitStack() as stack:
            for mode in self.modes:
                stack.enter_context(mode)
            if self.dtype is not None:
                stack.enter_context(torch.autocast(self.kind, self.dtype, self.autocast, cache_enabled=False))
            yield


class _Call:
    """A call of a block, which can be made again."""

    def __init__(self, block: Block, given: Sequence[Any], spec: Any, around: _Surroundings) -> None:
        self.block, self.spec, self.around = block, spec, around
        self.given = [None if isinstance(x, Tensor) else x for x in given]
        self.places = [k for k, x in enumerate(given) if isinstance(x, Tensor)]
        self.result: Any = None  #: the structure of what it returns

    def taped(
        self, parts: Sequence[Tensor], tensors: Sequence[Tensor], moves: Sequence[bool]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return (whole leaves, tensors, results) of the call with a graph of its own, which ends at the former two."""
        cut = self.block.cut
        with torch.no_grad():
            whole = cut.gather(dict(zip(cut.names, parts, strict=True)))
        leaves = {name: x.requires_grad_() for name, x in whole.items()}
        inputs = [_held(x).requires_grad_(moving) for x, moving in zip(tensors, moves, strict=True)]
        values = dict(enumerate(self.given)) | dict(zip(self.places, inputs, strict=True))
        called: Any = optree.tree_unflatten(self.spec, [values[k] for k in range(len(self.given))])
        args, kwargs = called
        with torch.enable_grad():
            found = self.block.run(leaves, args, kwargs)
        results, self.result = optree.tree_flatten(found)
        return list(leaves.values()), inputs, results


class _Rematerialised(torch.autograd.Function):
    """A layer on parts of its leaves, which keeps these and its inputs alone: the backward pass runs it again."""

    @staticmethod
    def forward(ctx: Any, call: _Call, many: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call, ctx.many = call, many
        ctx.save_for_backward(*tensors)
        # with a graph, which is dropped: whoever looks at what runs sees what depends on leaves
        _, _, results = call.taped(tensors[:many], tensors[many:], ctx.needs_input_grad[2 + many :])
        made = tuple(_held(x) for x in results)
        ctx.mark_non_differentiable(*(x for x, y in zip(made, results, strict=True) if not y.requires_grad))
        return made

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        parts, tensors = ctx.saved_tensors[: ctx.many], ctx.saved_tensors[ctx.many :]
        moves = ctx.needs_input_grad[2 + ctx.many :]
        with ctx.call.around.again():
            leaves, inputs, results = ctx.call.taped(parts, tensors, moves)
        moving = [x for x in inputs if x.requires_grad]
        kept = [(y, c) for y, c in zip(results, cotangents, strict=True) if y.requires_grad]
        wanted = [*leaves, *moving]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if kept:
            found = torch.autograd.grad([y for y, _ in kept], wanted, [c for _, c in kept], allow_unused=True)
        kinds: list[Kind] = [(part.dtype, part.device) for part in parts]
        of_parts = scattered(ctx.call.block.cut.names, kinds, found[: ctx.many])
        of_inputs = iter(found[ctx.many :])
        return None, None, *of_parts, *(next(of_inputs) if x.requires_grad else None for x in inputs)


def _held(x: Tensor) -> Tensor:
    """Return x without its graph, also where values detached by a *module* keep theirs (`engine.kernels`)."""
    held: Tensor = torch.ops.aten.detach(x)
    return held
