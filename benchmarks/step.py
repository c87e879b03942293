"""The arithmetic of a step beside torch's own: `python benchmarks/step.py`, processor time as a ratio in one process.

The step is clipping, AdamW in closed form, Δθ and the checks, from a gradient that is there already; with movement it
also says how far the parameters went, what rounding lost and what did not move. Both are divided by
`torch.optim.AdamW.step(foreach=True)` on the same leaves, which clips nothing, checks nothing and keeps no Δθ.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from harness import record
from harness.timing import side_by_side

import funcprobe as fp
from funcprobe.measurement.move import movement
from funcprobe.results.environment import describe_environment
from funcprobe.training.rule import Rule
from funcprobe.types import Params

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def qwen2(width: int, layers: int, vocab: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a small Qwen2's leaves, two key and value heads of 64."""
    inner, heads = 4 * width, 128
    shapes: dict[str, tuple[int, ...]] = {"embed": (vocab, width), "norm": (width,)}
    for layer in range(layers):
        block = {"q": (width, width), "k": (heads, width), "v": (heads, width), "o": (width, width)}
        block |= {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
        block |= {"q_bias": (width,), "k_bias": (heads,), "v_bias": (heads,), "norm1": (width,), "norm2": (width,)}
        shapes |= {f"{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def main() -> None:
    """Measure both sets of leaves in both dtypes, print a table, and write the numbers."""
    options = _parser().parse_args()
    torch.set_num_threads(1)
    sets = {"qwen2": qwen2(256, 8, 4096), "one leaf": {"w": (4096, 2048)}}
    rows = [_row(name, shapes, dtype, options.rounds) for name, shapes in sets.items() for dtype in DTYPES]
    for row in rows:
        print(
            f"{row['leaves']:<10}{row['dtype']:<10}{row['entries']:>10,} entries  step {row['step']['cpu']:.1f}x  "
            f"with movement {row['with_movement']['cpu']:.1f}x"
        )
    record.write(options.json, "step", {"rounds": options.rounds, "threads": 1}, describe_environment("cpu"), rows)


def _row(name: str, shapes: dict[str, tuple[int, ...]], dtype: str, rounds: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)

    def drawn(scale: float) -> Params:
        return {n: (torch.randn(s, generator=random) * scale).to(DTYPES[dtype]) for n, s in shapes.items()}

    params, gradient = drawn(0.02), drawn(1e-3)
    leaves = [p.clone().requires_grad_() for p in params.values()]
    for leaf, g in zip(leaves, gradient.values(), strict=True):
        leaf.grad = g.clone()
    torch_adamw = torch.optim.AdamW(leaves, lr=1e-5, foreach=True)
    torch_adamw.step()
    rule = Rule(fp.adamw(1e-5), max_grad_norm=1.0)
    state = rule.apply(params, rule.optimizer.init(params), gradient).opt_state

    def with_movement() -> None:
        result = rule.apply(params, state, gradient)
        movement(params, result.params, result.delta)

    step = side_by_side(lambda: rule.apply(params, state, gradient), torch_adamw.step, rounds, "cpu")
    both = side_by_side(with_movement, torch_adamw.step, rounds, "cpu")
    entries = sum(p.numel() for p in params.values())
    return {
        "leaves": name,
        "count": len(shapes),
        "entries": entries,
        "dtype": dtype,
        "step": step._asdict(),
        "with_movement": both._asdict(),
        "target": 6.0,
        "met": step.cpu <= 6.0,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The arithmetic of a step beside torch.optim.AdamW.")
    add = parser.add_argument
    add("--rounds", type=int, default=9, help="timed rounds (default 9)")
    add("--quick", action="store_const", dest="rounds", const=1, help="one round: to see that it runs")
    add("--json", type=Path, default=record.HERE / "results" / "step-cpu.json")
    return parser


if __name__ == "__main__":
    main()
