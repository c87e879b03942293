"""Peak memory against the length of the sequences, in both modes: `python benchmarks/length.py [--device cuda]`.

Every microbatch holds the same number of tokens, so that what grows with the length is attention alone. Forward mode
needs the math kernel, which makes the attention matrices: rows × heads × T² entries, with a tangent, and again with a
curvature. Beyond `engine.kernels.ATTENTION_BUDGET` entries they are made a block of queries at a time; "uncut" is the
same pass without that. Reverse mode runs the fused kernel and keeps the activations of every layer.

What was expected: forward mode flat from the length at which the budget is reached; uncut linear in T at a fixed number
of tokens; reverse flat, since its activations count tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness import memory, record
from harness.workload import Size
from rich.console import Console
from rich.table import Table

from funcprobe.results.environment import describe_environment

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
PASSES = ("scoring", "forward_mode", "forward_uncut", "second_order", "reverse_mode")


def main() -> None:
    """Measure, print and write."""
    options = _parser().parse_args()
    lengths = LENGTHS[: options.lengths]
    rows = []
    table = Table(title=f"peak MiB above base, {options.tokens} tokens a microbatch, {options.device}")
    for heading in ("T", *PASSES):
        table.add_column(heading.replace("_", " "), justify="right")
    for length in lengths:
        rows_at_once = max(1, options.tokens // length)
        size = Size(256, options.layers, 1024, length, rows_at_once, rows_at_once)
        peaks = {name: memory.peak_in_subprocess(name, size, options.device, options.threads) for name in PASSES}
        rows.append({"length": length, "sequences": rows_at_once, "mib": peaks})
        table.add_row(str(length), *(f"{peaks[name]:.0f}" for name in PASSES))
    Console().print(table)
    asked = {"tokens": options.tokens, "layers": options.layers, "threads": options.threads, "lengths": lengths}
    path = Path(__file__).parent / "results" / f"length-{options.device}.json"
    record.write(path, "length", asked, describe_environment(options.device), rows)
    print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Peak memory against the length of the sequences.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096, help="in a microbatch (default 4096)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lengths", type=int, default=len(LENGTHS), help="how many of 128, 256, ... 4096")
    return parser


if __name__ == "__main__":
    main()
