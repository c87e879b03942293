"""The algebra of name-keyed trees: add, sub, scale, axpy, dot, norm, top_k, select.

A tree is any optree pytree of tensors, in practice `dict[str, Tensor]`. Binary operations demand the same keys and say
which are missing and which are unexpected. Elementwise results keep the dtype of the first argument; reductions
accumulate in float64, whatever the leaves are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Generic, TypeVar

import optree
import torch
from torch import Tensor

from funcprobe.errors import InputError
from funcprobe.types import Leaves, Params

Leaf = TypeVar("Leaf", bound=Tensor | None)

#: Entries of a leaf in a piece, on a CPU and on a GPU.
PIECE, DEVICE_PIECE = 2**17, 2**22

#: Bytes of a lazy tree that are kept once they are computed: those of a small model, or of an adapter.
KEPT = 2**26


class Part(str):
    """The name of a leaf of which this process holds a part, and other processes the rest.

    Names go wherever a tree goes, through every comprehension, transform and lazy tree. So what is reduced over the
    entries of such leaves is reduced over the processes as well, and no one has to remember that they are parts.
    """

    __slots__ = ("gathered", "shape")
    shape: torch.Size  #: of the whole leaf
    gathered: Callable[[Tensor], Tensor]  #: a small tensor `[...]` -> those of all N processes, `[N, ...]`

    def __new__(cls, name: str, shape: torch.Size, gathered: Callable[[Tensor], Tensor]) -> Part:
        """Return the name, with the whole leaf's shape and the way to the other processes."""
        made = super().__new__(cls, name)
        made.shape, made.gathered = shape, gathered
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        """Return the arguments that a copy is made of."""
        return str(self), self.shape, self.gathered


def everywhere(x: Tensor, names: Iterable[Any]) -> Tensor:
    """Return `[N, ...]`: something small that each of N processes knows of its parts of the named leaves.

    N is 1 where the leaves are whole. Every process has to ask, in the same order.
    """
    part = next((name for name in names if isinstance(name, Part)), None)
    return x.unsqueeze(0) if part is None else part.gathered(x)


def over_processes(x: Tensor, names: Iterable[Any]) -> Tensor:
    """Return the sum over processes of something small that is a sum over entries of the named leaves."""
    return everywhere(x, names).sum(0)


def anywhere(flag: bool, names: Iterable[Any]) -> bool:
    """Return whether something holds of the named leaves, in some process where they lie in parts."""
    return bool(everywhere(torch.tensor(flag), names).any())


class Lazy(Mapping[str, Leaf], Generic[Leaf]):
    """A tree whose leaves are computed when they are read, so that it never has to stand in memory as a whole.

    Of what was computed the first `KEPT` bytes are kept: a small tree is computed once, a large one at every reading.
    The function has to be pure.
    """

    def __init__(self, names: Iterable[str], compute: Callable[[str], Leaf]) -> None:
        self._names, self._compute = dict.fromkeys(names), compute
        self._kept: dict[str, Leaf] = {}
        self._room = KEPT

    def __getitem__(self, name: str) -> Leaf:
        if name in self._kept:
            return self._kept[name]
        if name not in self._names:
            raise KeyError(name)
        leaf = self._compute(name)
        size = 0 if leaf is None else leaf.numel() * leaf.element_size()
        if size <= self._room:
            self._kept[name], self._room = leaf, self._room - size
        return leaf

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def add(a: Leaves, b: Leaves) -> Params:
    """Return a + b, leaf by leaf.

    Example:
        >>> add({"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])})
        {'w': tensor([3.])}
    """
    return map_(torch.add, a, b)


def sub(a: Leaves, b: Leaves) -> Params:
    """Return a - b, leaf by leaf: for two parameter trees the step between them."""
    return map_(torch.sub, a, b)


def scale(c: float | Tensor, a: Leaves) -> Params:
    """Return c · a."""
    return map_(lambda x: x * c, a)


def axpy(c: float | Tensor, x: Leaves, y: Leaves) -> Params:
    """Return c · x + y in the dtype of y; a wider x is rounded once, after the sum.

    Example:
        >>> axpy(2.0, {"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])})
        {'w': tensor([5.])}
    """
    return map_(lambda xi, yi: (xi * c + yi).to(yi.dtype), x, y)


def dot(a: Leaves, b: Leaves) -> Tensor:
    """Return ⟨a, b⟩ as a float64 scalar: products and sums are taken in float64.

    Example:
        >>> dot({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0])})
        tensor(11., dtype=torch.float64)
    """
    return over_processes(_total(map_(_dot, a, b)), chain(_names(a), _names(b)))


def norm(a: Leaves) -> Tensor:
    """Return the Euclidean norm of the whole tree as a float64 scalar."""
    return torch.sqrt(dot(a, a))


def leaf_norms(a: Leaves) -> dict[str, float]:
    """Return the Euclidean norm of every leaf, taken in float64."""
    if not a:
        return {}
    squares = over_processes(torch.stack([_dot(x, x).cpu() for x in a.values()]), a)
    return dict(zip(a, torch.sqrt(squares).tolist(), strict=True))


def top_k(a: Leaves, k: int) -> list[tuple[str, float]]:
    """Return the k leaves of the largest norm, largest first, as (name, norm); ties go by name.

    Example:
        >>> top_k({"a": torch.tensor([1.0]), "b": torch.tensor([3.0]), "c": torch.tensor([2.0])}, 2)
        [('b', 3.0), ('c', 2.0)]
    """
    return sorted(leaf_norms(a).items(), key=lambda item: (-item[1], item[0]))[:k]


