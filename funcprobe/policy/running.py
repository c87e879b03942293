"""Run somebody's module once on a few tokens, and observe its logits, its precision, and its writes.

The module is the caller's, so nothing of it may change: a write to one of its tensors is stopped before it is made, and
flags, attributes and generators are put back.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from funcprobe.errors import InputError
from funcprobe.policy.copying import uncompiled


class Watch(TorchFunctionMode):
    """A context that notices the arithmetic that depends on the leaves, and whether attention is torch's fused one.

    Precision is that of every floating result that carries a graph: constants such as rotary tables are left out, and a
    bfloat16 product inside a float32 module is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.eps = 0.0  #: of the coarsest dtype
        self.autocast: torch.dtype | None = None  #: that some operation ran under
        self.fused_attention = False
        self.detaches = False  #: whether something was detached on the way

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, and look at its result."""
        found = func(*args, **(kwargs or {}))
        self.detaches |= func is Tensor.detach
        self.fused_attention |= func is torch.nn.functional.scaled_dot_product_attention
        if isinstance(found, Tensor) and found.requires_grad and found.is_floating_point():
            self.eps = max(self.eps, torch.finfo(found.dtype).eps)
            kind = found.device.type
            if self.autocast is None and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                self.autocast = torch.get_autocast_dtype(kind)
        return found


class _Stopped(Exception):
    """An operation was about to write to a tensor of the module."""

    def __init__(self, name: str, operation: str) -> None:
        super().__init__(name)
        self.name, self.operation = name, operation


class _ReadOnly(TorchDispatchMode):
    """A context in which an operation that would write to one of the named tensors is stopped before it does."""

    def __init__(self, named: Mapping[int, str]) -> None:
        super().__init__()
        self.named = named  #: address of a storage -> name of its tensor

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, unless it would write.

        Raises:
            _Stopped: In that case.
        """
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            given = {**dict(zip([a.name for a in func._schema.arguments], args, strict=False)), **kwargs}
            for argument in func._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._check(given.get(argument.name), given, str(func))
        return func(*args, **kwargs)

    def _check(self, written: Any, given: Mapping[str, Any], operation: str) -> None:
        if not isinstance(written, Tensor):
            return
        place = address(written)
        source = given.get("source")  # `x.set_(x)` writes nothing: parametrizations of peft begin with it
        itself = isinstance(source, Tensor) and address(source) == place
        if place in self.named and not itself:
            raise _Stopped(self.named[place], operation)


def address(x: Tensor) -> int:
    """Return where a tensor's storage begins; 0 where it has none."""
    try:
        return x.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a meta or a wrapped tensor
        return 0


@contextmanager
def as_it_was(module: nn.Module) -> Iterator[None]:
    """Put every part's attributes, registries and flags back, and the global generators."""
    parts = list(module.modules())
    registries = ("_parameters", "_buffers", "_modules")
    kept = [(part, dict(part.__dict__), {r: dict(part.__dict__[r]) for r in registries}) for part in parts]
    try:
        with generators_kept(module):
            yield
    finally:
        for part, attributes, inner in kept:
            part.__dict__.clear()
            part.__dict__.update(attributes)
            for name, entries in inner.items():
                attributes[name].clear()
                attributes[name].update(entries)


def generators_kept(module: nn.Module) -> AbstractContextManager[None]:
    """Return a context after which the global generators of the module's devices are as they were."""
    return torch.random.fork_rng(
        devices=sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    )


class Seen(NamedTuple):
    """The observations of a module run on its own."""

    logits: list[Tensor]  #: [L, V] of every row, run alone, with its graph
    leaves: Mapping[str, Tensor]  #: the module's own trainable leaves, at which the graph ends
    watch: Watch
    written: dict[str, str]  #: name of a buffer -> the operation that writes to it
    changed: set[str]  #: names of the parts that write to themselves


