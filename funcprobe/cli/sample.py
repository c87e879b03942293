"""`funcprobe sample`: rollouts of a checkpoint, with everything that `run` needs to know about them."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from funcprobe.checkpoints import load_checkpoint
from funcprobe.cli.prepare import device_of
from funcprobe.cli.progress import Bars
from funcprobe.cli.prompts import read_prompts
from funcprobe.data.files import FORMATS, write_rollouts
from funcprobe.errors import InputError
from funcprobe.policy.sampling import Reward, load_reward, sample
from funcprobe.types import Rollouts


def sample_command(options: argparse.Namespace) -> Rollouts:
    """Draw rollouts as the options say, write them, and print one line about them.

    Raises:
        InputError: If an option, the checkpoint, a prompt or a reward is not usable; then nothing was written.
    """
    output = Path(options.output)
    _check_numbers(options)
    _check_output(output, options.force)
    reward = None if options.reward is None else _guarded(load_reward(options.reward), options.reward)
    with Bars() as bars:
        bars.phase("loading the checkpoint")
        checkpoint = load_checkpoint(
            options.checkpoint,
            base_model=options.base_model,
            optimizer=None,
            dtype=options.dtype,
            device=device_of(options.device),
        )
        tokenizer = checkpoint.tokenizer
        drawn = sample(
            checkpoint.policy,
            checkpoint.params,
            read_prompts(Path(options.prompts), tokenizer),
            generator=torch.Generator().manual_seed(options.seed),
            temperature=options.temperature,
            max_new_tokens=options.max_new_tokens,
            eos_id=checkpoint.eos_ids,
            group_size=options.group_size,
            reward=reward,
            tokenizer=tokenizer,
            batch_size=options.batch_size,
            progress=bars,
        )
    write_rollouts(output, drawn, tokenizer_id=getattr(tokenizer, "name_or_path", None), overwrite=options.force)
    print(_line(drawn, output))
    return drawn


def _line(drawn: Rollouts, output: Path) -> str:
    rows, tokens = drawn.ids.shape[0], int(drawn.completion_mask.sum())
    mean = "" if drawn.rewards is None else f", mean reward {float(drawn.rewards.mean()):.4g}"
    return f"{rows} rollouts, {tokens} tokens{mean}: {output}"


def _check_numbers(options: argparse.Namespace) -> None:
    """Find out before anything is loaded what `sample` would refuse after it.

    Raises:
        InputError: If a number is out of range.
    """
    if not (math.isfinite(options.temperature) and options.temperature > 0):
        raise InputError(f"--temperature is {options.temperature}; expected a number above 0.")
    for name in ("max_new_tokens", "group_size", "batch_size"):
        if (value := getattr(options, name)) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; expected a whole number of at least 1.")


def _check_output(output: Path, force: bool) -> None:
    if output.suffix not in FORMATS:
        raise InputError(f"--output is {output}; expected a file ending in {' or '.join(FORMATS)}.")
    if output.is_dir() or (output.exists() and not force):
        raise InputError(f"--output: {output} exists already; choose another name, or replace it with --force.")
    if not output.absolute().parent.is_dir():
        raise InputError(f"--output: the folder {output.parent} does not exist; create it first.")


def _guarded(reward: Reward, name: str) -> Reward:
    def guarded(**rows: Any) -> Any:
        try:
            return reward(**rows)
        except Exception as error:
            raise InputError(f"The reward function '{name}' failed: {type(error).__name__}: {error}") from error

    return guarded
