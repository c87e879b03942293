"""ΔF in float32 against float64, by subtraction and by the path: `python benchmarks/path.py`.

A GPT-2 with random weights (float64 throughout when it is asked to be, so that its float64 twin is the truth), AdamW
steps at learning rates from 1e-2 to 1e-9 on one gradient, 64 rollouts. Errors are relative to Σ|terms|, the sum of the
absolute contributions of tokens: what rounding is relative to, since ΔF itself may cancel. The truth is a float64
subtraction at θ + Δθ, itself off by about 1e-16/ΔF.

What was expected: subtraction loses a digit with every decade and everything below 1e-8; the path stays at some 1e-6,
the rounding of a derivative, whatever the learning rate, with fewer nodes the smaller the step.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from harness import narrow, record
from rich.console import Console
from rich.table import Table

import funcprobe as fp
from funcprobe import engine, tree
from funcprobe.engine.clock import Clock
from funcprobe.engine.passes import Passes
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.path import path, subtraction_error
from funcprobe.results.environment import describe_environment

LRS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
OBSERVABLES = {
    "entropy": fp.entropy(),
    "sequence weights": fp.entropy("rao_blackwell", "sequence", "sequence"),
    "reward": fp.expected_reward(),
    "kl": fp.kl(),
}
TOLERANCE = 1e-5


def main() -> None:
    """Measure, print and write."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    rows = measured(options.hidden, options.layers)
    table = Table(title="error of ΔF in float32, relative to Σ|terms|", title_justify="left")
    for heading in ("lr", "observable", "subtraction", "its estimate", "path", "nodes"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = (f"{row[name]:.0e}" for name in ("subtraction", "estimate", "path"))
        table.add_row(f"{row['lr']:.0e}", row["observable"], *cells, str(row["nodes"]))
    Console().print(table)
    asked = {"hidden": options.hidden, "layers": options.layers, "tolerance": TOLERANCE, "lrs": LRS}
    out = Path(__file__).parent / "results" / "path-cpu.json"
    record.write(out, "path", asked, describe_environment("cpu"), rows)


def measured(hidden: int, layers: int) -> list[dict[str, Any]]:
    """Return a row for every learning rate and observable."""
    module = narrow.gpt2(hidden, layers)
    (policy, params), (wide, wide_params) = fp.from_module(module), fp.from_module(copy.deepcopy(module).double())
    evaluation, update = narrow.batches(policy, params, prompts=16)
    step = fp.make_step(policy, fp.grpo(), fp.adamw(1e-4, weight_decay=0.01))
    gradient, _ = step.gradient(params, update)
    state = step.optimizer.init(params)
    passes = Passes.over(policy, evaluation, OBSERVABLES, None, None, Clock())
    anchor = engine.scores(wide, wide_params, evaluation, order=1)
    rows = []
    for lr in LRS:
        delta = step.apply(params, state, gradient, lr=lr).delta
        along = passes.directional(params, delta, "E")
        by_path = path(passes, params, delta, along, OBSERVABLES, TOLERANCE)
        stored = {name: (p.double() + delta[name].double()).float() for name, p in params.items()}
        subtracted = Evidence(evaluation, along.scores, passes.scores(stored, "E at θ′", order=1), along)
        end = tree.add(wide_params, {name: d.double() for name, d in delta.items()})
        truth = Evidence(evaluation, anchor, engine.scores(wide, end, evaluation, order=1))
        found = Evidence(evaluation, along.scores, by_path.scores)
        for name, o in OBSERVABLES.items():
            size, exact = truth.magnitude(o), float(truth.change(o))
            rows.append(
                {
                    "lr": lr,
                    "observable": name,
                    "change": exact,
                    "terms": size,
                    "subtraction": abs(float(subtracted.change(o)) - exact) / size,
                    "estimate": subtraction_error(subtracted, o, torch.finfo(torch.float32).eps) / size,
                    "path": abs(float(found.change(o)) - exact) / size,
                    "nodes": by_path.nodes,
                }
            )
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="ΔF in float32 against float64, by subtraction and by the path.")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    return parser


if __name__ == "__main__":
    main()
