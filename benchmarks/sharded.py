"""Memory and bytes of a probe on parts of leaves: `python benchmarks/sharded.py [--processes 1,2,3]`, one thread each.

Every process holds an N-th of parameters and Adam state, and gathers a layer's leaves while the layer runs. What was
expected: resident bytes fall as 1/N. A pass needs beside them activations, which do not depend on N; the whole leaves
of one layer, and of the head; in forward mode the same of tangents, in reverse mode of gradients; and a gradient takes
an N-th of what it took. Sent are, a pass over N processes, (N − 1)/N of all leaves once for values, twice for forward
mode, and in reverse mode three times, once of them as gradients: for every microbatch anew.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import comparing, memory, processes, record
from torch import distributed as dist
from transformers import Qwen2Config, Qwen2ForCausalLM

import funcprobe as fp
from funcprobe import engine, tree
from funcprobe.parallel.world import world
from funcprobe.results.environment import describe_environment

HIDDEN, LAYERS, VOCABULARY, LENGTH = 384, 12, 4096, 32
ROWS, MICROBATCH = 12, 2


#: Freed blocks go back to the system at once, so that the resident set follows the living tensors.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def rollouts(seed: int) -> fp.Rollouts:
    """Return E or U."""
    return processes.rollouts(ROWS, LENGTH, 8, VOCABULARY, seed)


class Sent:
    """Bytes that this process sends to others, by the collectives of a ring, as they are called."""

    def __init__(self) -> None:
        self.bytes = 0.0
        others, size = world().size - 1, world().size
        shares = {
            "all_gather": lambda _, own: others * own.nbytes,
            "reduce_scatter": lambda own, _: others * own.nbytes,
            "all_reduce": lambda own, **_: 2 * others / size * own.nbytes,
        }
        for name, share in shares.items():
            setattr(dist, name, self._counted(getattr(dist, name), share))

    def _counted(self, call: Any, share: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.bytes += share(*arguments)
            return call(*arguments, **options)

        return counted


def held(params: dict[str, torch.Tensor], state: Any) -> dict[str, int]:
    """Return the bytes of parameters and optimizer state that this process holds."""
    moments = [x for entries in state.values() for x in entries.values()]
    return {"parameters": sum(p.nbytes for p in params.values()), "state": sum(x.nbytes for x in moments)}


def one() -> dict[str, Any]:
    """Return what this process holds, and the peak, the bytes and the seconds of every pass."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=3,
    )
    policy, params = fp.from_module(Qwen2ForCausalLM(config))
    optimizer = fp.adamw(1e-5)
    state, largest = optimizer.init(params), _largest(params)
    if world().size > 1:
        policy, params = fp.shard(policy, params)
        state = fp.shard_state(state, params)
    E, step = rollouts(2), fp.make_step(policy, fp.grpo(), optimizer, microbatch=MICROBATCH)
    update = fp.Update.from_step(step, params, state, rollouts(1))
    delta = tree.scale(1e-5, params)
    passes: dict[str, Callable[[], Any]] = {
        "values": lambda: engine.scores(policy, params, E, microbatch=MICROBATCH),
        "forward mode": lambda: engine.directional(policy, params, delta, E, microbatch=MICROBATCH),
        "reverse mode": lambda: step.gradient(params, rollouts(1)),
        "probe": lambda: fp.probe(update, E, microbatch=MICROBATCH, method="difference").change,
    }
    sent, found = Sent(), {}
    for name, run in passes.items():
        if name != "probe":
            run()  # the first time looks for kernels, and holds tangents against differences
        found[name] = _measured(run, sent)
    return {**held(params, state), "entries": tree.size(params), **largest, "passes": found}


def _measured(run: Callable[[], Any], sent: Sent) -> dict[str, float]:
    gc.collect()
    memory.clear_high_water()
    before, sent.bytes, start = memory.resident("VmRSS"), 0.0, time.perf_counter()
    result = run()
    seconds, peak = time.perf_counter() - start, memory.resident("VmHWM") - before
    return {
        "peak": peak,
        "sent": sent.bytes,
        "seconds": seconds,
        "change": result if isinstance(result, float) else 0.0,
    }


def _largest(params: dict[str, torch.Tensor]) -> dict[str, int]:
    """Return the bytes of one layer and of the head."""
    layer = sum(p.nbytes for name, p in params.items() if ".layers.0." in name)
    return {"layer": layer, "head": max(p.nbytes for name, p in params.items() if "embed" in name)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="A probe on parts of leaves in several processes.")
    parser.add_argument("--processes", default="1,2,3")
    processes.add_options(parser)
    options = parser.parse_args()
    if processes.answer(options, one):
        return
    rows = [
        {"processes": int(n), "each": processes.together(__file__, int(n), **GIVEN_BACK)}
        for n in options.processes.split(",")
    ]
    cells = []
    for row in rows:
        most = max(row["each"], key=lambda own: own["parameters"])
        peaks = [max(own["passes"][name]["peak"] for own in row["each"]) for name in most["passes"]]
        told = [most["parameters"], most["state"], *peaks]
        sent = [f"{most['passes'][name]['sent'] / 1e6:.0f}" for name in most["passes"]]
        cells.append([str(row["processes"]), *(f"{x / 1e6:.0f}" for x in told), " / ".join(sent)])
    passes = list(rows[0]["each"][0]["passes"])
    comparing.show("MB a process", ("processes", "θ", "moments", *passes, "sent"), cells)
    record.write(
        record.RESULTS / "sharded.json",
        "sharded",
        {"processes": options.processes},
        describe_environment(torch.device("cpu"), {}, None),
        rows,
    )


if __name__ == "__main__":
    main()