def select(a: Leaves, names: Iterable[str] | Callable[[str], bool]) -> Params:
    """Return the sub-tree of the given names, or of the names for which a predicate holds.

    Raises:
        InputError: If a name is not in the tree.
    """
    if callable(names):
        return {name: x for name, x in a.items() if names(name)}
    wanted = list(names)
    if unknown := [name for name in wanted if name not in a]:
        raise InputError(f"The tree has no leaf named {_listing(unknown)}; it has {_listing(a)}.")
    own = {name: name for name in a}
    return {own[name]: a[name] for name in wanted}


def cast(a: Leaves, dtype: torch.dtype) -> Params:
    """Return the tree with every leaf in `dtype`."""
    return map_(lambda x: x.to(dtype), a)


def like(a: Leaves, b: Leaves) -> Params:
    """Return a with the dtype and device of b's leaves."""
    return map_(lambda x, y: x.to(device=y.device, dtype=y.dtype), a, b)


def zeros_like(a: Leaves) -> Params:
    """Return the zero tree of the same shapes and dtypes."""
    return map_(torch.zeros_like, a)


def size(a: Params) -> int:
    """Return the number of scalar entries, those that other processes hold among them."""
    return sum(entries for entries, _ in _sized(a))


def bytes_of(a: Params) -> int:
    """Return the bytes that the leaves take, in other processes too where they hold parts.

    Example:
        >>> bytes_of({"w": torch.ones(3, dtype=torch.bfloat16)})
        6
    """
    return sum(entries * x.element_size() for entries, x in _sized(a))


def same_keys(a: Leaves, b: Leaves, what: str = "trees") -> None:
    """Check that two trees have the same names and shapes.

    Raises:
        InputError: Naming the missing and the unexpected leaves, or the first leaf whose shape differs.
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        missing, unexpected = [n for n in a if n not in b], [n for n in b if n not in a]
        if missing or unexpected:
            raise InputError(
                f"The {what} do not have the same leaves: missing {_listing(missing)}, unexpected "
                f"{_listing(unexpected)}; both must be keyed by the names of the same trainable parameters."
            )
        if a and any(isinstance(n, Part) for n in a) != any(isinstance(n, Part) for n in b):
            raise InputError(
                f"Of the {what} one holds parts of leaves and the other whole ones; both must come from `shard`, or "
                "neither."
            )
        for name in () if isinstance(a, Lazy) or isinstance(b, Lazy) else a:
            if getattr(a[name], "shape", None) != getattr(b[name], "shape", None):
                raise InputError(
                    f"The {what} differ in shape at '{name}': {tuple(a[name].shape)} against {tuple(b[name].shape)}; "
                    "both must come from the same model."
                )


def is_finite(a: Leaves) -> bool:
    """Return whether every entry of every leaf is finite."""
    return all(math.isfinite(value) for value in leaf_norms(a).values())


def pieces(leaf: Tensor, device: torch.device | None = None) -> tuple[Tensor, ...]:
    """Return a leaf as flat pieces, `[n]` each, which are views of it where it is contiguous.

    What is worked on piece by piece has small temporaries, which stay in a processor's cache and whose memory is used
    again: fresh pages cost more than arithmetic. On a GPU a piece costs its launches instead, and is larger. `device`
    is the one that the work is done on, by default the leaf's own.
    """
    return leaf.reshape(-1).split(PIECE if (device or leaf.device).type == "cpu" else DEVICE_PIECE)


def map_(function: Callable[..., Tensor], first: Leaves, *rest: Leaves) -> Params:
    """Return the tree of `function` over corresponding leaves, in the order of the first tree.

    Addressing is by name, so two dictionaries in different orders are the same tree.
    """
    for other in rest:
        same_keys(first, other)
    trees: tuple[Any, ...] = (first, *rest)
    if any(isinstance(tree, Lazy) for tree in trees):
        return {name: function(*(tree[name] for tree in trees)) for name in first}
    result: Params = optree.tree_map(function, *trees)  # type: ignore[assignment]
    return result


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Return Σ x y in float64, widened a piece at a time: a float64 copy of an embedding is gigabytes."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for p, q in zip(pieces(x), pieces(y, x.device), strict=True):
        wide = p.double()
        total = total + torch.dot(wide, wide if y is x else q.to(p.device).double())
    return total


def _leaves(a: Any) -> list[Tensor]:
    return optree.tree_leaves(a)


def _names(a: Any) -> Iterable[Any]:
    return a if isinstance(a, Mapping) else ()


def _sized(a: Any) -> Iterator[tuple[int, Tensor]]:
    """Yield (number of entries, leaf) of every leaf, the entries of other processes among them."""
    named = a.items() if isinstance(a, Mapping) else ((None, x) for x in _leaves(a))
    for name, x in named:
        yield (math.prod(name.shape) if isinstance(name, Part) else x.numel()), x


def _total(a: Params) -> Tensor:
    leaves = _leaves(a)
    if not leaves:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([leaf.to(leaves[0].device) for leaf in leaves]).sum()


def _listing(names: Iterable[str], limit: int = 4) -> str:
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return (", ".join(f"'{name}'" for name in listed[:limit]) + more) if listed else "none"
