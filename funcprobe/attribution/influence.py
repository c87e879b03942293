"""The influence of every sequence of U on every sequence, or prompt, of E: `⟨∇F_i, scale ⊙ g_j⟩`, `[I, B_U]`.

∇F_i is the pulled-back cotangents of row i of E, so that the rows of the matrix sum to ∇F's own attribution: the column
of an update sequence sums to what its tokens contribute. It takes a backward pass over row i and a forward-mode pass
over U for every i; `chunk` rows share one pass over U.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe import engine, tree
from funcprobe.attribution.step_parts import StepParts
from funcprobe.data.rollouts import members, take
from funcprobe.engine.passes import Passes
from funcprobe.errors import InputError, NumericsError
from funcprobe.types import Params, TokenScores

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


def check_influence(by: str | None, chunk: int, leaves: Chosen, params: Params) -> None:
    """Refuse, before any pass, observables and options that an influence matrix cannot be made of.

    Raises:
        InputError: If an option is unknown or out of range.
    """
    if by not in (None, "sequences", "prompts"):
        raise InputError(f"Unknown influence {by!r}; expected 'sequences', 'prompts' or None.")
    if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
        raise InputError(f"chunk is {chunk!r}; expected a whole number of at least 1.")
    if isinstance(leaves, str):
        raise InputError(f"leaves is the single string '{leaves}'; expected a list of names, or a predicate.")
    if leaves is not None and by is None:
        raise InputError("leaves can do nothing without influence='sequences' or 'prompts'; leave it out.")
    if leaves is not None and not tree.select(params, leaves):
        raise InputError("leaves chooses no parameter leaf; expected at least one.")


def influence_of(
    passes: Passes, on_evaluation: TokenScores, parts: StepParts, *, by: str, leaves: Chosen, chunk: int
) -> Influence:
    """Return the matrix of a step, from the cotangents of F on E.

    Raises:
        NumericsError: If an entry is not finite; the message names the row.
    """
    params = parts.params
    moving = None if leaves is None else tuple(tree.select(params, leaves))
    evaluation = passes.evaluation
    each = list(members(evaluation, by))
    found: list[Tensor] = []
    for start in range(0, len(each), chunk):
        directions = []
        for _, rows in each[start : start + chunk]:
            part = take(evaluation, rows)
            c = engine.rows_of(on_evaluation, rows, part)
            gradient_of_row = passes.over_rows(part).pull_back(c, params, "influence: gradients on E")
            directions.append(parts.carried(gradient_of_row).direction)
        with passes.clock("influence: U"):
            several = engine.directional_of_many(
                parts.step.policy,
                params,
                directions,
                parts.prepared,
                as_training=True,
                leaves=moving,
                stats=parts.step.objective.stats,
                microbatch=parts.microbatch,
            )
        found += [_by_sequence(parts.on_batch, along) for along in several]
        if passes.progress is not None:
            passes.progress("influence", min(start + chunk, len(each)), len(each))
    matrix, labels = torch.stack(found).cpu(), torch.tensor([label for label, _ in each])
    if not bool(torch.isfinite(matrix).all()):
        row, column = (~torch.isfinite(matrix)).nonzero()[0].tolist()
        raise NumericsError(
            f"The influence of update sequence {column} on evaluation {by[:-1]} {int(labels[row])} is not finite; "
            "check the weights of the model, or load it in a wider dtype."
        )
    return Influence(matrix, by, labels, moving)


def _by_sequence(cotangents: TokenScores, along: engine.Directional) -> Tensor:
    """Return [B_U]: the contribution of every update sequence."""
    return engine.fields(engine.each(torch.mul, cotangents, along.tangents)).sum((0, 2))
