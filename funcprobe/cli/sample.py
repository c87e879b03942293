"""`funcprobe sample`: rollouts of a checkpoint, with everything that `run` needs to know about them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from funcprobe.checkpoints import load_checkpoint
from funcprobe.cli.command import PlainCommand
from funcprobe.cli.options import Argument, Option, counted
from funcprobe.cli.prepare import device_of
from funcprobe.cli.progress import Bars
from funcprobe.cli.prompts import read_prompts
from funcprobe.data.files import FORMATS, write_rollouts
from funcprobe.data.numbers import number
from funcprobe.data.paths import path_of
from funcprobe.errors import InputError
from funcprobe.policy.rewards import told
from funcprobe.policy.sampling import Reward, load_reward, sample
from funcprobe.types import Rollouts

#: Tokens, completions a prompt, and rows decoded together at most.
MOST = 1_000_000

DESCRIPTION = """\
Draw rollouts of a checkpoint for a file of prompts, and write them with the
sampler's log-probabilities and rewards, ready for `funcprobe run`. A
completion ends with any end token of the checkpoint: those of its
generation_config.json, and the tokenizer's."""

EPILOG = """\
example:
  funcprobe sample outputs/checkpoint-500 prompts.txt --temperature 1 \\
      --group-size 8 --reward my_rewards:exact_match --output evaluation.parquet

A prompt that is a list of chat messages, [{"role": "user", "content": "..."}],
goes through the chat template of the checkpoint's own tokenizer
(tokenizer_config.json or chat_template.jinja), which opens the assistant's
turn. Text is encoded as it stands, and prompt_ids are taken as they are."""


def _call(options: Namespace) -> None:
    """Draw rollouts as the options say, write them, and print one line about them.

    Raises:
        InputError: If an option, the checkpoint, a prompt or a reward is not usable; then nothing was written.
    """
    output, prompts = path_of(options.output, "--output"), path_of(options.prompts, "The file of prompts")
    _check_output(output, options.force, {"prompts": prompts, "checkpoint": path_of(options.checkpoint, "CHECKPOINT")})
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
            read_prompts(prompts, tokenizer),
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


def _line(drawn: Rollouts, output: Path) -> str:
    rows, tokens = drawn.ids.shape[0], int(drawn.completion_mask.sum())
    mean = "" if drawn.rewards is None else f", mean reward {float(drawn.rewards.mean()):.4g}"
    return f"{rows} rollouts, {tokens} tokens{mean}: {output}"


def _check_output(output: Path, force: bool, inputs: Mapping[str, Path]) -> None:
    if output.suffix not in FORMATS:
        raise InputError(f"--output is {output}; expected a file ending in {' or '.join(FORMATS)}.")
    if output.is_dir() or (output.exists() and not force):
        raise InputError(f"--output: {output} exists already; choose another name, or replace it with --force.")
    for name, path in inputs.items():
        if output.resolve().is_relative_to(path.resolve()):
            raise InputError(f"--output: {output} is read as the {name}, and is not replaced; choose another name.")
    if not output.absolute().parent.is_dir():
        raise InputError(f"--output: the folder {output.parent} does not exist; create it first.")


def _guarded(reward: Reward, name: str) -> Reward:
    def guarded(**rows: Any) -> Any:
        try:
            return reward(**rows)
        except (Exception, SystemExit, GeneratorExit) as error:  # what a user's function raises, whatever that is
            raise InputError(f"The reward function '{name}' failed: {told(error)}.") from error

    return guarded


COMMAND = PlainCommand(
    name="sample",
    description=DESCRIPTION,
    call=_call,
    arguments=(
        Argument("checkpoint", "CHECKPOINT", "Hugging Face or TRL folder"),
        Argument("prompts", "PROMPTS", ".txt (a line each), .jsonl or .parquet (prompt or prompt_ids)"),
    ),
    options=(
        Option(
            "temperature",
            "T",
            "run scores at this temperature too",
            read=lambda text: number(text, above=0),
            expected="a number above 0",
            required=True,
        ),
        Option("output", "FILE", "the .parquet or .jsonl file to write", required=True),
        Option("max-new-tokens", "N", "longest completion", default=256, **counted(1, MOST)),
        Option("group-size", "N", "completions a prompt", default=1, **counted(1, MOST)),
        Option("seed", "N", "of the draws", default=0, **counted(0)),
        Option(
            "reward",
            "MODULE:FUNCTION",
            "reward(prompts=, completions=) -> a number a completion; runs code, from the current folder first",
        ),
        Option("batch-size", "N", "completions decoded together", default=64, **counted(1, MOST)),
        Option("base-model", "PATH", "base of an adapter (default: as the adapter names it)"),
        Option("dtype", "DTYPE", "what the weights are loaded as", default="float32"),
        Option("device", "DEVICE", "auto, cpu, cuda or cuda:N", default="auto"),
        Option("force", "", "replace FILE if it exists", default=False, flag=True),
    ),
    epilog=EPILOG,
)
