"""A script in several processes that meet by torch.distributed, one thread each, and the batches that it runs on."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import distributed as dist

import funcprobe as fp


def rollouts(count: int, length: int, prompt: int, vocabulary: int, seed: int) -> fp.Rollouts:
    """Return sequences of random tokens, four a prompt."""
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (count, length), generator=drawn).tolist()
    rewards = torch.randn(count, generator=drawn).tolist()
    prompts = [ids[i - i % 4][:prompt] for i in range(count)]
    return fp.rollouts_from_lists(prompts, [row[prompt:] for row in ids], temperature=1.0, rewards=rewards)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the words by which a process of `together` knows its place."""
    parser.add_argument("--meet", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=json.loads, help=argparse.SUPPRESS)


def together(script: str, processes: int, words: Sequence[str] = (), **variables: str) -> list[dict[str, Any]]:
    """Return what each of some processes of a script measured, all of which run at once."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script, "--meet", f"file://{folder}/meeting", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        running = [
            subprocess.Popen(
                [*command, "--rank", json.dumps([rank, processes])], stdout=subprocess.PIPE, text=True, env=environment
            )
            for rank in range(processes)
        ]
        return [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]


def answer(options: argparse.Namespace, measured: Callable[[], dict[str, Any]]) -> bool:
    """Meet the others, measure and print, where this process is one of `together`; return whether it is."""
    torch.set_num_threads(1)
    if not options.meet:
        return False
    rank, size = options.rank
    if size > 1:
        dist.init_process_group("gloo", init_method=options.meet, rank=rank, world_size=size)
    print(json.dumps(measured()))
    return True
