"""`funcprobe run`: from a configuration to a result on disk, or one calm line and nothing on disk."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from funcprobe import __version__
from funcprobe.analysis.one_step import probe
from funcprobe.analysis.result import ProbeResult
from funcprobe.checkpoints import Checkpoint, load_checkpoint
from funcprobe.cli.config import Config, dump, load_config
from funcprobe.cli.progress import Bars
from funcprobe.data.atomic import check_absent, fresh_directory
from funcprobe.data.files import read_metadata, read_rollouts
from funcprobe.data.rollouts import to_device
from funcprobe.errors import ConfigError, FuncprobeWarning, InputError
from funcprobe.estimators.observables import entropy
from funcprobe.report.figures import new_axes, save_figure
from funcprobe.report.terminal import print_summary, summary_text
from funcprobe.training.step import make_step
from funcprobe.types import Rollouts

#: What a run writes; a folder that holds anything else is not replaced, forced or not.
WRITTEN = {"result.json", "config.yaml", "summary.txt", "measured_vs_predicted.png", "update.safetensors"}


def run_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ProbeResult:
    """Run a configuration file, print the summary, and say last where the results are.

    Raises:
        FuncprobeError: If anything about the input is not usable; then nothing was written.
    """
    config = load_config(path, overrides)
    with Bars() as bars:
        result = run(config, bars)
    print_summary(result)
    print(f"Results: {config.output}")
    return result


def run(config: Config, bars: Bars | None = None) -> ProbeResult:
    """Run a configuration and write `config.output`, whole or not at all.

    Raises:
        ConfigError: If the output folder may not be written, or a field asks for what cannot be done.
        FuncprobeError: If checkpoint, rollouts or numbers are not usable.
    """
    bars = bars or Bars()
    check_output(config.output, force=config.force)
    config = _resolved(config)
    with _collected_warnings() as said:
        bars.phase("loading the checkpoint")
        checkpoint = _checkpoint(config)
        bars.phase("reading the rollouts")
        evaluation, update = (_rollouts(path, checkpoint) for path in (config.evaluation, config.update))
        _check_proposal(config, evaluation)
        result = _probe(config, checkpoint, evaluation, update, bars)
    result = dataclasses.replace(result, warnings=tuple(dict.fromkeys([*said, *result.warnings])))
    bars.phase("writing the results")
    _write(config, result)
    return result


def check_output(output: Path, *, force: bool) -> None:
    """Check, before anything takes time, that a folder of results may be written.

    An existing folder is replaced with `force` only, and only if it holds nothing but what a run wrote.

    Raises:
        ConfigError: Otherwise.
    """
    try:
        check_absent(output, overwrite=force)
    except InputError as error:
        if output.is_dir():
            raise ConfigError(
                f"output: {output} exists already; choose another folder, or replace it with --force."
            ) from None
        raise ConfigError(f"output: {error}") from None
    if output.is_dir() and (others := sorted(p.name for p in output.iterdir() if p.name not in WRITTEN)):
        raise ConfigError(
            f"output: {output} holds '{others[0]}', which no run wrote, so it is not replaced even with --force; "
            "choose another folder."
        )
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise ConfigError(f"output: {above} is not a folder that may be written in; choose another output.")


def _resolved(config: Config) -> Config:
    """Return the configuration with the device that is really used; settle what needs no model.

    Raises:
        ConfigError: If there is no step to take, or no such device.
    """
    if config.optimizer is None:
        raise ConfigError(
            "optimizer: none leaves no step to measure; use auto for the saved optimizer state, or fresh with an lr."
        )
    new_axes()  # a missing matplotlib is found out now, not after the run
    for path in (config.evaluation, config.update):
        read_metadata(path)
    return config.model_copy(update={"device": device_of(config.device)})


def device_of(name: str) -> str:
    """Return the device of that name, where `auto` is CUDA if torch sees it.

    Raises:
        ConfigError: If torch does not know the name, or sees no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros((), device=torch.device(name)).item()  # `meta` is a device, and computes nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")
        raise ConfigError(f"device: found '{name}', which cannot be used here ({reason}); try auto or cpu.") from None
    return name


def _checkpoint(config: Config) -> Checkpoint:
    return load_checkpoint(
        config.checkpoint,
        base_model=config.base_model,
        optimizer=config.optimizer,
        lr=config.lr,
        dtype=config.dtype,
        device=config.device,
    )


def _rollouts(path: Path, checkpoint: Checkpoint) -> Rollouts:
    found = read_rollouts(path, vocab_size=checkpoint.policy.vocab_size)
    return to_device(found, checkpoint.policy.device)


def _check_proposal(config: Config, evaluation: Rollouts) -> None:
    if config.observable.proposal == "sampler" and evaluation.sampling_logps is None:
        raise ConfigError(
            f"observable.proposal: sampler needs the sampler's log-probabilities, and {config.evaluation} has no "
            "column sampling_logps; use anchor."
        )


def _probe(config: Config, checkpoint: Checkpoint, evaluation: Rollouts, update: Rollouts, bars: Bars) -> ProbeResult:
    assert checkpoint.optimizer is not None  # _resolved has seen to it
    assert checkpoint.opt_state is not None
    step = make_step(
        checkpoint.policy, config.objective.build(), checkpoint.optimizer, config.max_grad_norm, config.microbatching
    )
    bars.phase("gradient on U")
    try:
        return probe(
            checkpoint.policy,
            step,
            checkpoint.params,
            checkpoint.opt_state,
            evaluation=evaluation,
            update=update,
            observable=entropy(**config.observable.model_dump()),
            mode=config.mode,
            microbatch=config.microbatching,
            rounding=config.rounding,
            ess_threshold=config.ess_threshold,
            on_low_ess=config.on_low_ess,
            top_k=config.top_k,
            keep_update=config.keep_update,
            progress=bars,
        )
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"The device ran out of memory ({str(error).splitlines()[0]}); set microbatch_tokens lower than "
            f"{config.microbatch_tokens or 'one piece'}, or dtype: bfloat16."
        ) from error


def _write(config: Config, result: ProbeResult) -> None:
    with fresh_directory(config.output, overwrite=config.force) as folder:
        result.write_into(folder)
        (folder / "config.yaml").write_text(
            f"# As run by funcprobe {__version__}; every path is absolute.\n{dump(config)}", encoding="utf-8"
        )
        (folder / "summary.txt").write_text(summary_text(result), encoding="utf-8")
        save_figure(result, folder / "measured_vs_predicted.png")


@contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """Yield a list that fills, when the block ends, with what funcprobe warned of; other warnings pass through."""
    said: list[str] = []
    with warnings.catch_warnings():
        show = warnings.showwarning

        def collect(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
            if issubclass(category, FuncprobeWarning):
                said.append(str(message))
            else:
                show(message, category, *where, **more)  # type: ignore[arg-type]

        warnings.showwarning = collect
        warnings.simplefilter("always", FuncprobeWarning)
        yield said
