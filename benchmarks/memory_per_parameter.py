"""Peak memory of verbs above model and Adam state, bytes a parameter: `python benchmarks/memory_per_parameter.py`.

Each verb runs in a process of its own on a Qwen2 of few tokens, at two sizes, of which the largest leaf holds the same
share as in a 7B model; the slope between them is what a parameter costs, and all that does not grow with the model
drops out. Activations of the few tokens do not, as they grow with the layers: with half the width, where a layer has
a quarter of the parameters, a curve in bfloat16 read 10.6 for 9.3.

What was expected, in bytes (w of the parameters' dtype, 4 or 2): a probe has the gradient (w), then either Δθ as a
tangent (w, twice where the rounding row is told, as in bfloat16) or θ′ (w), and temporaries of one leaf; the backward
pass over two microbatches holds two gradients. A curve has a node's θ beside the tangent: w more. An attribution holds
∇F besides (w), and then the gradient of one row in place of a tangent. A comparison takes one update at a time, since
tangents of gigabytes do not share a pass.

After the table: what a full 7.6B model and a 32B LoRA take on one card, from these slopes and the configuration.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from harness import comparing, record
from harness.memory import _ALLOCATOR, clear_high_water, resident
from transformers import Qwen2Config, Qwen2ForCausalLM

import funcprobe as fp
from funcprobe import tree
from funcprobe.analysis import compare
from funcprobe.results.environment import describe_environment

#: (layers, vocabulary): the embedding is 7 % of either model.
SIZES = ((4, 2_600), (12, 7_800))
DTYPES = ("float32", "bfloat16")

#: Bytes a parameter above model and state, float32 and bfloat16, that were asked for.
ASKED = {"probe": (12, 8), "sweep": (16, 12), "curve": (16, 12), "attribute": (16, 12), "compare": (16, 12)}

#: What a card is asked to hold: parameters, those that are trained, and the bytes a parameter of model and state.
CARDS = {
    "7.6B, full, bfloat16, moments in bfloat16": (7.62e9, 7.62e9, 2, 4),
    "7.6B, full, bfloat16, moments and gradient offloaded": (7.62e9, 7.62e9, 2, -2),
    "32B, LoRA of 134 M, bfloat16 under float32": (32.8e9, 0.134e9, 2, 8),
}

LR = 1e-5


def model(layers: int, vocabulary: int, dtype: torch.dtype) -> Qwen2ForCausalLM:
    """Return a random Qwen2 whose head is not tied to its embedding."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config).to(dtype)


def rollouts(seed: int, count: int = 4) -> fp.Rollouts:
    """Return short random sequences, two a prompt."""
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 2_500, (count, 12), generator=drawn).tolist()
    prompts = [ids[i - i % 2][:4] for i in range(count)]
    rewards = [float(i % 2) for i in range(count)]
    return fp.rollouts_from_lists(prompts, [row[4:] for row in ids], temperature=1.0, rewards=rewards)


def verbs(policy: fp.Policy, params: fp.Params) -> dict[str, Callable[[], Any]]:
    """Return every verb on one update, with Adam state that was there before."""
    optimizer = fp.adamw(LR)
    state = optimizer.init(params)
    batch, evaluation = rollouts(1), rollouts(2)

    def update(objective: fp.Objective | None = None) -> fp.Update:
        step = fp.make_step(policy, objective or fp.grpo(), optimizer, microbatch=2)
        return fp.Update.from_step(step, params, state, batch)

    several = {"grpo": fp.grpo(), "dr_grpo": fp.dr_grpo(), "bonus": fp.entropy_bonus(fp.grpo())}
    given: Any = {"microbatch": 2, "bars": None}
    return {
        "probe": lambda: fp.probe(update(), evaluation, **given),
        "sweep": lambda: fp.sweep(update(), evaluation, [1e-7, 3e-7, 1e-6, 3e-6, 1e-5], **given),
        "curve": lambda: fp.curve(update(), evaluation, LR, **given),
        "attribute": lambda: fp.attribute(update(), evaluation, bars_of=(), **given),
        "compare": lambda: fp.compare({name: update(own) for name, own in several.items()}, evaluation, **given),
    }


def peak(verb: str, layers: int, vocabulary: int, dtype: str) -> tuple[int, int]:
    """Return the parameters, and the bytes that a verb needs above model and state at its peak."""
    tree.KEPT = compare.TOGETHER = 0  # as for a tree of gigabytes
    policy, params = fp.from_module(model(layers, vocabulary, getattr(torch, dtype)))
    run = verbs(policy, params)[verb]
    fp.slope(fp.Update.from_delta(policy, params, {n: 1e-3 * p for n, p in params.items()}), rollouts(3))
    gc.collect()
    clear_high_water()
    before = resident("VmRSS")
    run()
    return tree.size(params), resident("VmHWM") - before


def measured(verb: str, dtype: str) -> dict[str, Any]:
    """Return the bytes a parameter of a verb: the slope between two sizes, each in a process of its own."""
    found = []
    for layers, vocabulary in SIZES:
        command = [sys.executable, __file__, "--one", json.dumps([verb, layers, vocabulary, dtype])]
        environment = {**os.environ, **_ALLOCATOR}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"{verb} in {dtype} failed: {done.stderr.strip().splitlines()[-1:]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    (small, low), (large, high) = found
    slope = (high - low) / (large - small)
    return {"verb": verb, "dtype": dtype, "peaks": found, "bytes a parameter": slope, "commit": record.commit()}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Bytes a parameter of every verb.")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--verbs", nargs="+", default=list(ASKED), choices=list(ASKED))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(peak(*options.one)))
        return
    path = record.RESULTS / "memory_per_parameter.json"
    known = json.loads(path.read_text()) if path.exists() else {"rows": []}
    kept = [{"commit": known.get("commit"), **row} for row in known["rows"] if row["verb"] not in options.verbs]
    rows = [measured(verb, dtype) for verb in options.verbs for dtype in DTYPES]
    cost = {(row["verb"], row["dtype"]): row["bytes a parameter"] for row in rows}
    cells = [
        [verb, *(f"{cost[verb, dtype]:.1f} (asked {asked})" for dtype, asked in zip(DTYPES, ASKED[verb], strict=True))]
        for verb in options.verbs
    ]
    comparing.show("bytes a parameter above model and Adam state", ("verb", *DTYPES), cells)
    comparing.show("gigabytes on a card, activations apart", ("model", *options.verbs), _cards(options.verbs, cost))
    # verbs that were not measured now keep their rows, and the commit that these are of
    environment = describe_environment(torch.device("cpu"), {}, None)
    record.write(path, "memory_per_parameter", {}, environment, [*kept, *rows])


def _cards(chosen: list[str], cost: dict[tuple[str, str], float]) -> list[list[str]]:
    """Return what every model takes on a card: frozen and trained weights, moments, and what the verb adds."""
    rows = []
    for name, (entries, trained, width, moments) in CARDS.items():
        dtype = "bfloat16" if trained == entries else "float32"
        rest = entries * width + trained * (moments + (0 if trained == entries else 4))
        rows.append([name, *(f"{(rest + trained * cost[verb, dtype]) / 1e9:.1f}" for verb in chosen)])
    return rows


if __name__ == "__main__":
    main()
