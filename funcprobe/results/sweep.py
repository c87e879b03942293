"""`SweepResult`: one gradient, many learning rates: a curve that is told, kept and read as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from funcprobe.errors import Note
from funcprobe.results.blocks import Block
from funcprobe.results.curve import Curve
from funcprobe.results.datatree import outcome_groups, tree_of
from funcprobe.results.frames import Tabular
from funcprobe.results.result import Measured
from funcprobe.results.storage import Kind
from funcprobe.results.sweep_blocks import blocks_of

if TYPE_CHECKING:
    from xarray import DataTree


@dataclass(frozen=True)
class SweepResult(Curve, Tabular, Measured):
    """How observables move with the learning rate of one update, from one gradient on U and one derivative on E."""

    kind: ClassVar[Kind] = "sweep"

    info: Mapping[str, float]  #: loss, grad_norm and what the objective reported
    warnings: tuple[Note, ...] = ()  #: what should be known before the numbers are used
    notes: tuple[Note, ...] = ()  #: what was decided on the way

    def to_datatree(self) -> DataTree:
        """Return observables and replicates over prompts, along `lr`, as an `xarray.DataTree`.

        `results.datatree` lists its groups.

        Raises:
            MissingExtraError: If xarray is not installed.
        """
        return tree_of(outcome_groups(self.points, {"lr": self.lrs}), self.kind, self.provenance)

    def blocks(self) -> tuple[Block, ...]:
        """Return the blocks of a sweep: a sentence and a table for every observable, then cautions."""
        return blocks_of(self, self.notes, self.warnings)
