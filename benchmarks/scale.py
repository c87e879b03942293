"""Large models on paper: what a probe takes on 1, 8 and 64 cards, by formulas held against models that fit here.

    python benchmarks/scale.py

FLOPs of a batch of B rows of T tokens, of which the last C are a completion, L layers, H heads of width d:

    linear     2 M B T + 2 h V B C    M: entries of the body's products that a token goes through; of a mixture the
                                      router, and k of its experts
    attention  4 L H d B T²           two products of whole matrices
    scores     e = linear + attention
    tangents   3 linear + (1 + 3v/2) attention     v: share of blocks of 128 queries in which something is seen
    gradient   3 linear + 7/2 attention            five products on the way back

A probe is a gradient on U, a pass with tangents and one of scores on E. Bytes of a card, with P parameters in w bytes:
weights P w; moments 2 P w; what a probe adds is the gradient and Δθ or θ′ in float32, or twice in bfloat16: 12 P or
8 P. (Activations are apart: they go with the microbatch, and have no formula here.) Both are held against counts and
peaks of small models, and a formula that is more than 5 % off is an error.

With replicated parameters every card holds everything and rows are shared out; with shards P is divided by the cards,
which is arithmetic alone: parameters are not run in shards. The models are made from their configurations on torch's
meta device, where nothing is allocated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from harness import comparing, record
from harness.counting import flops
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3MoeConfig

import funcprobe as fp
from funcprobe import engine
from funcprobe.results.environment import describe_environment

#: A formula may be off by so much.
LIMIT = 0.05

#: Bytes of a card, FLOP/s that a pass reaches on one in bfloat16 (40 % of an H100's peak), and the numbers of cards.
CARD, RATE, CARDS = 80e9, 0.4 * 989e12, (1, 8, 64)

#: Bytes that a probe adds to a parameter in each dtype, by the formula above.
ADDED = {"float32": 12, "bfloat16": 8}

#: Queries in a block of forward mode's attention.
BLOCK = 128

#: The batch that is told of: 256 rows on either side.
ROWS, LENGTH, COMPLETION = 256, 2048, 1792

LARGE = {
    "Qwen2.5-7B": Qwen2Config(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
    "Qwen2.5-32B": Qwen2Config(
        vocab_size=152_064,
        hidden_size=5120,
        intermediate_size=27_648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
    "Qwen3-235B-A22B": Qwen3MoeConfig(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        moe_intermediate_size=1536,
        num_hidden_layers=94,
        num_attention_heads=64,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
    ),
}

SMALL = {
    "dense": Qwen2Config(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    ),
    "dense, one long row": Qwen2Config(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    ),
    "mixture": Qwen3MoeConfig(
        vocab_size=1000,
        hidden_size=128,
        moe_intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    ),
}

#: Rows, prompt and completion tokens of each.
BATCHES = {"dense": (4, 16, 48), "dense, one long row": (1, 64, 960), "mixture": (4, 16, 48)}


def _backward(out: Sequence[int], query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    """Return the five products of attention's backward pass."""
    batch, heads, queries, width = query
    return 5 * 2 * batch * heads * queries * key[-2] * width


def _grouped(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    """Return the products of rows with the expert that each of them goes to, or the way back to the experts."""
    return 2 * a[-2] * a[-1] * b[-1]


#: Operations that torch does not count.
UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    torch.ops.aten._grouped_mm: _grouped,
}


