"""The rollouts that a configuration names, of the step at which its checkpoint stands.

A checkpoint at step N is stepped next on the rows of step N + 1, by the count of most trainers: those are what its
policy sampled. A dump says its step, and `trainer_state.json` that of the checkpoint.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from funcprobe.checkpoints import Checkpoint
from funcprobe.checkpoints.trainer_state import TrainerState
from funcprobe.cli.config import Config
from funcprobe.data.dumps import DUMPS
from funcprobe.data.files import dump_of, read_rollouts
from funcprobe.data.rollouts import to_device
from funcprobe.errors import ConfigError, FuncprobeWarning, InputError, Note
from funcprobe.types import Rollouts


def rollouts_in(path: Path, which: str, config: Config, checkpoint: Checkpoint, state: TrainerState | None) -> Rollouts:
    """Return the rollouts of a file on the policy's device; of a dump, those of the step that is to be taken.

    `which` is "evaluation" or "batch", for messages.

    Raises:
        ConfigError: If a dump is text, and the checkpoint has no tokenizer.
        InputError: If the file is not usable, or holds several steps and not that one.
    """
    dump = dump_of(path)
    if dump is None:
        found = _read(path, config, checkpoint, None, "auto")
    else:
        _check_tokenizer(which, dump, checkpoint)
        _tell(which, dump, path)
        expected = None if state is None else state.global_step + DUMPS[dump].lead
        found = _of_dump(path, dump, config, checkpoint, expected)
        _check_step(which, found, state, expected)
    return to_device(found, checkpoint.policy.device)


def _check_tokenizer(which: str, dump: str, checkpoint: Checkpoint) -> None:
    if DUMPS[dump].is_text and checkpoint.tokenizer is None:
        raise ConfigError(
            f"{which}: {DUMPS[dump].title} are text, and the checkpoint has no tokenizer to make ids of it with; put "
            "the run's beside the weights, or give a dump of ids."
        )


def _of_dump(path: Path, dump: str, config: Config, checkpoint: Checkpoint, expected: int | None) -> Rollouts:
    try:
        return _read(path, config, checkpoint, config.step, dump)
    except InputError as error:
        if error.kind != "several steps" or expected is None:
            raise
    return _read(path, config, checkpoint, expected, dump)


def _read(path: Path, config: Config, checkpoint: Checkpoint, step: int | None, from_: str) -> Rollouts:
    policy = checkpoint.policy
    return read_rollouts(
        path,
        step=step,
        vocab_size=policy.vocab_size,
        max_length=policy.max_length,
        from_=from_,
        tokenizer=checkpoint.tokenizer,
        temperature=config.temperature,
    )


def _tell(which: str, dump: str, path: Path) -> None:
    warnings.warn(
        Note("format", f"{which}: {path.name} is read as {DUMPS[dump].title}, by its columns."),
        FuncprobeWarning,
        stacklevel=3,
    )


def _check_step(which: str, found: Rollouts, state: TrainerState | None, expected: int | None) -> None:
    """Warn where the rows are not of the step that the checkpoint takes next, with both numbers."""
    if found.step is None or state is None or expected is None:
        return
    steps = sorted(set(found.step.tolist()))
    if steps != [expected]:
        text = (
            f"The {which} rollouts are of step {', '.join(map(str, steps))}, and the checkpoint, at step "
            f"{state.global_step}, is stepped on those of step {expected}: another policy sampled them."
        )
        warnings.warn(Note("step", text), FuncprobeWarning, stacklevel=3)
