"""Forward mode against the length of the sequences: `python benchmarks/attention.py [--device cuda]`.

On the CPU whole passes of a small Qwen2 are timed: forward mode of order 1 with attention's own rule, and with torch's
math kernel a block of queries at a time, each over a scoring pass in the fused kernel. Three scoring passes are the
least that a model without attention would cost.

With `--device cuda` attention alone is timed, at the heads of models of 0.5 to 7 billion parameters: the fused forward,
the rule with its tangent, and the math kernel with its tangent, by blocks and whole. The rule has the 2 products of a
fused pass and 5 of its own, so 3.5 is the least there is; all else is traffic of memory. Lines before the table say how
far the rule and the math kernel are from float64.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional
from harness import record, timing, workload
from harness.workload import Size
from rich.console import Console
from rich.table import Table
from torch import Tensor

from funcprobe import engine
from funcprobe.engine import attention, kernels
from funcprobe.results.environment import describe_environment

LENGTHS = {"cpu": (256, 512, 1024, 2048), "cuda": (512, 1024, 2048, 4096, 8192)}


class Heads(NamedTuple):
    """The heads of one layer."""

    name: str
    queries: int
    keys: int
    features: int


HEADS = (Heads("0.5B", 14, 2, 64), Heads("7B, grouped", 28, 4, 128), Heads("8B", 32, 8, 128))
Move = tuple[Tensor, ...]


def main() -> None:
    """Measure, print and write."""
    options = _parser().parse_args()
    if options.blocks:
        queries, keys, power = options.blocks
        attention.BLOCKS[options.device] = (queries, keys, 2**power)
    lengths = [n for n in LENGTHS[options.device] if n <= options.longest]
    torch.set_num_threads(options.threads)
    rows = _on_accelerator(lengths, options.rounds) if options.device == "cuda" else _passes(lengths, options)
    asked = {
        **{name: x for name, x in vars(options).items() if name != "json"},
        "lengths": lengths,
        "blocks": attention.BLOCKS[options.device],
    }
    path = options.json or Path(__file__).parent / "results" / f"attention-{options.device}.json"
    record.write(path, "attention", asked, describe_environment(options.device), rows)
    print(f"written: {path.name}")


def _passes(lengths: list[int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time whole passes of a model on the CPU, as ratios to a fused scoring pass."""
    rows = []
    table = Table(title=f"times a fused scoring pass, {options.tokens} tokens, processor time")
    for heading in ("T", "own rule", "quartiles, wall", "math kernel", "quartiles, wall", "scoring, s"):
        table.add_column(heading, justify="right")
    for length in lengths:
        many = max(1, options.tokens // length)
        work = workload.build(Size(256, 4, 1024, length, many, many), "cpu")
        scoring = partial(workload.chunked, work)
        own = timing.side_by_side(partial(workload.forward_mode, work), scoring, options.rounds, "cpu")
        former = timing.side_by_side(partial(workload.forward_math, work), scoring, options.rounds, "cpu")
        rows.append({"length": length, "sequences": many, "own": own._asdict(), "math": former._asdict()})
        spread = [f"{r.low:.2f} .. {r.high:.2f}" for r in (own, former)]
        table.add_row(str(length), f"{own.cpu:.2f}", spread[0], f"{former.cpu:.2f}", spread[1], f"{own.seconds[1]:.2f}")
    Console().print(table)
    return rows


def _on_accelerator(lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    """Time attention alone on a GPU, and say how far it is from float64."""
    rows: list[dict[str, Any]] = []
    for causal in (True, False):
        rows += [_errors(dtype, causal) for dtype in (torch.bfloat16, torch.float32)]
        for row in rows[-2:]:
            print("relative error to float64:", row, flush=True)
    table = Table(title="attention, causal: ms")
    for heading in (
        "heads",
        "dtype",
        "B x T",
        "fused forward",
        "rule",
        "/ fused",
        "math by blocks",
        "/ rule",
        "math whole",
    ):
        table.add_column(heading, justify="right")
    for heads in HEADS:
        for dtype in (torch.bfloat16, torch.float32):
            for length in lengths:
                rows.append(_heads_row(heads, dtype, length, rounds))
                table.add_row(*_cells(rows[-1]))
    Console(width=140).print(table)
    return rows


def _heads_row(heads: Heads, dtype: torch.dtype, length: int, rounds: int) -> dict[str, Any]:
    """Return the milliseconds of every way at 8,192 tokens; None where memory ran out."""
    batch = max(1, 8192 // length)
    point, move = (_tensors(heads, batch, length, dtype, seed) for seed in (0, 1))
    options: dict[str, Any] = {"is_causal": True, "enable_gqa": True}
    ways: dict[str, Callable[[], Any]] = {
        "fused": lambda: torch.nn.functional.scaled_dot_product_attention(*point, **options),
        "rule": lambda: torch.func.jvp(partial(_rule, **options), point, move),
        "math_by_blocks": lambda: torch.func.jvp(partial(_math_by_blocks, **options), point, move),
        "math_whole": lambda: torch.func.jvp(partial(_math_whole, **options), point, move),
    }
    named = {"heads": heads.name, "dtype": str(dtype).removeprefix("torch."), "batch": batch, "length": length}
    return {**named, "ms": {name: _milliseconds(way, rounds) for name, way in ways.items()}}


def _cells(row: dict[str, Any]) -> list[str]:
    fused, rule, blocks, whole = row["ms"].values()

    def ratio(x: float | None, y: float | None) -> str:
        return f"{x / y:.2f}" if x and y else "-"

    def ms(x: float | None) -> str:
        return "out of memory" if x is None else f"{x:.2f}"

    where = [row["heads"], row["dtype"], f"{row['batch']} x {row['length']}"]
    return [*where, ms(fused), ms(rule), ratio(rule, fused), ms(blocks), ratio(blocks, rule), ms(whole)]


@torch.no_grad()
def _milliseconds(run: Callable[[], Any], rounds: int) -> float | None:
    """Return the median of several runs by the device's own clock; None where its memory ran out."""
    times = []
    try:
        for number in range(rounds + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times += [start.elapsed_time(end)] if number >= 2 else []  # the first runs choose kernels and take memory
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    return statistics.median(times)


@torch.no_grad()
def _errors(dtype: torch.dtype, causal: bool) -> dict[str, Any]:
    """Return the relative errors of values and tangents, by rule and math kernel, against float64 on the CPU.

    Without the causal mask it is a sliding window, given as a boolean mask.
    """
    heads, length = Heads("", 4, 2, 64), 1000
    far = (torch.arange(length)[:, None] - torch.arange(length)) > 300
    mask = torch.ones(length, length, dtype=torch.bool).tril() & ~far
    point, move = (_tensors(heads, 2, length, dtype, seed) for seed in (0, 1))

    def pushed(attend: Callable[..., Tensor], to: Callable[[Tensor], Tensor], where: str) -> Any:
        options = {"is_causal": True} if causal else {"attn_mask": mask.to(where)}
        run = partial(attend, enable_gqa=True, **options)
        return torch.func.jvp(run, tuple(map(to, point)), tuple(map(to, move)))

    truth = pushed(_math_whole, lambda x: x.cpu().double(), "cpu")
    row: dict[str, Any] = {"errors": "causal" if causal else "window", "dtype": str(dtype).removeprefix("torch.")}
    for name, attend in (("rule", _rule), ("math", _math_whole)):
        found = pushed(attend, lambda x: x, "cuda")
        errors = [float((x.cpu().double() - y).norm() / y.norm()) for x, y in zip(found, truth, strict=True)]
        row[name] = dict(zip(("value", "tangent"), errors, strict=True))
    return row


def _tensors(heads: Heads, batch: int, length: int, dtype: torch.dtype, seed: int) -> Move:
    """Return queries, keys and values, laid out as a model's projections leave them."""
    g = torch.Generator("cuda").manual_seed(seed)
    shapes = [(batch, length, n, heads.features) for n in (heads.queries, heads.keys, heads.keys)]
    return tuple(torch.randn(s, generator=g, device="cuda").to(dtype).transpose(1, 2) for s in shapes)


def _rule(*args: Tensor, **options: Any) -> Tensor:
    found = attention.attend(*args, **options)
    assert found is not None, "the rule does not hold here"
    return found


def _math_by_blocks(*args: Tensor, **options: Any) -> Tensor:
    with engine.math_attention():
        return kernels._by_query_blocks(*args, **options)


def _math_whole(*args: Tensor, **options: Any) -> Tensor:
    with engine.math_attention():
        return torch.nn.functional.scaled_dot_product_attention(*args, **options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Forward mode through attention, against the length.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4096, help="in a batch on the CPU (default 4096)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--longest", type=int, default=8192, help="leave out longer sequences")
    parser.add_argument("--blocks", type=int, nargs=3, metavar=("Q", "K", "LOG2"), help="sizes of the rule's blocks")
    parser.add_argument("--json", type=Path, help="where the numbers go (default results/attention-DEVICE.json)")
    return parser


if __name__ == "__main__":
    main()
