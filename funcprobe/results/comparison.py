"""`Comparison`: the effects of several updates of one θ on observables on one E, and their differences by prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from funcprobe.errors import InputError, Note
from funcprobe.estimators.uncertainty import Bar
from funcprobe.measurement.outcome import Outcome
from funcprobe.measurement.readings import Reading
from funcprobe.results.blocks import Block
from funcprobe.results.comparison_words import blocks_of
from funcprobe.results.datatree import outcome_groups, tree_of
from funcprobe.results.frames import Tabular
from funcprobe.results.paired import QUANTITIES, Quantity, difference
from funcprobe.results.provenance import Provenance
from funcprobe.results.result import Measured
from funcprobe.results.storage import Kind
from funcprobe.types import Json

if TYPE_CHECKING:
    from xarray import DataTree


@dataclass(frozen=True)
class Comparison(Tabular, Measured):
    """Outcomes of several updates; the first one is the baseline of the differences."""

    kind: ClassVar[Kind] = "comparison"

    outcomes: dict[str, Outcome]  #: by the name of the update, the baseline first
    provenance: Provenance  #: how the numbers were made
    level: float  #: nominal coverage of the intervals
    notes: tuple[Note, ...] = ()  #: what was decided on the way

    @property
    def baseline(self) -> str:
        """The name of the first update."""
        return next(iter(self.outcomes))

    @property
    def observables(self) -> tuple[str, ...]:
        """The names of the observables, the main one first."""
        return tuple(self.outcomes[self.baseline].readings)

    @property
    def warnings(self) -> dict[str, tuple[Note, ...]]:
        """The cautions about each update, to be known before its numbers are used."""
        return {name: outcome.warnings for name, outcome in self.outcomes.items() if outcome.warnings}

    def reading(self, update: str, observable: str | None = None) -> Reading:
        """Return the effect of an update on an observable, by default the main one.

        Raises:
            InputError: If there is no such update or observable.
        """
        name = self.observables[0] if observable is None else observable
        if update not in self.outcomes or name not in self.observables:
            raise InputError(
                f"There is no update '{update}' with observable '{name}'; the updates are {', '.join(self.outcomes)}, "
                f"the observables {', '.join(self.observables)}."
            )
        return self.outcomes[update].readings[name]

    def difference(
        self,
        update: str,
        observable: str | None = None,
        *,
        against: str | None = None,
        quantity: Quantity = "change",
    ) -> Bar:
        """Return how much more an update changes an observable than another, by default the baseline.

        It is paired by prompt; `funcprobe.results.paired.difference` says how, and where the bar is infinitely wide.

        Raises:
            InputError: If there is no such update, observable or quantity.
        """
        other = self.baseline if against is None else against
        name = self.observables[0] if observable is None else observable
        for one in (update, other):
            self.reading(one, name)  # which refuses what is not there
        pair = self.outcomes[update], self.outcomes[other]
        return difference(*pair, name, quantity, mode=self.mode, level=self.level)

    def rows(self) -> list[Json]:
        """Return the long form: a row for every update, observable and quantity, with error and paired difference."""
        return [row for update in self.outcomes for name in self.observables for row in self._rows(update, name)]

    def _rows(self, update: str, name: str) -> list[Json]:
        reading, found = self.reading(update, name), []
        for quantity in QUANTITIES:
            value = getattr(reading, quantity)
            if value is None:
                continue
            own, paired = reading.bars.get(quantity), self.difference(update, name, quantity=quantity)
            found.append(
                {
                    "update": update,
                    "lr": self.outcomes[update].lr,
                    "observable": name,
                    "unit": reading.unit,
                    "quantity": quantity,
                    "value": value,
                    "error": None if own is None else own.error,
                    "low": None if own is None else own.low,
                    "high": None if own is None else own.high,
                    "difference": paired.value,
                    "difference_error": paired.error,
                    "difference_low": paired.low,
                    "difference_high": paired.high,
                }
            )
        return found

    def to_datatree(self) -> DataTree:
        """Return observables and replicates over prompts, along `update`, as an `xarray.DataTree`.

        `results.datatree` lists its groups.

        Raises:
            MissingExtraError: If xarray is not installed.
        """
        groups = outcome_groups(list(self.outcomes.values()), {"update": list(self.outcomes)})
        return tree_of(groups, self.kind, self.provenance)

    def blocks(self) -> tuple[Block, ...]:
        """Return the blocks of a comparison: a row for every update, its difference from the first, and cautions."""
        return blocks_of(self.outcomes, self.provenance, self.level, self.notes)
