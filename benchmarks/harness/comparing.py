"""What the scripts that compare the two systems share: options, FLOPs, peaks in processes of their own, tables."""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from funcprobe import engine
from funcprobe.results.environment import describe_environment
from funcprobe.types import Params

from . import counting, memory, record
from .pair import MODELS, Pair, Shape, build

#: What `--quick` takes in place of the defaults; what is said beside it still counts.
QUICK = {"evaluation": 4, "batch": 4, "length": 32, "microbatch": 2, "rounds": 1}


def parser(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """Return the options that every comparison has."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--model", choices=tuple(MODELS), default="tiny", help="a configuration by name, with random weights")
    add("--lora", action="store_true", help="adapters of rank 16 on every linear layer, instead of the full model")
    add("--evaluation", type=int, default=32, help="sequences of E (default 32)")
    add("--batch", type=int, default=32, help="sequences of U (default 32)")
    add("--length", type=int, default=128, help="tokens of a sequence (default 128)")
    add("--microbatch", type=int, default=8, help="sequences at a time (default 8)")
    add("--rounds", type=int, default=5, help="timed rounds, alternating (default 5)")
    add("--threads", type=int, default=2, help="torch threads (default 2)")
    add("--quick", action="store_true", help="a few short sequences, one round: to see that it runs; writes nothing")
    add("--json", type=Path, metavar="PATH", help="where the numbers go (default benchmarks/results/)")
    add("--peak", help=argparse.SUPPRESS)  # what a child process is asked for
    parser.set_defaults(**defaults)
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return what the command line asks for, with other defaults where it says `--quick`."""
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def shape_of(options: argparse.Namespace) -> Shape:
    """Return what the options ask for."""
    return Shape(**{name: getattr(options, name) for name in Shape._fields})


def flops(run: Callable[[], Any]) -> int:
    """Return the FLOPs of a run, exactly; attention in the math kernel where that is free to choose."""
    with engine.math_attention():
        return counting.flops(run)


def peak(options: argparse.Namespace, what: str) -> float:
    """Return the peak memory of one run above its base in MiB, measured by this very script in a child process."""
    words = [sys.executable, sys.argv[0], *sys.argv[1:], "--peak", what]
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **allocator}, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"measuring '{what}' failed: {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout.strip().splitlines()[-1])


def serve_peak(options: argparse.Namespace, runs: Callable[[Pair], dict[str, Callable[[], Any]]]) -> None:
    """Answer a parent's question: warm up on a small batch of the same model, and print the peak of one run."""
    torch.set_num_threads(options.threads)
    shape = shape_of(options)
    small = runs(build(shape._replace(evaluation=4, batch=4, microbatch=4, length=32)))
    small[options.peak]()
    run = runs(build(shape))[options.peak]
    gc.collect()
    if options.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        print((torch.cuda.max_memory_allocated() - before) / memory.MIB)
        return
    memory.clear_high_water()
    before = memory.resident("VmRSS")
    run()
    print((memory.resident("VmHWM") - before) / memory.MIB)


def show(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=max(100, Console().width)).print(table)


def write(benchmark: str, options: argparse.Namespace, rows: list[Any], params: Params) -> None:
    """Write the rows to `results/`, under a name that says model, adapters and device; `params` are what is trained."""
    if options.quick and options.json is None:
        print("nothing written: --quick shows that it runs, and its numbers are no figures")
        return
    given = {name: value for name, value in vars(options).items() if name not in ("peak", "json")}
    name = f"{benchmark}-{options.model}{'-lora' if options.lora else ''}-{options.device}.json"
    path = options.json or record.RESULTS / name
    record.write(path, benchmark, given, describe_environment(options.device, params), rows)
    print(f"written: {path.name}")
