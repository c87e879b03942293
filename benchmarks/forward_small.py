"""What constants cost a small probe in forward mode, with the rules of `engine.constants` and without.

    python benchmarks/forward_small.py [--demo FOLDER]       the probe of `funcprobe demo`, one thread, one process

Without them an elementwise operation of a dual number and a constant goes torch's way: the constant gets a tangent of
zeros, and the shape of each product and sum with it is worked out in Python. And the second derivative of a function of
scores is taken along the line `s + e ṡ + ½ e² s̈`, made of such operations, in place of along the tangents as they are,
and the first derivative in a pass of its own. Both ways make the same numbers; the table says how near.

What was expected: tangents of zeros were 45 % of the processor time of that probe, so .6 of it is left.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from harness import comparing, record, timing
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import funcprobe as fp
from funcprobe import engine
from funcprobe.cli.config import load_config
from funcprobe.cli.demo_folder import prepare_demo
from funcprobe.cli.prepare import Prepared, prepared
from funcprobe.cli.progress import Bars
from funcprobe.engine import constants
from funcprobe.results.environment import describe_environment
from funcprobe.types import TokenScores

TARGET = 0.6


def along_a_line(f: engine.Functional, along: engine.Directional) -> Tensor:
    """Return `d²/dε² f(s(ε))` at 0 by two derivatives in ε: how it was taken before."""
    zero = torch.zeros_like(along.scores.logp[0, 0])
    one = torch.ones_like(zero)

    def curve(e: Tensor) -> TokenScores:
        return engine.each(lambda s, ds, dds: s + e * ds + 0.5 * e * e * dds, *along)

    def slope(e: Tensor) -> Tensor:
        return torch.func.jvp(lambda e: f(curve(e)), (e,), (one,))[1]

    return torch.func.jvp(slope, (zero,), (one,))[1]


def one_by_one(f: engine.Functional, along: engine.Directional) -> tuple[Tensor, Tensor]:
    """Return the first derivative, and the second in a pass of its own."""
    return engine.derivative(f, along)[1], along_a_line(f, along)


@contextmanager
def torchs_own() -> Iterator[None]:
    """Take derivatives without the rules, as they were taken before."""
    rules = mock.patch.object(constants, "_RULES", {})
    second = mock.patch.object(engine, "second_derivative", along_a_line)
    with rules, second, mock.patch.object(engine, "derivatives", one_by_one):
        yield


def work_of(ready: Prepared, observables: Any, options: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Return the passes that are timed, by name."""
    update, evaluation = ready.update, ready.evaluation
    policy, params, delta = update.policy, update.params, update.take().delta

    def probe(order: int) -> Any:
        return fp.probe(update, evaluation, observables, **{**options, "order": order})

    return {
        "probe, order 1": lambda: probe(1),
        "probe, order 2": lambda: probe(2),
        "forward pass over E, order 1": lambda: engine.directional(policy, params, delta, evaluation),
        "forward pass over E, order 2": lambda: engine.directional(policy, params, delta, evaluation, order=2),
    }


def before(run: Callable[[], Any]) -> Any:
    """Run it without the rules."""
    with torchs_own():
        return run()


def zeros(run: Callable[[], Any]) -> int:
    """Return how many tangents of zeros torch makes, a count that no other program disturbs."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    return sum(event.count for event in seen.key_averages() if event.key == "aten::_efficientzerotensor")


def furthest(made: Any, own: Any) -> float:
    """Return the largest difference between two results, relative to the value."""
    if isinstance(made, engine.Directional):
        pairs = [(engine.fields(a), engine.fields(b)) for a, b in zip(made, own, strict=True) if a is not None]
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    numbers = [
        (getattr(reading, name), getattr(own.outcome.readings[key], name))
        for key, reading in made.outcome.readings.items()
        for name in ("change", "first_order", "second_order")
    ]
    return max(abs(a - b) / abs(b) for a, b in numbers if a is not None and b)


def main() -> None:
    """Measure, print and write."""
    options = _parser().parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, Bars() as bars:
        config = load_config(prepare_demo(options.demo or folder, progress=bars))
        runs = work_of(prepared(config, bars), config.observables, config.options())
        rows = [measured(name, run, options.rounds) for name, run in runs.items()]
    table = [
        [
            row["name"],
            f"{row['cpu']:.3f}",
            f"{row['low']:.3f} .. {row['high']:.3f}",
            f"{row['zeros'][0]} / {row['zeros'][1]}",
            f"{row['off']:.1e}",
        ]
        for row in rows
    ]
    columns = ("what", "processor time", "wall, quartiles", "tangents of zeros", "largest difference")
    comparing.show("with the rules / without", columns, table)
    print(f"target of the probe: {TARGET}")
    record.write(options.json, "forward_small", {"rounds": options.rounds}, describe_environment("cpu"), rows)


def measured(name: str, run: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Return one row: both ways of one pass."""
    off = furthest(run(), before(run))
    taken = timing.side_by_side(run, lambda: before(run), rounds, "cpu", warm=True)
    return {"name": name, **taken._asdict(), "zeros": (zeros(run), zeros(lambda: before(run))), "off": off}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="What constants cost a small probe in forward mode.")
    add = parser.add_argument
    add("--demo", type=Path, help="the folder of a demo that is there, or where it is made (default: a temporary one)")
    add("--rounds", type=int, default=9)
    add("--quick", action="store_const", dest="rounds", const=2, help="two rounds: to see that it runs")
    add("--json", type=Path, default=record.HERE / "results" / "forward_small-cpu.json")
    return parser


if __name__ == "__main__":
    main()
