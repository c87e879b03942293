"""K learning rates, stateful and functional: `python benchmarks/sweep.py [--model NAME] [--lora] [--device cuda]`.

The stateful way repeats its job K times; the functional one takes the gradient on U and the derivative on E once, and
a scoring pass for every learning rate. What was expected, with u = e: K(3u + 5e) against 3u + (3 + K)e, that is 7/8 at
K = 1, 14/64 = .22 at K = 8 and 22/128 = .17 at K = 16; with LoRA (4 + K)/6K: .25 at 8.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import comparing
import timing
import torch
from pair import Pair, build

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
    options = comparing.asked("K learning rates, stateful and functional.")
    torch.set_num_threads(options.threads)
    pair = build(comparing.shape_of(options))
    targets = {1: (0.87 if options.lora else 0.92, 1.0), 8: (0.29 if options.lora else 0.25, 0.35)}
    rows, report = [], []
    for count in COUNTS:
        both = runs(pair, count)
        counted = {name: comparing.flops(run) for name, run in both.items()}
        rounds = max(1, options.rounds * 2 // (count + 1))
        taken = timing.side_by_side(both["functional"], both["stateful"], rounds, options.device)
        ratio = counted["functional"] / counted["stateful"]
        aims = targets.get(count, (None, None))
        cells = [f"{x:.3f}" + ("" if aim is None else f" (≤ {aim})") for x, aim in zip((ratio, taken.median), aims)]  # noqa: B905
        rows.append([str(count), *cells, f"{taken.seconds[0]:.2f} / {taken.seconds[1]:.2f} s"])
        report.append({"learning_rates": count, "flops": counted, "flops_ratio": ratio, "time": taken._asdict()})
    comparing.show("functional / stateful", ("learning rates", "FLOPs", "time", "behind it"), rows)
    comparing.write("sweep", options, report, pair.params)


if __name__ == "__main__":
    main()
