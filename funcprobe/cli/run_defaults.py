"""Defaults that come from the run itself: the loss of a framework that is recognised, and its trainer's log."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from funcprobe.checkpoints.trainer_state import TrainerState, logged_later, trainer_state
from funcprobe.cli.config import Config
from funcprobe.cli.frameworks import Framework, framework_of
from funcprobe.cli.messages import show
from funcprobe.data.files import dump_of
from funcprobe.errors import CheckpointError, FuncprobeWarning, Note


def with_defaults(config: Config) -> Config:
    """Return the configuration with the loss and the bound of the framework that is recognised, where it names none.

    A note says which, and another the learning rate and the gradient's norm that the trainer logged.
    """
    state = state_of(config)
    for text in () if state is None else _logged(config.checkpoint, state):
        warnings.warn(Note("trainer log", text), FuncprobeWarning, stacklevel=3)
    framework = framework_of(config.checkpoint, state, dump_of(config.batch))
    given = config.model_fields_set
    if framework is None or {"objective", "max_grad_norm"} <= given:
        return config
    defaults = {"objective": framework.objective, "max_grad_norm": framework.max_grad_norm}
    changed = {name: value for name, value in defaults.items() if name not in given}
    warnings.warn(Note("framework", _told(framework, changed)), FuncprobeWarning, stacklevel=3)
    return config.model_copy(update=changed)


def _told(framework: Framework, changed: Mapping[str, Any]) -> str:
    words = [f"max_grad_norm is {show(changed['max_grad_norm'])}"] if "max_grad_norm" in changed else []
    if "objective" in changed:
        options = framework.objective.model_dump(include={"epsilon", "epsilon_high", "delta", "beta"})
        listed = ", ".join(f"{name} {show(x)}" for name, x in options.items() if x is not None)
        words = [f"objective is {framework.objective.name} ({listed})", *words]
    if framework.is_stated:
        return f"{' and '.join(words)}, as {framework.name} states in args.json."
    return f"{' and '.join(words)}, the defaults of {framework.name}, which this comes from; set what the run changed."


def _logged(folder: Path, state: TrainerState) -> Iterator[str]:
    """Yield a sentence on the numbers that the trainer logged for the step, or for the last one before it."""
    step = state.global_step + 1
    event, place = state.logged(step) or logged_later(folder, step), f"for this step, {step}"
    if event is None:
        event, place = state.logged(state.global_step), f"for step {state.global_step}, the last before this one"
    if event is not None:
        norm = f"grad_norm {event['grad_norm']:.4g} and " if "grad_norm" in event else ""
        yield f"The trainer logged {norm}lr {event['learning_rate']:.4g} {place}."


def state_of(config: Config) -> TrainerState | None:
    """Return the trainer's state in the checkpoint's folder; None where there is none, or it is damaged."""
    try:
        return trainer_state(config.checkpoint)
    except CheckpointError as error:
        warnings.warn(Note("trainer state", f"{error} It is not used."), FuncprobeWarning, stacklevel=3)
        return None
