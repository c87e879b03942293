"""What the engine costs, as ratios to plain passes measured beside it: `make bench`, or `--device cuda` on a GPU.

What was expected of each, and why, before it was measured:

* reverse over a plain forward and backward: 1.02. The graph is the same one (`vjp` pulled back with
  `create_graph=False`); on top come the entropy's share of it, pulled back with zeros, and the scores in float64.
* forward mode over three scoring passes: 1.15. A product has two tangent terms, so 3.0 passes of matrix products;
  tangents of elementwise operations come as several unfused kernels each.
* peak memory: forward 2.1 times scoring (every tensor and its tangent, and a temporary), 0.3 to 0.45 times reverse,
  which grows with depth while the other two do not. Scoring at V = 151,936: 5 to 7 times below materialised logits.
* scoring over TRL's `selective_log_softmax` and `entropy_from_logits` on logits of a microbatch: time about 1, since
  both run the model once and three passes over logits; memory far below, since those of a chunk are made at a time.
* FLOPs of a probe: 3u for the gradient on U, 3.15e for scores and tangents at θ, e for the scores at θ′, so 0.985 of
  the target at u = 2e. (Counted: 3u + 4e, forward mode being 3 passes exactly.) One more forward-mode pass where
  rounding is worth a row of its own; and one more readout on U where its logits exceed the budget and are made again.

A missed target is said in the table and never fails the run. README.md beside this file has the numbers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import counting, memory, record, timing, workload
from rich.console import Console
from rich.table import Table

from funcprobe import engine, tree
from funcprobe.results.environment import describe_environment

HERE = Path(__file__).parent


class Row(NamedTuple):
    """One line of the table."""

    group: str  #: what `--only` selects
    what: str
    measured: float
    low: float | None  #: quartiles over rounds, where there are rounds
    high: float | None
    target: float | None  #: an upper bound, or a lower one if `at_least`; None where the row only reports
    at_least: bool
    detail: dict[str, Any]

    @property
    def met(self) -> bool | None:
        """Whether the target holds; None without one."""
        if self.target is None:
            return None
        return self.measured >= self.target if self.at_least else self.measured <= self.target


class Options(NamedTuple):
    """What was asked for."""

    device: str
    rounds: int
    quick: bool
    threads: int


def reverse(options: Options) -> Iterator[Row]:
    """Time the engine's gradient against a plain forward and backward per microbatch."""
    work = workload.build(workload.for_time(options.device, options.quick), options.device)
    passes = partial(workload.reverse_mode, work), partial(workload.plain_backward, work)
    found = timing.side_by_side(*passes, options.rounds, options.device)
    yield _timed("reverse", "time: reverse engine / plain forward + backward", found, 1.05, work)


def forward(options: Options) -> Iterator[Row]:
    """Time forward mode against three scoring passes under the same attention kernel."""
    work = workload.build(workload.for_time(options.device, options.quick), options.device)
    passes = partial(workload.forward_mode, work), partial(_thrice, workload.scoring, work)
    found = timing.side_by_side(*passes, options.rounds, options.device)
    yield _timed("forward", "time: forward engine / three scoring passes", found, 1.3, work)


def peak_memory(options: Options) -> Iterator[Row]:
    """Compare the peaks of scoring, forward mode and reverse mode above their base."""
    size = workload.for_memory(options.device, options.quick)
    mib = {name: _peak(name, size, options) for name in ("scoring", "forward_mode", "reverse_mode")}
    detail = {"mib": mib, "size": size.__dict__}
    over_scoring, over_reverse = (mib["forward_mode"] / mib[other] for other in ("scoring", "reverse_mode"))
    yield Row("memory", "peak memory: forward / scoring (math kernel)", over_scoring, None, None, 2.3, False, detail)
    yield Row("memory", "peak memory: forward / reverse", over_reverse, None, None, 0.5, False, detail)


def vocabulary(options: Options) -> Iterator[Row]:
    """Compare scoring under 151,936 logits a token with making them all."""
    size = workload.wide(options.device, options.quick)
    mib = {name: _peak(name, size, options) for name in ("materialised", "chunked")}
    detail = {"mib": mib, "size": size.__dict__}
    what = "peak memory, V = 151,936: all logits / scoring"
    yield Row("vocabulary", what, mib["materialised"] / mib["chunked"], None, None, 5.0, True, detail)


def trl(options: Options) -> Iterator[Row]:
    """Compare scoring with TRL's log-probabilities and entropies, which are the same numbers."""
    for size in (workload.for_time(options.device, options.quick), workload.wide(options.device, options.quick)):
        work = workload.build(size, options.device)
        ours, theirs = workload.chunked(work), workload.trl_scoring(work)
        off = max(float((a - b).abs().max()) for a, b in zip(ours[:2], theirs[:2], strict=True))
        assert off < 1e-4, off  # float32 sums over the vocabulary
        passes = partial(workload.chunked, work), partial(workload.trl_scoring, work)
        found = timing.side_by_side(*passes, options.rounds, options.device)
        yield _timed("trl", f"time, V = {size.vocabulary:,}: scoring / TRL's", found, None, work)
        mib = {name: _peak(name, size, options) for name in ("trl_scoring", "chunked")}
        detail = {"mib": mib, "size": size.__dict__}
        what = f"peak memory, V = {size.vocabulary:,}: scoring / TRL's"
        yield Row("trl", what, mib["chunked"] / mib["trl_scoring"], None, None, None, False, detail)