class Counts(NamedTuple):
    """A model in numbers, from its meta copy."""

    parameters: int
    body: int  #: entries of the body's products that a token goes through
    readout: int  #: entries of the readout
    attention: int  #: L H d

    @classmethod
    def of(cls, config: Any) -> Counts:
        """Count a model that is built on the meta device."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        share = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_experts", 1)
        body = 0.0
        for name, p in model.named_parameters():
            if p.ndim < 2 or "embed_tokens" in name or "lm_head" in name:
                continue
            body += p.numel() * (share if ".experts." in name else 1)
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = config.num_hidden_layers * config.num_attention_heads * head
        readout = config.hidden_size * config.vocab_size
        return cls(sum(p.numel() for p in model.parameters()), round(body), readout, width)

    def passes(self, rows: int, length: int, completion: int) -> dict[str, float]:
        """Return the FLOPs of every pass over a batch."""
        tokens = rows * length
        linear = 2.0 * self.body * tokens + 2.0 * self.readout * rows * completion
        attention = 4.0 * self.attention * tokens * length
        seen = min(1.0, (1 + BLOCK / length) / 2)
        return {
            "scores": linear + attention,
            "tangents": 3 * linear + (1 + 1.5 * seen) * attention,
            "gradient": 3 * linear + 3.5 * attention,
        }


def checked(name: str) -> list[dict[str, Any]]:
    """Return formula against count for the passes of a small model.

    Raises:
        ValueError: If one is more than 5 % off.
    """
    config, (rows, prompt, completion) = SMALL[name], BATCHES[name]
    torch.manual_seed(0)
    module: nn.Module = AutoModelForCausalLM.from_config(config)
    policy, params = fp.from_module(module)
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(1, config.vocab_size, (rows, prompt + completion), generator=drawn).tolist()
    rollouts = fp.rollouts_from_lists([r[:prompt] for r in ids], [r[prompt:] for r in ids], temperature=1.0)
    rollouts = rollouts._replace(advantages=torch.ones(rows, dtype=torch.float64))
    expected = Counts.of(config).passes(rows, prompt + completion, completion)
    delta = {n: 1e-3 * torch.ones_like(p) for n, p in params.items()}
    objective = fp.grpo()
    prepared = objective.prepare(rollouts)
    passes = {
        "scores": lambda: engine.scores(policy, params, rollouts),
        "tangents": lambda: engine.directional(policy, params, delta, rollouts),
        "gradient": lambda: engine.gradient(objective, policy, params, prepared, separable=True),
    }
    found = []
    for what, run in passes.items():
        run()  # what is checked once is checked here
        counted = flops(run, UNCOUNTED)
        off = expected[what] / counted - 1
        found.append({"model": name, "pass": what, "formula": expected[what], "counted": counted, "off": off})
        if abs(off) > LIMIT:
            raise ValueError(f"The formula for '{what}' of '{name}' is {100 * off:+.1f} % off.")
    return found


def of_bytes() -> list[dict[str, Any]]:
    """Return formula against measured peaks, bytes a parameter, as `memory_per_parameter.py` left them.

    Raises:
        ValueError: If one is more than 5 % off.
    """
    kept = json.loads((record.RESULTS / "memory_per_parameter.json").read_text(encoding="utf-8"))["rows"]
    found = []
    for row in kept:
        if row["verb"] != "probe":
            continue
        off = ADDED[row["dtype"]] / row["bytes a parameter"] - 1
        found.append(
            {"dtype": row["dtype"], "formula": ADDED[row["dtype"]], "measured": row["bytes a parameter"], "off": off}
        )
        if abs(off) > LIMIT:
            raise ValueError(f"The formula for bytes in {row['dtype']} is {100 * off:+.1f} % off.")
    return found


def large(name: str) -> list[dict[str, Any]]:
    """Return what a probe of a model in bfloat16 takes, for every number of cards, replicated and in shards."""
    counts, rows = Counts.of(LARGE[name]), []
    passes = counts.passes(ROWS, LENGTH, COMPLETION)
    probe = sum(passes.values())
    for cards in CARDS:
        for way in ("replicated", "in shards"):
            if way == "in shards" and cards == 1:
                continue
            own = counts.parameters / (cards if way == "in shards" else 1)
            places = {"weights": 2 * own, "moments": 4 * own, "probe": ADDED["bfloat16"] * own}
            offloaded = (
                places["weights"] + places["probe"] - 2 * own
            )  # moments in their file, the gradient off the card
            rows.append(
                {
                    "model": name,
                    "parameters": counts.parameters,
                    "a token goes through": counts.body + counts.readout,
                    "cards": cards,
                    "way": way,
                    "bytes": places,
                    "fits": sum(places.values()) < CARD,
                    "fits offloaded": offloaded < CARD,
                    "flops": {**passes, "probe": probe},
                    "seconds": probe / (RATE * cards),
                }
            )
    return rows


def main() -> None:
    torch.set_num_threads(1)
    counted = [row for name in SMALL for row in checked(name)]
    cells = [[r["model"], r["pass"], f"{r['counted']:.3e}", f"{100 * r['off']:+.1f} %"] for r in counted]
    comparing.show("FLOPs: formula against count", ("model", "pass", "counted", "formula is off"), cells)
    measured = of_bytes()
    cells = [[r["dtype"], f"{r['measured']:.2f}", str(r["formula"]), f"{100 * r['off']:+.1f} %"] for r in measured]
    comparing.show("bytes a parameter that a probe adds", ("dtype", "measured", "formula", "off"), cells)
    rows = [row for name in LARGE for row in large(name)]
    cells = [
        [
            row["model"],
            f"{row['cards']} {row['way']}",
            *(f"{row['bytes'][place] / 1e9:.0f}" for place in ("weights", "moments", "probe")),
            "yes" if row["fits"] else "offloaded" if row["fits offloaded"] else "no",
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    title = (
        f"a probe in bfloat16, {ROWS} + {ROWS} rows of {LENGTH} tokens, at {RATE / 1e12:.0f} TFLOP/s a card: GB and s"
    )
    comparing.show(title, ("model", "cards", "weights", "moments", "probe", "fits 80 GB", "seconds"), cells)
    environment = describe_environment(torch.device("cpu"), {}, None)
    record.write(record.RESULTS / "scale.json", "scale", {}, environment, [*counted, *measured, *rows])


if __name__ == "__main__":
    main()
