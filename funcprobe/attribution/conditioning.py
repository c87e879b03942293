"""Single parameter entries that carry whole rows of U, which sums of parts cannot show, being right all the same.

In the additive form a sequence contributes `Σ_n u_n g_n` over parameter entries n, with u = scale ⊙ ∇F. AdamW's scale
is about 1/|g| where the second moment was 0 before the step, and where the gradients of U nearly cancel in an entry,
each of them is large beside their sum: that entry then outweighs all others, and another machine's rounding moves it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe import tree
from funcprobe.attribution.step_parts import StepParts
from funcprobe.errors import Note, percent
from funcprobe.types import Leaves, Params

#: How many sequences of U are looked into: those that contribute most.
LOOKED_INTO = 3

#: The share of Σ|entries| above which one entry outweighs all others together.
OUTWEIGHS = 0.5


class Concentration(NamedTuple):
    """The parameter entry that carries most of one sequence of U."""

    sequence: int  #: the row of U
    leaf: str  #: the leaf that the entry belongs to
    share: float  #: |its part| / Σ|parts| over all entries of all leaves


def concentrations(parts: StepParts, direction: Leaves, contributions: Tensor) -> tuple[Concentration, ...]:
    """Return the entry that carries most, for each of the sequences that contribute most: a gradient of one row each.

    Args:
        parts: The step.
        direction: u, that is ∇F carried back through the step.
        contributions: Of the sequences of U, `[B_U]`.
    """
    largest = contributions.abs().argsort(descending=True, stable=True)[:LOOKED_INTO]
    return tuple(_of_row(int(row), direction, parts.gradient_of(torch.tensor([int(row)]))) for row in largest)


def cautions(found: Sequence[Concentration], form: str) -> Iterator[Note]:
    """Yield a word on the worst row in which one entry outweighs all others together."""
    worst = max(found, key=lambda row: row.share, default=None)
    if worst is None or worst.share <= OUTWEIGHS:
        return
    rows = sum(row.share > OUTWEIGHS for row in found)
    better = (
        "form='jacobian' asks another question and is better conditioned"
        if form == "additive"
        else "no other form is better conditioned"
    )
    yield Note(
        "conditioning",
        f"One entry of {worst.leaf} carries {percent(worst.share, 0)} of the parts of sequence {worst.sequence} of U "
        f"(so it is for {rows} of the {len(found)} sequences that contribute most): the optimizer divides there by a "
        f"gradient that nearly cancels over U, and other rounding would move these rows; {better}.",
    )


def _of_row(row: int, direction: Leaves, gradient: Params) -> Concentration:
    total, largest = 0.0, dict.fromkeys(direction, 0.0)
    for name, u in direction.items():
        pieces = zip(tree.pieces(u), tree.pieces(gradient[name]), strict=True)
        for product in ((a.double() * b.double()).abs() for a, b in pieces):
            total += float(product.sum())
            largest[name] = max(largest[name], float(product.max()) if product.numel() else 0.0)
    found = tree.everywhere(torch.tensor([total, *largest.values()], dtype=torch.float64), direction)
    total, highest = float(found[:, 0].sum()), dict(zip(largest, found[:, 1:].amax(0).tolist(), strict=True))
    leaf = max(highest, key=highest.__getitem__)
    return Concentration(row, leaf, highest[leaf] / total if total > 0 else 0.0)
