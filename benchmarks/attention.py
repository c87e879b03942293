"""Forward mode against the length of the sequences: `python benchmarks/attention.py [--device cuda]`.

On the CPU whole passes of a small Qwen2 are timed: forward mode of order 1 with attention's own rule, and with torch's
math kernel a block of queries at a time, each over a scoring pass in the fused kernel. Three scoring passes are the
least that a model without attention would cost.

With `--device cuda` attention alone is timed, at the heads of models of 0.5 to 8 billion parameters: the fused forward,
the rule with its tangent, the rule with its tangent by blocks of products, and the math kernel with its tangent, by
blocks and whole. In bfloat16 the rule has the 2 products of a fused pass and 6 of its own, so it takes 4 times as long
where all products are equally fast. Rows with a mask are padded sequences, as a batch of rollouts has them. Lines
before the table say how far the rule and the math kernel are from float64. Then whole passes of a model in bfloat16.
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
from funcprobe.engine import attention, attention_by_blocks, attention_choice, kernels
from funcprobe.results.environment import describe_environment
from funcprobe.types import Rollouts

LENGTHS = {"cpu": (256, 512, 1024, 2048), "cuda": (512, 1024, 2048, 4096, 8192)}


#: Lengths of the passes of a whole model on a GPU, and the longest sequences to which a mask is given.
PASSES, LONGEST_MASK = (512, 2048, 8192), 4096


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
        attention_by_blocks.BLOCKS[options.device] = (queries, keys, 2**power)
    lengths = [n for n in LENGTHS[options.device] if n <= options.longest]
    torch.set_num_threads(options.threads)
    rows = _on_accelerator(lengths, options.rounds) if options.device == "cuda" else _passes(lengths, options)
    rows += _passes_on_accelerator(options) if options.device == "cuda" else []
    asked = {
        **{name: x for name, x in vars(options).items() if name != "json"},
        "lengths": lengths,
        "blocks": attention_by_blocks.BLOCKS[options.device],
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
    table = Table(title="attention: ms")
    headings = ("heads", "dtype", "mask", "B x T", "fused forward", "rule", "/ fused", "by blocks", "/ rule")
    for heading in (*headings, "math by blocks", "math whole"):
        table.add_column(heading, justify="right")
    for heads in HEADS:
        for dtype, padded in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)):
            for length in lengths:
                if not padded or length <= LONGEST_MASK:
                    rows.append(_heads_row(heads, dtype, length, rounds, padded))
                    table.add_row(*_cells(rows[-1]))
    Console(width=140).print(table)
    return rows


def _heads_row(heads: Heads, dtype: torch.dtype, length: int, rounds: int, padded: bool) -> dict[str, Any]:
    """Return the milliseconds of every way at 8,192 tokens; None where memory ran out."""
    batch = max(1, 8192 // length)
    point, move = (_tensors(heads, batch, length, dtype, seed) for seed in (0, 1))
    options: dict[str, Any] = {"enable_gqa": True}
    options |= {"attn_mask": _padding(batch, length)} if padded else {"is_causal": True}
    ways: dict[str, Callable[[], Any]] = {
        "fused": partial(_fused, *point, **options),
        "rule": lambda: torch.func.jvp(partial(_rule, **options), point, move),
        "rule_by_blocks": lambda: torch.func.jvp(partial(_rule_by_blocks, **options), point, move),
        "math_by_blocks": lambda: torch.func.jvp(partial(_math_by_blocks, **options), point, move),
        "math_whole": lambda: torch.func.jvp(partial(_math_whole, **options), point, move),
    }
    named = {"heads": heads.name, "dtype": str(dtype).removeprefix("torch."), "batch": batch, "length": length}
    named["mask"] = "padded" if padded else "causal"
    return {**named, "ms": {name: _milliseconds(way, rounds) for name, way in ways.items()}}


def _cells(row: dict[str, Any]) -> list[str]:
    fused, rule, blocks, math_blocks, whole = row["ms"].values()

    def ratio(x: float | None, y: float | None) -> str:
        return f"{x / y:.2f}" if x and y else "-"

    def ms(x: float | None) -> str:
        return "out of memory" if x is None else f"{x:.2f}"

    where = [row["heads"], row["dtype"], row["mask"], f"{row['batch']} x {row['length']}"]
    own = [ms(fused), ms(rule), ratio(rule, fused), ms(blocks), ratio(blocks, rule)]
    return [*where, *own, ms(math_blocks), ms(whole)]


def _passes_on_accelerator(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time whole passes of a model in bfloat16 on a GPU, as ratios to a fused scoring pass; rows of two lengths."""
    rows = []
    table = Table(title="times a fused scoring pass, bfloat16, 16,384 tokens")
    for heading in ("T", "rule", "quartiles", "rule by blocks", "quartiles", "scoring, s"):
        table.add_column(heading, justify="right")
    for length in PASSES:
        many = 16384 // length
        work = workload.build(Size(1024, 24, 32768, length, many, many), "cuda", torch.bfloat16)
        work = work._replace(rollouts=_shortened(work.rollouts))
        scoring, forward = partial(workload.chunked, work), partial(workload.forward_mode, work)
        own = timing.side_by_side(forward, scoring, options.rounds, "cuda")
        former = timing.side_by_side(partial(_without_kernels, forward), scoring, options.rounds, "cuda")
        row = {"passes": length, "sequences": many, "own": own._asdict(), "by_blocks": former._asdict()}
        rows.append({**row, "parameters": sum(p.numel() for p in work.params.values())})
        spread = [f"{r.low:.2f} .. {r.high:.2f}" for r in (own, former)]
        cells = (f"{own.median:.2f}", spread[0], f"{former.median:.2f}", spread[1], f"{own.seconds[1]:.3f}")
        table.add_row(str(length), *cells)
    Console(width=140).print(table)
    return rows


def _shortened(rollouts: Rollouts) -> Rollouts:
    """Return rollouts of which every second one ends after three quarters: a batch with padding, as most are."""
    mask = rollouts.completion_mask.clone()
    mask[::2, -(rollouts.ids.shape[1] // 4) :] = False
    attention_mask = rollouts.attention_mask.clone()
    attention_mask[::2, -(rollouts.ids.shape[1] // 4) :] = False
    return rollouts._replace(completion_mask=mask, attention_mask=attention_mask)


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


def _fused(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    if "attn_mask" in options:  # with a mask no fused kernel takes groups: a model repeats its keys
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        options["enable_gqa"] = False
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)


def _rule(*args: Tensor, **options: Any) -> Tensor:
    found = attention.attend(*args, **options)
    assert found is not None, "the rule does not hold here"
    return found


def _rule_by_blocks(*args: Tensor, **options: Any) -> Tensor:
    return _without_kernels(partial(_rule, *args, **options))


def _without_kernels(run: Callable[[], Any]) -> Any:
    """Run with the tangents of attention made by blocks of products."""
    own, attention_choice._kernels = attention_choice._kernels, lambda at, moving: None
    try:
        return run()
    finally:
        attention_choice._kernels = own


def _padding(batch: int, length: int) -> Tensor:
    """Return the mask of a batch in which every second sequence ends after three quarters: causal, keys hidden."""
    seen = torch.ones(length, length, dtype=torch.bool, device="cuda").tril().repeat(batch, 1, 1, 1)
    seen[::2, :, :, length - length // 4 :] = False
    return seen


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
