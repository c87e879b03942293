"""The influence of every sequence of U on every sequence, or prompt, of E: `⟨∇F_i, scale ⊙ g_j⟩`, `[I, B_U]`.

∇F_i is the pulled-back cotangents of row i of E, so that the rows of the matrix sum to ∇F's own attribution: the column
of an update sequence sums to what its tokens contribute. Every row of E and every sequence of U is pulled back by
itself, and the matrix holds the products of these gradients, ∇F_i carried back through the step.

Rows of one side are held in memory, as many as fit, and those of the other side pass by them: it is pulled back anew
for every chunk that is held.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe import engine, tree
from funcprobe.attribution.step_parts import StepParts
from funcprobe.data.rollouts import members, take
from funcprobe.engine.passes import Passes
from funcprobe.errors import InputError, NumericsError
from funcprobe.types import Leaves, Params, Progress, TokenScores

#: Bytes of gradients that are held at once where nothing else is asked for.
HELD = 2**31

#: Gradients that pass by together, so that what is held is read once for all of them.
PASSING = 16

#: Entries of a leaf that are widened to float64 at a time, of every gradient at hand.
PIECE = 2**14

#: Leaves to look at: names, or a predicate on them.
Chosen = Collection[str] | Callable[[str], bool] | None


class Influence(NamedTuple):
    """The influence of sequences of U on sequences or prompts of E, in the unit of the observable."""

    matrix: Tensor  #: [I, B_U] float64: what update sequence j contributes through evaluation row i
    by: str  #: what the rows are: "sequences" (rows of E) or "prompts" (group ids of E)
    rows: Tensor  #: [I] int64: the row of E, or the group id
    leaves: tuple[str, ...] | None = None  #: the leaves that were looked at; None for all

    def of_batch(self) -> Tensor:
        """Return the column sums `[B_U]`: the contribution of every sequence of U through the leaves looked at."""
        return self.matrix.sum(0)


def check_influence(by: str | None, chunk: int | None, leaves: Chosen, params: Params) -> None:
    """Refuse, before any pass, observables and options that an influence matrix cannot be made of.

    Raises:
        InputError: If an option is unknown or out of range.
    """
    if by not in (None, "sequences", "prompts"):
        raise InputError(f"Unknown influence {by!r}; expected 'sequences', 'prompts' or None.")
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise InputError(f"chunk is {chunk!r}; expected a whole number of at least 1, or None.")
    if isinstance(leaves, str):
        raise InputError(f"leaves is the single string '{leaves}'; expected a list of names, or a predicate.")
    if leaves is not None and by is None:
        raise InputError("leaves can do nothing without influence='sequences' or 'prompts'; leave it out.")
    if leaves is not None and not tree.select(params, leaves):
        raise InputError("leaves chooses no parameter leaf; expected at least one.")


def influence_of(
    passes: Passes, on_evaluation: TokenScores, parts: StepParts, *, by: str, leaves: Chosen, chunk: int | None
) -> Influence:
    """Return the matrix of a step, from the cotangents of F on E.

    Raises:
        NumericsError: If an entry is not finite; the message names the row.
    """
    moving = None if leaves is None else tuple(tree.select(parts.params, leaves))
    chosen = parts.params if moving is None else tree.select(parts.params, moving)
    each, carried = list(members(passes.evaluation, by)), _carrier(parts)

    def of_evaluation(i: int) -> Params:
        part = take(passes.evaluation, each[i][1])
        c = engine.rows_of(on_evaluation, each[i][1], part)
        gradient = passes.over_rows(part).pull_back(c, parts.params, "influence: gradients on E")
        return tree.select(carried(gradient), chosen)

    def of_batch(j: int) -> Params:
        with passes.clock("influence: gradients on U"):
            return tree.select(parts.gradient_of(torch.tensor([j])), chosen)

    sides = _Side(len(each), of_evaluation), _Side(len(parts.prepared.ids), of_batch)
    chunk = max(1, HELD // (4 * tree.size(chosen))) if chunk is None else chunk
    matrix, labels = _matrix(*sides, chunk, passes.progress).cpu(), torch.tensor([label for label, _ in each])
    if not bool(torch.isfinite(matrix).all()):
        row, column = (~torch.isfinite(matrix)).nonzero()[0].tolist()
        raise NumericsError(
            f"The influence of update sequence {column} on evaluation {by[:-1]} {int(labels[row])} is not finite; "
            "check the weights of the model, or load it in a wider dtype."
        )
    return Influence(matrix, by, labels, moving)


class _Side(NamedTuple):
    """The gradients of one side of the matrix."""

    size: int
    row: Callable[[int], Params]  #: takes one of them


def _carrier(parts: StepParts) -> Callable[[Params], Leaves]:
    """Return the map from ∇F_i to its direction; in the additive form it is the product with one tree."""
    if parts.form == "jacobian":
        return lambda gradient: parts.carried(gradient).direction
    scale = dict(parts.carried(tree.map_(torch.ones_like, parts.params)).direction)
    return lambda gradient: tree.map_(torch.mul, scale, gradient)


def _matrix(rows: _Side, columns: _Side, chunk: int, progress: Progress | None) -> Tensor:
    """Return the products of all rows with all columns; the side that is held is the one that saves more passes."""

    def passed(held: _Side, other: _Side) -> int:
        return held.size + ceil(held.size / chunk) * other.size

    if passed(columns, rows) < passed(rows, columns):
        return _products(columns, rows, chunk, progress).T
    return _products(rows, columns, chunk, progress)


def _products(held: _Side, passing: _Side, chunk: int, progress: Progress | None) -> Tensor:
    """Return `[held, passing]`: the products of gradients, `chunk` of the first and a few of the second at a time."""
    found: list[Tensor] = []
    for some in _chunks(held.size, chunk):
        those = [held.row(i) for i in some]
        beside = [_between(those, [passing.row(j) for j in few]) for few in _chunks(passing.size, min(chunk, PASSING))]
        found.append(torch.cat(beside, dim=1))
        if progress is not None:
            progress("influence", some.stop, held.size)
    return torch.cat(found)


def _chunks(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _between(some: Sequence[Leaves], others: Sequence[Leaves]) -> Tensor:
    """Return the products of trees with trees, `[some, others]` in float64; a piece of a leaf is widened at a time."""
    total = torch.zeros(len(some), len(others), dtype=torch.float64)
    for name in some[0]:
        leaves = [x[name].reshape(-1).split(PIECE) for x in (*some, *others)]
        for pieces in zip(*leaves, strict=True):
            x, y = (torch.stack(side).double() for side in (pieces[: len(some)], pieces[len(some) :]))
            total += (x @ y.T.to(x.device)).cpu()
    return tree.over_processes(total, some[0])
