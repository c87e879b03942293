"""`trainer_state.json` of a checkpoint folder: the step that it stands at, and the history that its trainer logged."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from funcprobe.data.reading import json_object
from funcprobe.errors import CheckpointError, InputError

FILE = "trainer_state.json"

#: A logged event: numbers by name; whatever is no finite number is left out.
Event = Mapping[str, float]


@dataclass(frozen=True)
class TrainerState:
    """The moment of training that a checkpoint is of."""

    global_step: int  #: optimizer steps that have been taken
    history: tuple[Event, ...] = ()  #: logged events in order, each with its `step`

    def logged(self, step: int) -> Event | None:
        """Return the event of training that was logged at a step; None where there is none."""
        return next((event for event in self.history if event["step"] == step and "learning_rate" in event), None)

    @property
    def names(self) -> frozenset[str]:
        """The names of everything that was logged."""
        return frozenset(name for event in self.history for name in event)


def trainer_state(folder: Path) -> TrainerState | None:
    """Return the state that transformers.Trainer left in a folder; None where it left none.

    Raises:
        CheckpointError: If the file is damaged, or says no step.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        found = json_object(path)
    except InputError as error:
        raise CheckpointError(str(error)) from None
    step = found.get("global_step")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**63:
        raise CheckpointError(f"{path}: global_step is {step!r:.60}; expected the number of steps that were taken.")
    history = found.get("log_history")
    events = [_event(entry) for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    return TrainerState(step, tuple(event for event in events if "step" in event))


def logged_later(folder: Path, step: int) -> Event | None:
    """Return the event of a step that a later checkpoint of the same run has in its history; None where there is none.

    Later checkpoints are folders `checkpoint-N` beside this one, of the least N that is not below the step.
    """
    try:
        paths = list(folder.absolute().parent.iterdir())
    except OSError:  # a folder that may be passed through, and not listed
        return None
    beside = {path: re.fullmatch(r"checkpoint-([0-9]{1,18})", path.name) for path in paths}
    later = sorted((int(name[1]), path) for path, name in beside.items() if name and int(name[1]) >= step)
    for _, path in later[:1]:
        try:
            state = trainer_state(path)
        except CheckpointError:
            continue
        return None if state is None else state.logged(step)
    return None


def _event(entry: dict[str, Any]) -> Event:
    return {
        str(name): float(value)
        for name, value in entry.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    }


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False