def observed(module: nn.Module, rows: Sequence[Tensor], seed: int = 0) -> Seen:
    """Run the module in eval mode on every row [L] of ids alone, and return the observations.

    A module that draws random numbers shows it by what another `seed` gives.

    Raises:
        InputError: If it cannot be run on ids alone, returns no logits, or writes to a parameter.
    """
    leaves = {name: p for name, p in module.named_parameters() if p.requires_grad}
    seen = Seen([], leaves, Watch(), {}, set())
    buffers = {name: b for name, b in module.named_buffers() if b is not None}
    while True:  # one more time for every buffer that turns out to be written to
        named = {address(p): name for name, p in module.named_parameters()}
        named |= {address(b): name for name, b in buffers.items() if name not in seen.written}
        named.pop(0, None)
        try:
            with as_it_was(module), _eagerly(module), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what the libraries say of two tokens is not about the user's own
                torch.manual_seed(seed)  # of generators that are put back
                _own_buffers(module, seen.written)
                for part in module.modules():
                    part.training = False
                before = _state(module)
                seen.logits[:] = [_run(module, row, named, seen.watch) for row in rows]
                seen.changed.update(name for name, state in _state(module).items() if state != before[name])
            seen.changed.update(name.rpartition(".")[0] for name in seen.written)
            return seen
        except _Stopped as stop:
            if stop.name not in buffers:
                raise InputError(
                    f"{running_module(stop.__traceback__)} writes to its parameter '{stop.name}' in forward "
                    f"({stop.operation}), so the model is no function of its parameters; write that as arithmetic "
                    "instead (for an embedding: max_norm=None)."
                ) from None
            seen.written[stop.name] = stop.operation


def logits_of(found: Any) -> Any:
    """Return the logits of whatever a module returns: a tensor, `.logits`, `["logits"]`, or the first of a tuple."""
    if isinstance(found, Mapping) and "logits" in found:
        return found["logits"]
    if isinstance(getattr(found, "logits", None), Tensor):
        return found.logits
    return found[0] if isinstance(found, (tuple, list)) and found else found


def arguments_of(module: nn.Module, *, whole: bool = False) -> Callable[[Tensor], dict[str, Any]]:
    """Return the arguments of a call beside ids, as a function of the mask: those that the module's forward names.

    A `whole` row has no padding, and a mask only where the module cannot do without.
    """
    accepted = inspect.signature(module.forward).parameters
    fixed = {"use_cache": False} if "use_cache" in accepted else {}
    takes_mask = "attention_mask" in accepted and not (whole and accepted["attention_mask"].default is None)
    return lambda mask: {**fixed, **({"attention_mask": mask} if takes_mask else {})}


def running_module(traceback: TracebackType | None) -> str:
    """Return the innermost module that was running, by its name within the outermost one."""
    running = []
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        running += [owner] if isinstance(owner, nn.Module) else []
        traceback = traceback.tb_next
    if not running:
        return "The model"
    names = {id(module): name for root in reversed(running) for name, module in root.named_modules()}
    innermost = running[-1]
    name, kind = names[id(innermost)], type(innermost).__name__
    return f"The module '{name}' ({kind})" if name else f"The module {kind}"


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error's message, or its name."""
    lines = (line.strip() for line in str(error).splitlines() if line.strip())
    return next(lines, type(error).__name__).split(". ")[0].rstrip(".")


def _run(module: nn.Module, row: Tensor, named: Mapping[int, str], watch: Watch) -> Tensor:
    ids = row.unsqueeze(0)
    mask = torch.ones_like(ids, dtype=torch.bool)
    try:
        with torch.enable_grad(), _ReadOnly(named), watch:
            found = logits_of(module(ids, **arguments_of(module, whole=True)(mask)))
    except (_Stopped, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever somebody's forward raises
        raise InputError(
            f"{type(module).__name__} cannot be run on token ids alone, as in module(ids [B, L]): "
            f"{type(error).__name__}: {first_sentence(error)}. Give a module that does."
        ) from error
    if not isinstance(found, Tensor) or found.ndim != 3 or found.shape[:2] != ids.shape:
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(
            f"{type(module).__name__} returned {what} for ids of shape {tuple(ids.shape)}; expected logits [B, L, V] "
            "or an object with such `.logits`."
        )
    return found[0]


def _eagerly(module: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which nothing is compiled; it loads the compiler, so only where there is need of it."""
    compiled = any(uncompiled(part) is not part or part._compiled_call_impl is not None for part in module.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _own_buffers(module: nn.Module, written: Mapping[str, str]) -> None:
    """Put clones in the place of the buffers that are written to, until `as_it_was` puts them back."""
    for name in written:
        owner, _, own = name.rpartition(".")
        buffers = module.get_submodule(owner)._buffers
        buffers[own] = None if (b := buffers[own]) is None else b.clone()


def _state(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Return the identities of all that a part holds, by the part's name."""
    return {
        name: tuple((key, id(value)) for held in (part.__dict__, part._buffers) for key, value in held.items())
        for name, part in module.named_modules()
    }
