"""One probe in two processes beside one process: `python benchmarks/parallel.py [--processes 2]`, one thread each.

The rows of E and U are shared out; scores are gathered in float64 and the gradient is summed, once. What was expected:
passes take 1/N of the time, all else (the step, error bars, the gathering) is done by every process: 1.7 for two on a
model that is not tiny. Bytes: a sum over N processes
sends 2 (N − 1)/N of the gradient from each, a gathering (N − 1)/N of the scores; nothing else is sent but some counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Any

import torch
from harness import comparing, processes, record
from torch import distributed as dist
from transformers import Qwen2Config, Qwen2ForCausalLM

import funcprobe as fp
from funcprobe import tree
from funcprobe.parallel import world as worlds
from funcprobe.results.environment import describe_environment

HIDDEN, LAYERS, VOCABULARY, LENGTH = 256, 4, 4096, 64
ROWS = {"E": 64, "U": 64}


def rollouts(which: str, seed: int) -> fp.Rollouts:
    """Return E or U."""
    return processes.rollouts(ROWS[which], LENGTH, 16, VOCABULARY, seed)


class Told:
    """Seconds and bytes of the collectives of torch.distributed, as they are called."""

    def __init__(self) -> None:
        self.seconds, self.bytes = 0.0, 0
        for name, size in (("all_reduce", lambda x: x), ("all_gather", lambda _, own: own)):
            setattr(worlds.dist, name, self._timed(getattr(dist, name), size))

    def _timed(self, call: Any, size: Any) -> Any:
        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            done = call(*arguments, **options)
            self.seconds += time.perf_counter() - start
            sent = size(*arguments)
            self.bytes += sent.numel() * sent.element_size()
            return done

        return timed


def one(rounds: int) -> dict[str, Any]:
    """Return the wall seconds of probes in this process, which may be one of several."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    policy, params = fp.from_module(Qwen2ForCausalLM(config))
    optimizer = fp.adamw(1e-5)
    state, batch, evaluation = optimizer.init(params), rollouts("U", 1), rollouts("E", 2)

    def probed() -> float:
        update = fp.Update.from_step(fp.make_step(policy, fp.grpo(), optimizer, microbatch=8), params, state, batch)
        start = time.perf_counter()
        change = fp.probe(update, evaluation, microbatch=8, method="difference").change
        return time.perf_counter() - start if change == change else 0.0

    probed()
    told = Told()
    seconds = [probed() for _ in range(rounds)]
    gradient = sum(p.numel() * p.element_size() for p in params.values())
    return {
        "seconds": seconds,
        "collectives": told.seconds / rounds,
        "bytes": told.bytes / rounds,
        "least": gradient + 8 * evaluation.completion_mask.numel() * 6 / worlds.world().size,
        "entries": tree.size(params),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="A probe in several processes beside one.")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    processes.add_options(parser)
    options = parser.parse_args()
    if processes.answer(options, partial(one, options.rounds)):
        return
    rounds = ["--rounds", str(options.rounds)]
    (alone,), several = (processes.together(__file__, n, rounds) for n in (1, options.processes))
    slowest = max(statistics.median(each["seconds"]) for each in several)
    speedup = statistics.median(alone["seconds"]) / slowest
    first = several[0]
    cells = [
        [
            f"{options.processes}",
            f"{statistics.median(alone['seconds']):.2f} s",
            f"{slowest:.2f} s",
            f"{speedup:.2f}",
            f"{first['collectives'] / slowest:.0%}",
            f"{first['bytes'] / 1e6:.1f} MB",
            f"{first['least'] / 1e6:.1f} MB",
        ]
    ]
    headings = ("processes", "one", "each", "speed-up", "in collectives", "handed over", "least possible")
    comparing.show("a probe, rows shared out", headings, cells)
    rows = [{"processes": options.processes, "alone": alone, "several": several, "speedup": speedup}]
    environment = describe_environment(torch.device("cpu"), {}, None)
    record.write(record.RESULTS / "parallel-cpu.json", "parallel", {"rounds": options.rounds}, environment, rows)


if __name__ == "__main__":
    main()
