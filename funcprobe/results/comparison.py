"""`Comparison`: what several steps from one θ do to observables on one E, and how they differ, paired by prompt."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from funcprobe.data.atomic import fresh_directory
from funcprobe.errors import InputError
from funcprobe.estimators.uncertainty import Bar, bar
from funcprobe.measurement.outcome import Outcome
from funcprobe.measurement.readings import Reading, Sampled, is_lost
from funcprobe.results.frames import frame_of
from funcprobe.results.probe import BatchCounts, json_safe
from funcprobe.types import Json

if TYPE_CHECKING:
    from pandas import DataFrame

#: Raised when a field changes its meaning.
SCHEMA_VERSION = 1

Quantity = Literal["change", "first_order", "second_order"]
_QUANTITIES: tuple[Quantity, ...] = ("change", "first_order", "second_order")


@dataclass(frozen=True)
class Comparison:
    """What several steps do to observables; the first step is the baseline of the differences."""

    outcomes: dict[str, Outcome]  #: by the name of the step, the baseline first
    steps: dict[str, dict[str, float]]  #: by the name of the step: loss and what its objective reported
    mode: str  #: how the first order was taken: "forward" or "reverse"
    level: float  #: nominal coverage of the intervals
    evaluation: BatchCounts
    update_batch: BatchCounts
    notes: tuple[str, ...]
    timings: dict[str, float]  #: seconds by phase
    environment: Json

    @property
    def baseline(self) -> str:
        """The name of the first step."""
        return next(iter(self.outcomes))

    @property
    def observables(self) -> tuple[str, ...]:
        """The names of the observables, the main one first."""
        return tuple(self.outcomes[self.baseline].readings)

    @property
    def warnings(self) -> dict[str, tuple[str, ...]]:
        """What should be known of each step before its numbers are used."""
        return {name: outcome.warnings for name, outcome in self.outcomes.items() if outcome.warnings}

    def reading(self, step: str, observable: str | None = None) -> Reading:
        """Return what a step does to an observable, by default the main one.

        Raises:
            InputError: If there is no such step or observable.
        """
        name = self.observables[0] if observable is None else observable
        if step not in self.outcomes or name not in self.observables:
            raise InputError(
                f"There is no step '{step}' with observable '{name}'; the steps are {', '.join(self.outcomes)}, the "
                f"observables {', '.join(self.observables)}."
            )
        return self.outcomes[step].readings[name]

    def difference(
        self,
        step: str,
        observable: str | None = None,
        *,
        against: str | None = None,
        quantity: Quantity = "change",
    ) -> Bar:
        """Return how much more a step changes an observable than another, by default the baseline: paired by prompt.

        `value = ΔF(step) − ΔF(against)`; its error comes from the same differences without each prompt, so what the
        sample of prompts does to both alike cancels. Without error bars, in reverse mode for the first order, or where
        the float errors of both ΔF are above a tenth of their difference, the bar is infinitely wide.

        Raises:
            InputError: If there is no such step, observable or quantity.
        """
        if quantity not in _QUANTITIES:
            raise InputError(f"Unknown quantity {quantity!r}; expected one of {', '.join(_QUANTITIES)}.")
        other = self.baseline if against is None else against
        name = self.observables[0] if observable is None else observable
        one, two = self.reading(step, name), self.reading(other, name)
        values = getattr(one, quantity), getattr(two, quantity)
        if None in values:
            raise InputError("The comparison has no second order; ask compare for it with order=2.")
        value = values[0] - values[1]
        sampled = self.outcomes[step].sampled, self.outcomes[other].sampled
        known = (quantity == "change" or self.mode == "forward") and _has_bar(one) and _has_bar(two)
        if quantity == "change" and one.error is not None and two.error is not None:
            known &= not is_lost(value, math.hypot(one.error, two.error)) or value == 0.0
        if step == other or sampled[0] is None or sampled[1] is None or not known:
            width = 0.0 if step == other else float("inf")
            return Bar(value, width, value - width, value + width, self.level)
        offset = _QUANTITIES.index(quantity)
        i, j = sampled[0].columns[name] + offset, sampled[0].width + sampled[1].columns[name] + offset
        return bar(Sampled.join(sampled), lambda q: q[i] - q[j], self.level)._replace(value=value)  # type: ignore[arg-type]

    def rows(self) -> list[Json]:
        """Return the long form: a row for every step, observable and quantity, with error and paired difference."""
        return [row for step in self.outcomes for name in self.observables for row in self._rows(step, name)]

    def _rows(self, step: str, name: str) -> list[Json]:
        reading, found = self.reading(step, name), []
        for quantity in _QUANTITIES:
            value = getattr(reading, quantity)
            if value is None:
                continue
            own, paired = reading.bars.get(quantity), self.difference(step, name, quantity=quantity)
            found.append(
                {
                    "step": step,
                    "lr": self.outcomes[step].lr,
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

    def to_frame(self) -> DataFrame:
        """Return the long form as a pandas frame.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        return frame_of(self.rows())

    def summary(self) -> str:
        """Return a text: what every step does, a line each, and how that differs from the first."""
        from funcprobe.results.comparison_words import summary_of

        return summary_of(self)

    def to_dict(self) -> Json:
        """Return everything as JSON-safe values, with `schema_version`."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain["outcomes"] = {name: outcome.to_dict() for name, outcome in self.outcomes.items()}
        plain["evaluation"], plain["update_batch"] = self.evaluation._asdict(), self.update_batch._asdict()
        return {"schema_version": SCHEMA_VERSION, **json_safe(plain)}

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the folder `path`, whole or not at all, with `comparison.json`.

        Raises:
            InputError: If the folder exists and `overwrite` is false.
        """
        with fresh_directory(path, overwrite=overwrite) as folder:
            text = json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)
            (folder / "comparison.json").write_text(text + "\n", encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """Read what `save` wrote.

        Raises:
            InputError: If there is no comparison at `path`, it is damaged, or it has another schema version.
        """
        file = Path(path) / "comparison.json"
        if not file.is_file():
            raise InputError(f"{path} holds no comparison.json; expected a folder that Comparison.save wrote.")
        try:
            plain: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            version = plain.pop("schema_version", None)
            if version == SCHEMA_VERSION:
                outcomes = {name: Outcome.from_dict(found) for name, found in plain["outcomes"].items()}
                counts = {name: BatchCounts(**plain[name]) for name in ("evaluation", "update_batch")}
                return cls(**{**plain, **counts, "outcomes": outcomes, "notes": tuple(plain["notes"])})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{file} is not a whole comparison ({error}); the file is damaged.") from error
        raise InputError(f"{file} has schema version {version}; this funcprobe reads {SCHEMA_VERSION}.")

    def _repr_html_(self) -> str:
        from funcprobe.results.comparison_words import html_of

        return html_of(self)


def _has_bar(reading: Reading) -> bool:
    """Return whether replicates of a reading mean something: it has bars, or it does not move and needs none."""
    return bool(reading.bars) or reading.change == reading.first_order == 0.0
