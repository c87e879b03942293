"""The learning-rate curve: its cost beside a plain loop, and its errors: `python benchmarks/curve.py [--lora]`.

The loop is what a user would write: one gradient by `.backward()`, and for every learning rate an `AdamW.step` from the
same state, a scoring pass over E at θ′ and the importance-sampled entropy; no error bars, no first order. The curve has
ΔF, δF₁ and δF₂ of the same observable, its error estimate and effective samples. Both are timed in one process.

What was expected, with u and e a forward pass over U and E: 3u + (1 + K)e for the loop, and for the curve, for any K,
3u + 3e + 3e where three values of the scores tell ΔF, and 3u + 3e + 3ne + e with n tangents where they do not; beside a
part of E on which that is chosen. An E of fewer than 64 rows is its own part, with a node more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from harness import comparing, record, timing
from harness.pair import Pair, build
from stateful.entropy import entropy
from stateful.scoring import scores
from stateful.snapshot import Snapshot, undisturbed
from stateful.updates import accumulate_loss_gradient, optimizer_step

import funcprobe as fp
from funcprobe import engine
from funcprobe.cli.demo_folder import prepare_demo
from funcprobe.engine.clock import Clock
from funcprobe.engine.passes import Passes
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.line import along_line
from funcprobe.results.environment import describe_environment
from funcprobe.types import TokenBudget

#: Learning rates of the demo, whose largest moves the policy far enough for first order to be off by a fifth.
DEMO_LRS = (1e-8, 1e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 2e-4, 4e-4, 7e-4, 1e-3)
OBSERVABLES = {"entropy": fp.entropy(), "reward": fp.expected_reward(), "kl": fp.kl()}


def spread(lr_max: float, count: int) -> list[float]:
    """Return learning rates evenly spread by factors over four decades."""
    return [float(lr) for lr in np.geomspace(1e-4 * lr_max, lr_max, count)]


def looped(pair: Pair, lrs: list[float]) -> list[float]:
    """Return ΔH at each learning rate, as a loop in plain torch has it."""
    module, optimizer, cut = pair.module, pair.optimizer, pair.shape.microbatch
    with undisturbed(module, optimizer):
        anchor = scores(module, pair.evaluation, cut)
        accumulate_loss_gradient(module, pair.batch, "dr_grpo", cut)
        kept, found = Snapshot(module, optimizer, pair.shape.device), []
        before = entropy(anchor, anchor, pair.evaluation, "per_decision", "token")
        for lr in lrs:
            optimizer_step(module, optimizer, None, lr)
            moved = scores(module, pair.evaluation, cut)
            found.append(entropy(moved, anchor, pair.evaluation, "per_decision", "token") - before)
            kept.restore()
    return found


def curved(pair: Pair, lrs: list[float], bars: str | None = None) -> fp.CurveResult:
    """Return the curve, with a table of those learning rates."""
    update = fp.Update.from_step(pair.step, pair.params, pair.opt_state, pair.batch)
    given: dict[str, Any] = {"microbatch": pair.shape.microbatch, "bars": bars}
    return fp.curve(update, pair.evaluation, lrs[-1], lrs=lrs, **given)


def costs(pair: Pair, options: Any) -> list[dict[str, Any]]:
    """Return a row for every count of learning rates: exact FLOPs and times, curve over loop."""
    rows = []
    for number, (lr_max, count) in enumerate(itertools.product(options.lr_max, options.counts)):
        lrs = spread(lr_max, count)
        runs: dict[str, Callable[[], Any]] = {
            "curve": partial(curved, pair, lrs),
            "loop": partial(looped, pair, lrs),
        }
        # FLOPs are those of the CPU; older versions of torch cannot count a module's backward pass
        counted = {name: comparing.flops(run) for name, run in runs.items()} if options.device == "cpu" else None
        taken = timing.side_by_side(runs["curve"], runs["loop"], options.rounds, options.device, number > 0)
        result = curved(pair, lrs)
        rows.append(
            {
                "lr_max": lr_max,
                "learning_rates": count,
                "nodes": result.nodes,
                "by": sorted({reading.method for reading in result.readings()}),
                "reach": result.reach,
                "flops": counted,
                "flops_ratio": None if counted is None else counted["curve"] / counted["loop"],
                "time": taken._asdict(),
            }
        )
    return rows


def accuracy() -> dict[str, Any]:
    """Return FLOPs and errors on the demo policy, against eight Gauss–Legendre nodes at every learning rate."""
    folder = prepare_demo().parent
    checkpoint = fp.load_checkpoint(folder / "checkpoint")
    evaluation, batch = (fp.read_rollouts(folder / f"{name}.parquet") for name in ("evaluation", "batch"))

    def update() -> fp.Update:
        return checkpoint.update(fp.grpo(), batch)

    e, u = (
        comparing.flops(partial(fp.score, checkpoint.policy, checkpoint.params, rows)) for rows in (evaluation, batch)
    )
    costs = {}
    for name, lrs in (("11", list(DEMO_LRS)), ("100", list(np.geomspace(1e-8, 1e-3, 100)))):
        costs[name] = (comparing.flops(lambda lrs=lrs: fp.sweep(update(), evaluation, lrs, OBSERVABLES)) - 3 * u) / e
    result = fp.curve(update(), evaluation, DEMO_LRS[-1], OBSERVABLES, lrs=DEMO_LRS)
    passes = Passes.over(checkpoint.policy, evaluation, OBSERVABLES, TokenBudget(4096), None, Clock())
    x, w = np.polynomial.legendre.leggauss(8)
    rows = []
    for point in result.points:
        delta = update().at(point.lr).take().delta
        nodes = [
            passes.directional(along_line(checkpoint.params, delta, float((1 + t) / 2)), delta, "E").tangents for t in x
        ]
        integral = engine.each(lambda *each: sum(float(k) / 2 * t for k, t in zip(w, each, strict=True)), *nodes)
        assert result.scores is not None
        anchor = result.scores.line.anchor
        evidence = Evidence(passes.evaluation, anchor, engine.each(torch.add, anchor, integral))
        for name, o in OBSERVABLES.items():
            true, reading = float(evidence.change(o)), point.readings[name]
            rows.append(
                {
                    "lr": point.lr,
                    "observable": name,
                    "change": reading.change,
                    "error": abs(reading.change - true) / abs(true),
                    "estimate": (reading.float_error or math.nan) / abs(true),
                }
            )
    return {"nodes": result.nodes, "beyond_3u_in_e": costs, "rows": rows}


def main() -> None:
    """Measure, print and write."""
    parser = comparing.parser("The curve beside a plain loop.")
    parser.add_argument("--counts", type=int, nargs="+", default=(4, 8, 16, 32), metavar="K", help="learning rates")
    parser.add_argument("--lr-max", type=float, nargs="+", default=(1e-5, 1e-4), help="the largest learning rates")
    options = comparing.parsed(parser)
    torch.set_num_threads(options.threads)
    pair = build(comparing.shape_of(options))
    rows = costs(pair, options)
    cells = [
        [
            f"{row['lr_max']:g}",
            str(row["learning_rates"]),
            f"{row['nodes']} ({', '.join(row['by'])})",
            "" if row["flops_ratio"] is None else f"{row['flops_ratio']:.3f}",
            f"{row['time']['median']:.3f} ({row['time']['low']:.3f} .. {row['time']['high']:.3f})",
            f"{row['time']['cpu']:.3f}",
        ]
        for row in rows
    ]
    comparing.show("curve / loop", ("up to", "learning rates", "nodes", "FLOPs", "time", "processor time"), cells)
    if options.quick:
        print("nothing written: --quick shows that it runs, and its numbers are no figures")
        return
    comparing.write("curve", options, rows, pair.params)
    if options.lora or options.json or options.device == "cuda":
        return
    found = accuracy()
    print("demo, FLOPs: " + ", ".join(f"{k} points 3u + {c:.1f}e" for k, c in found["beyond_3u_in_e"].items()))
    cells = [
        [f"{row['lr']:.0e}", row["observable"], *(f"{row[x]:.1e}" for x in ("error", "estimate"))]
        for row in found["rows"]
    ]
    comparing.show("demo: error of ΔF, relative", ("lr", "observable", "error", "its estimate"), cells)
    given = {"lrs": DEMO_LRS, "threads": options.threads}
    record.write(record.RESULTS / "curve-demo.json", "curve", given, describe_environment("cpu"), [found])


if __name__ == "__main__":
    main()
