"""The arithmetic of one step beside `AdamW.step`: `python benchmarks/step.py`, processor time in one process.

`torch.optim.AdamW.step(foreach=True)` writes θ, m and v. A pure step writes them too, as copies, and Δθ as a value in
float64 arithmetic, whose norm, rounding and finiteness are told; no model is run. What was expected: three more arrays
to write, four float64 temporaries in cache, three checks: six times.

Either is measured with glibc's own thresholds, and then with those that a command sets (`allocation.py`): a pure step
writes into fresh memory, and where that goes back to the system in between, a small model's step waits for its pages.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import comparing, record

import funcprobe as fp
from funcprobe.cli.allocation import keep_freed_memory
from funcprobe.measurement.move import Move
from funcprobe.results.environment import describe_environment
from funcprobe.training.rule import Rule

#: Leaves by name: a small model's, and one that no cache holds.
SHAPES = {
    "a small Qwen2, 50 leaves": [(4096, 256), *[(256, 256), (704, 256), (256, 704), (256,)] * 12, (256,)],
    "one leaf of 16 M entries": [(4096, 4096)],
}


def processor(run: Callable[[], Any]) -> float:
    """Return the processor seconds of one run."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measured(shapes: list[tuple[int, ...]], rounds: int) -> dict[str, Any]:
    """Return the ratios of a pure step, and of its movement, over AdamW's, each round in turn."""
    torch.manual_seed(0)
    params = {f"{k}": torch.randn(shape) for k, shape in enumerate(shapes)}
    gradient = {name: 1e-3 * torch.randn_like(p) for name, p in params.items()}
    live = [torch.nn.Parameter(p.clone()) for p in params.values()]
    optimizer = torch.optim.AdamW(live, lr=1e-9, foreach=True)
    pure = fp.adamw(1e-5)
    rule, state = Rule(pure, 1.0), pure.init(params)
    for p, g in zip(live, gradient.values(), strict=True):
        p.grad = g.clone()
    state = rule.apply(params, state, gradient).opt_state
    taken = rule.apply(params, state, gradient)
    runs: dict[str, Callable[[], Any]] = {
        "AdamW.step": optimizer.step,
        "step": lambda: rule.apply(params, state, gradient),
        "movement": lambda: Move.of(params, taken.params, taken.delta),
    }
    for run in runs.values():
        run()
    seconds = {name: [processor(run) for _ in range(rounds)] for name, run in runs.items()}
    base = seconds.pop("AdamW.step")
    ratios = {name: [a / b for a, b in zip(each, base, strict=True)] for name, each in seconds.items()}
    quartiles = {name: statistics.quantiles(each, n=4, method="inclusive") for name, each in ratios.items()}
    return {"entries": sum(p.numel() for p in live), "AdamW.step": statistics.median(base), "ratios": quartiles}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="A pure step beside AdamW.step.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [{"leaves": n, "memory": "glibc's own", **measured(shapes, options.rounds)} for n, shapes in SHAPES.items()]
    if keep_freed_memory():
        rows += [{"leaves": n, "memory": "a command's", **measured(s, options.rounds)} for n, s in SHAPES.items()]
    cells = [
        [
            row["leaves"],
            row["memory"],
            f"{1e3 * row['AdamW.step']:.1f} ms",
            *(f"{q[1]:.1f} ({q[0]:.1f} .. {q[2]:.1f})" for q in row["ratios"].values()),
        ]
        for row in rows
    ]
    comparing.show(
        "processor time over AdamW.step", ("leaves", "thresholds", "AdamW.step", "step", "norm, rounding"), cells
    )
    record.write(record.RESULTS / "step-cpu.json", "step", vars(options), describe_environment("cpu"), rows)


if __name__ == "__main__":
    main()
