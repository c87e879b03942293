"""|E| from 64 to 4,096 at a fixed microbatch: `python benchmarks/scaling.py [--device cuda]`.

What was expected: time proportional to |E| for both systems; memory flat but for what a token leaves, a few float64
scores (functional: two fields and their tangents, twice; stateful: two fields at θ and θ′ and the coefficients).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import comparing
import torch
from pair import Pair, build

SIZES = (64, 256, 1024, 4096)


def runs(pair: Pair) -> dict[str, Callable[[], Any]]:
    """Return the two runs by name."""
    return {"stateful": pair.stateful, "functional": pair.functional}


def main() -> None:
    """Measure, print and write."""
    parser = comparing.parser("Time and memory against the size of E.")
    parser.set_defaults(length=48, update=16)
    options = parser.parse_args()
    if options.peak:
        what, size = options.peak.split(":")
        options.peak, options.evaluation = what, int(size)
        comparing.serve_peak(options, runs)
        return
    torch.set_num_threads(options.threads)
    rows, report = [], []
    for size in SIZES:
        pair = build(comparing.shape_of(options)._replace(evaluation=size))
        seconds = {name: _seconds(run) for name, run in runs(pair).items()}
        peaks = {name: comparing.peak(options, f"{name}:{size}") for name in seconds}
        report.append({"evaluation": size, "seconds": seconds, "mib": peaks})
        cells = [f"{seconds[n]:.2f} s ({1e3 * seconds[n] / size:.1f} ms)" for n in ("stateful", "functional")]
        rows.append([f"{size:,}", *cells, *(f"{peaks[n]:.0f} MiB" for n in ("stateful", "functional"))])
    headings = ("|E|", "stateful (a sequence)", "functional (a sequence)", "stateful peak", "functional peak")
    comparing.show("one probe", headings, rows)
    comparing.write("scaling", options, report)


def _seconds(run: Callable[[], Any]) -> float:
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
