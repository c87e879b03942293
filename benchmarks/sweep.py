"""K learning rates, stateful and functional: `python benchmarks/sweep.py [--model NAME] [--lora] [--device cuda]`.

The stateful way repeats its job K times; the functional one takes the gradient on U and the derivative on E once, and
a scoring pass for every learning rate. What was expected, with u = e: K(3u + 5e) against 3u + (3 + K)e, that is 7/8 at
K = 1, 14/64 = .22 at K = 8 and 22/128 = .17 at K = 16; with LoRA (4 + K)/6K: .25 at 8.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import comparing, timing
from harness.pair import Pair, build

COUNTS = (1, 2, 4, 8, 16)


def repeated(pair: Pair, lrs: list[float]) -> list[Any]:
    """Probe by mutation, once for every learning rate."""
    return [pair.stateful(lr) for lr in lrs]


def runs(pair: Pair, count: int) -> dict[str, Callable[[], Any]]:
    """Return the two runs by name."""
    lrs = [1e-5 * 1.3**k for k in range(count)]
    return {"stateful": partial(repeated, pair, lrs), "functional": partial(pair.swept, lrs)}


def main() -> None:
    """Measure, print and write."""
    parser = comparing.parser("K learning rates, stateful and functional.")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, metavar="K", help=f"default {COUNTS}")
    options = comparing.parsed(parser)
    torch.set_num_threads(options.threads)
    pair = build(comparing.shape_of(options))
    targets = {1: (0.87 if options.lora else 0.92, 1.0), 8: (0.29 if options.lora else 0.25, 0.35)}
    rows, report = [], []
    for count in options.counts:
        both = runs(pair, count)
        counted = {name: comparing.flops(run) for name, run in both.items()}
        warm = count != options.counts[0]
        taken = timing.side_by_side(both["functional"], both["stateful"], options.rounds, options.device, warm)
        ratio = counted["functional"] / counted["stateful"]
        pairs = zip((ratio, taken.median), targets.get(count, (None, None)), strict=True)
        cells = [f"{found:.3f}" + ("" if target is None else f" (≤ {target})") for found, target in pairs]
        behind = "{:.2f} / {:.2f} s".format(*taken.seconds)
        rows.append([str(count), *cells, f"{taken.low:.3f} .. {taken.high:.3f}", f"{taken.cpu:.3f}", behind])
        report.append({"learning_rates": count, "flops": counted, "flops_ratio": ratio, "time": taken._asdict()})
    comparing.show(
        "functional / stateful", ("learning rates", "FLOPs", "time", "quartiles", "processor time", "behind it"), rows
    )
    comparing.write("sweep", options, report, pair.params)


if __name__ == "__main__":
    main()
