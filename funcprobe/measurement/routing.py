"""Which experts a model sends its tokens to, watched in passes that are made anyway: where that changes, F jumps.

A *choice* is the indices that a function such as `topk` or `argmax` makes of floating-point scores, and that a later
operation of the model reads: a mixture's experts, or the keys of a sparse attention. F is smooth as long as every
choice stays, and in general it jumps where one changes, which no derivative sees. Nothing is known of the model's
classes or names: the calls themselves are watched. A threshold that a model compares scores with is not among them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcprobe import engine
from funcprobe.data.rollouts import take
from funcprobe.engine.passes import Passes
from funcprobe.parallel.world import world
from funcprobe.types import Params

_SETS = (torch.topk, Tensor.topk, torch.argmax, Tensor.argmax, torch.argmin, Tensor.argmin)
_WITH_VALUES = (torch.max, Tensor.max, torch.min, Tensor.min)
_ORDERS = (torch.sort, Tensor.sort, torch.argsort, Tensor.argsort)

#: The functions that choose, and whether the order of what they chose is part of the choice.
CHOOSING = {**dict.fromkeys((*_SETS, *_WITH_VALUES), False), **dict.fromkeys(_ORDERS, True)}


class Routing(NamedTuple):
    """How many tokens are sent elsewhere at θ′ than at θ."""

    changed: int  #: tokens of E, prompts included, of whose choices at least one differs
    tokens: int  #: that were watched: all on whose features a score depends
    layers: int  #: choices that a token meets on its way: a top-k for each layer of experts

    @property
    def fraction(self) -> float:
        """Return `changed / tokens`."""
        return self.changed / self.tokens if self.tokens else 0.0


class _Piece(NamedTuple):
    """The choices of one call of the model."""

    watched: Tensor  #: [b, L], on the CPU: tokens that a later token of their row sees
    choices: list[Tensor]  #: [b, L, k] each; [n], where a choice is not one for each token


class Choices:
    """The choices of a policy in the first pass over all of E, piece by piece."""

    def __init__(self, passes: Passes) -> None:
        self._evaluation = passes.evaluation
        self._awaited = engine.own_pieces(passes.evaluation, passes.microbatch)
        self._some: bool | None = None
        self._pieces: list[_Piece] = []

    def awaits(self, ids: Tensor, mask: Tensor) -> bool:
        """Return whether a call is that of the next piece; others try the model, or belong to later passes."""
        if len(self._pieces) == len(self._awaited):
            return False
        part = take(self._evaluation, self._awaited[len(self._pieces)])
        return torch.equal(mask, part.attention_mask) and torch.equal(ids, part.ids.masked_fill(~mask, 0))

    def __bool__(self) -> bool:
        if self._some is None or len(self._pieces) < len(self._awaited):  # asked in every process, or in none
            self._some = world().any_of(any(piece.choices for piece in self._pieces))
        return self._some

    def keep(self, mask: Tensor, choices: list[Tensor]) -> None:
        """Keep the choices of a call with that attention mask `[b, L]`."""
        seen = torch.nn.functional.pad(mask[:, 1:], (0, 1))  # no score depends on the features of a row's last token
        self._pieces.append(_Piece(seen.cpu(), choices))

    def against(self, after: Choices) -> Routing | None:
        """Return how many tokens were sent elsewhere in another pass over the same pieces; None where none is sent."""
        if not (self or after):
            return None
        changed = tokens = layers = 0
        for before, then in zip(self._pieces, after._pieces, strict=True):
            changed += int((_changed(before, then) & before.watched).sum())
            tokens += int(before.watched.sum())
            layers = max(layers, len(before.choices))
        everywhere = world().all_of((changed, tokens, layers))
        changed, tokens = (sum(each[k] for each in everywhere) for k in (0, 1))
        return Routing(changed, tokens, max(each[2] for each in everywhere))


def watched(passes: Passes, choices: Choices) -> Passes:
    """Return passes whose first one over all of E leaves its choices in `choices`; nothing else changes."""
    policy = passes.policy

    def features(params: Params, ids: Tensor, mask: Tensor) -> Tensor:
        if not choices.awaits(ids, mask):
            return policy.features(params, ids, mask)
        with _Watch() as watch:
            hidden = policy.features(params, ids, mask)
        choices.keep(mask, [_packed(found, mask.shape) for found in watch.read()])
        return hidden

    return passes._replace(policy=dataclasses.replace(policy, features=features))


def _changed(before: _Piece, after: _Piece) -> Tensor:
    """Return which tokens `[b, L]` meet a choice that differs; all of them, where it is not known which."""
    none, every = torch.zeros_like(before.watched), torch.ones_like(before.watched)
    if [c.shape for c in before.choices] != [c.shape for c in after.choices]:
        return every
    for x, y in zip(before.choices, after.choices, strict=True):
        none = none | ((x != y).any(-1) if x.ndim == 3 else every & ~torch.equal(x, y))
    return none


class _Choice:
    """Indices that were chosen, and whether the model went on to use them."""

    def __init__(self, indices: Tensor, dim: int | None, ordered: bool) -> None:
        self.indices, self.dim, self.ordered, self.is_read = indices, dim, ordered, False


class _Watch(TorchFunctionMode):
    """A context that keeps the indices which functions that choose return."""

    def __init__(self) -> None:
        super().__init__()
        self._found: list[_Choice] = []
        self._unread: dict[int, _Choice] = {}  # by id of the indices, which `_found` keeps alive

    def read(self) -> list[_Choice]:
        """Return the choices that were used; the indices that come with a maximum are not always."""
        return [choice for choice in self._found if choice.is_read]

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._unread:
            for tensor in _tensors((*args, *kwargs.values())):
                if (choice := self._unread.pop(id(tensor), None)) is not None:
                    choice.is_read = True
        found = func(*args, **kwargs)
        if func in CHOOSING and (choice := _choice_of(func, found, args, kwargs)) is not None:
            self._found.append(choice)
            self._unread[id(choice.indices)] = choice
        return found


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _choice_of(func: Any, found: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Choice | None:
    """Return the choice that a call made; None for one that chose nothing, or sorted earlier choices."""
    indices = found[1] if isinstance(found, tuple) else found
    scores = args[0] if args else kwargs.get("input")
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or indices.is_floating_point():
        return None
    takes_count = func in (torch.topk, Tensor.topk)
    dim = kwargs.get("dim", args[1 + takes_count] if len(args) > 1 + takes_count else None)
    if not isinstance(dim, int) or isinstance(dim, bool):
        dim = -1 if takes_count or func in _ORDERS else None
    if dim is None or indices.ndim < scores.ndim:
        return _Choice(indices, None, CHOOSING[func])
    return _Choice(indices, dim % scores.ndim, CHOOSING[func])


def _packed(choice: _Choice, tokens: torch.Size) -> Tensor:
    """Return a choice as `[b, L, k]`, or flat where it is not one for each of the `[b, L]` tokens; small, on the CPU.

    It is taken out of whatever transform the model runs under: what is compared is the values alone.
    """
    indices = torch.func.debug_unwrap(choice.indices).detach()
    indices = indices.unsqueeze(-1) if choice.dim is None else indices.movedim(choice.dim, -1)
    if not choice.ordered:
        indices = indices.sort(-1).values
    lead, (b, length) = indices.shape[:-1], tokens
    if len(lead) > 2 and lead[0] == b and lead[1] != length and lead[-1] == length:  # heads before positions
        indices = indices.movedim(-2, 1)
    per_token = lead.numel() == b * length or tuple(indices.shape[:-1][:2]) == (b, length)
    indices = indices.reshape(b, length, -1) if per_token else indices.flatten()
    return torch.func.debug_unwrap(indices.to("cpu", torch.int32))
