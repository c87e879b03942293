"""From a configuration to a command's inputs: checked output, checkpoint, rollouts and step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from funcprobe.checkpoints import Checkpoint, load_checkpoint
from funcprobe.cli.config import Config
from funcprobe.cli.progress import Bars
from funcprobe.cli.rollout_files import rollouts_in
from funcprobe.cli.run_defaults import state_of, with_defaults
from funcprobe.data.atomic import check_absent
from funcprobe.data.files import read_metadata
from funcprobe.errors import ConfigError, InputError
from funcprobe.measurement.update import Update
from funcprobe.parallel.environment import is_launched
from funcprobe.policy.devices import device_of
from funcprobe.report.canvas import new_axes
from funcprobe.types import Rollouts


class Prepared(NamedTuple):
    """The inputs that a configuration names, loaded and checked."""

    update: Update  #: the step on U that is about to be taken
    evaluation: Rollouts  #: E
    tokenizer: Any  #: of the checkpoint; None where it has none


def prepared(config: Config, bars: Bars) -> Prepared:
    """Return the inputs that a configuration names, loaded and checked.

    Raises:
        ConfigError: If a field asks for what cannot be done.
        FuncprobeError: If checkpoint or rollouts are not usable.
    """
    bars.phase("loading the checkpoint")
    checkpoint = _checkpoint(config)
    bars.phase("reading the rollouts")
    state = state_of(config)
    evaluation, batch = (
        rollouts_in(getattr(config, which), which, config, checkpoint, state) for which in ("evaluation", "batch")
    )
    _check_fields(config, evaluation)
    update = checkpoint.update(
        config.objective.build(), batch, max_grad_norm=config.max_grad_norm, microbatch=config.microbatching
    )
    bars.phase("gradient on U")
    return Prepared(update, evaluation, checkpoint.tokenizer)


def check_output(config: Config, path: Path) -> None:
    """Check, before anything takes time, that a folder of results may be written.

    An existing folder is replaced with `force` only, and only if it holds nothing but what funcprobe wrote into it, and
    nothing that this command reads.

    Raises:
        ConfigError: Otherwise.
    """
    output = config.output
    try:
        check_absent(output, overwrite=config.force)
    except InputError as error:
        if output.is_dir() and not config.force:
            raise ConfigError(
                f"output: {output} exists already; choose another folder, or replace it with --force."
            ) from None
        raise ConfigError(f"output: {error}") from None
    inputs = {"configuration": path, "checkpoint": config.checkpoint, "evaluation": config.evaluation}
    for name, read in {**inputs, "batch": config.batch, "base_model": Path(config.base_model or ".")}.items():
        if output.is_dir() and read != Path(".") and read.resolve().is_relative_to(output.resolve()):
            raise ConfigError(f"output: {output} holds the {name} that is read; choose another folder.")
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise ConfigError(f"output: {above} is not a folder that may be written in; choose another output.")


def resolved(config: Config) -> Config:
    """Return the configuration with the device that is really used, having settled all that needs no model.

    The loss and the bound of a framework that is recognised stand in for those that are not given.

    Raises:
        ConfigError: If there is no step to take, or no such device.
    """
    if config.optimizer is None:
        raise ConfigError(
            "optimizer: none leaves no step to measure; use auto for the saved optimizer state, or fresh with an lr."
        )
    if config.shard and not is_launched():
        raise ConfigError(
            "shard: true shares the leaves out over processes, and this one is alone; start them with torchrun "
            "--nproc-per-node N -m funcprobe, or leave the key out."
        )
    new_axes()  # a missing matplotlib is found out now, not after the run
    for path in (config.evaluation, config.batch):
        read_metadata(path)
    return with_defaults(config.model_copy(update={"device": device_of(config.device)}))


def _checkpoint(config: Config) -> Checkpoint:
    found = load_checkpoint(
        config.checkpoint,
        base_model=config.base_model,
        optimizer=config.optimizer,
        lr=config.lr,
        dtype=config.dtype,
        storage=config.storage,
        device=config.device,
        offload=config.offload,
    )
    return found.shard() if config.shard else found


def _check_fields(config: Config, evaluation: Rollouts) -> None:
    if config.observable.proposal == "sampler" and evaluation.sampling_logps is None:
        raise ConfigError(
            f"observable.proposal: sampler needs the sampler's log-probabilities, and {config.evaluation} has no "
            "column sampling_logps; use anchor."
        )


@contextmanager
def memory_advice(config: Config) -> Iterator[None]:
    """Return advice for a device that runs out of memory.

    Raises:
        InputError: In that case.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"The device ran out of memory ({str(error).splitlines()[0]}); set microbatch_tokens lower than "
            f"{config.microbatch_tokens or 'one piece'}, or dtype: bfloat16."
        ) from error