def flops(options: Options) -> Iterator[Row]:
    """Count the FLOPs of whole probes; attention in the math kernel but in forward mode."""
    few = replace(
        workload.for_time(options.device), length=64, sequences=4, microbatch=2
    )  # counts are exact at any size
    work = workload.build(few, options.device)
    yield from _probe_flops(work, 1e-4, "FLOPs of a probe", 1.0)
    yield from _probe_flops(work, 1e-7, "same, lr 1e-7: with the pass for the rounding row", None)
    few = replace(workload.wide(options.device), length=128, sequences=2, microbatch=2)  # 224 tokens: over the budget
    head = workload.build(few, options.device)
    yield from _probe_flops(head, 1e-4, "same, V = 151,936: readout on U made again", None)


GROUPS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "reverse": reverse,
    "forward": forward,
    "memory": peak_memory,
    "vocabulary": vocabulary,
    "trl": trl,
    "flops": flops,
}


def main(arguments: list[str] | None = None) -> None:
    """Measure what was asked for, print the table and write the JSON."""
    asked = _parser().parse_args(arguments)
    torch.set_num_threads(asked.threads)
    options = Options(asked.device, asked.rounds or (3 if asked.quick else 7), asked.quick, asked.threads)
    console, rows = Console(), []
    console.width = max(console.width, 150)
    for name in asked.only or GROUPS:
        with console.status(f"measuring {name} ..."):
            rows += list(GROUPS[name](options))
    console.print(_table(rows, options))
    path = asked.json or HERE / "results" / f"engine-{asked.device}{'-quick' if asked.quick else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_report(rows, options), indent=2) + "\n", encoding="utf-8")


def _thrice(run: Callable[[workload.Workload], Any], work: workload.Workload) -> None:
    for _ in range(3):
        run(work)


def _peak(name: str, size: workload.Size, options: Options) -> float:
    return memory.peak_in_subprocess(name, size, options.device, options.threads)


def _timed(group: str, what: str, found: timing.Ratio, target: float | None, work: workload.Workload) -> Row:
    detail = {
        "cpu_time_ratio": found.cpu,
        "seconds": found.seconds,
        "parameters": tree.size(work.params),
        "size": work.size.__dict__,
    }
    return Row(group, what, found.median, found.low, found.high, target, False, detail)


def _probe_flops(work: workload.Workload, lr: float, what: str, target: float | None) -> Iterator[Row]:
    """Yield the count over 3u + 4.3e, u and e being one scoring pass over U and over E."""
    held_out = workload.evaluation(work)
    with engine.math_attention():
        u = counting.flops(partial(workload.scoring, work))
        e = counting.flops(lambda: engine.scores(work.policy, work.params, held_out, microbatch=work.size.microbatch))
        whole = counting.flops(partial(workload.whole_probe, work, lr))
    in_e = (whole - 3 * u) / e
    detail = {"u": u, "e": e, "probe": whole, "lr": lr, "size": work.size.__dict__, "in_passes": f"3u + {in_e:.4f}e"}
    yield Row("flops", f"{what} / (3u + 4.3e)", whole / (3 * u + 4.3 * e), None, None, target, False, detail)


def _table(rows: list[Row], options: Options) -> Table:
    title = f"engine on {options.device}, {options.threads} threads, {options.rounds} rounds"
    table = Table(title=title, title_justify="left")
    for heading in ("what", "measured", "quartiles", "target", "met", "behind it"):
        table.add_column(heading, justify="left" if heading in ("what", "behind it") else "right")
    for row in rows:
        spread = "" if row.low is None else f"{row.low:.3f} .. {row.high:.3f}"
        target = "" if row.target is None else f"{'≥' if row.at_least else '≤'} {row.target:g}"
        met = {None: "", True: "yes", False: "[bold]NO[/bold]"}[row.met]
        table.add_row(row.what, f"{row.measured:.3f}", spread, target, met, _behind(row.detail))
    return table


def _behind(detail: dict[str, Any]) -> str:
    if "mib" in detail:
        return ", ".join(f"{name} {mib:.0f} MiB" for name, mib in detail["mib"].items())
    if "seconds" in detail:
        return "{:.2f} s / {:.2f} s, ".format(*detail["seconds"]) + f"CPU time {detail['cpu_time_ratio']:.3f}"
    return detail["in_passes"]


def _report(rows: list[Row], options: Options) -> dict[str, Any]:
    return {
        "benchmark": "engine",
        "options": options._asdict(),
        "commit": record.commit(),
        "environment": describe_environment(options.device),
        "rows": [{**row._asdict(), "met": row.met} for row in rows],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The engine's costs, as ratios to plain passes measured beside it.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--rounds", type=int, help="timed rounds (default 7, quick 3)")
    parser.add_argument("--quick", action="store_true", help="smaller batches: to see that it runs, not for figures")
    parser.add_argument("--only", nargs="+", choices=tuple(GROUPS), help="measure these alone")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the numbers go (default benchmarks/results/)")
    return parser


if __name__ == "__main__":
    main()
