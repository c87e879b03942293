"""|E| from 64 to 4,096 at a fixed microbatch: `python benchmarks/scaling.py [--lora] [--device cuda]`.

What was expected. Time proportional to |E| for both systems once U (here 16 sequences) is little beside E: a line
through all sizes, the time of one more sequence the same everywhere. Memory flat but for what a token leaves behind:
the functional probe keeps two float64 fields at θ, their tangents, and two fields at θ′, 48 bytes a completion token,
and as much again while microbatches are joined; the stateful one two fields at θ and at θ′ and two coefficients, 48
bytes too. With 32 completion tokens that is 1.5 to 3 KiB a sequence for either, 6 to 12 MiB at 4,096.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import comparing, timing
from harness.pair import Pair, build

SIZES = (64, 256, 1024, 4096)
SYSTEMS = ("functional", "stateful")


def runs(pair: Pair) -> dict[str, Callable[[], Any]]:
    """Return the two runs by name."""
    return {"stateful": pair.stateful, "functional": pair.functional}


def main() -> None:
    """Measure, print and write."""
    options = comparing.parsed(comparing.parser("Time and memory against the size of E.", length=48, batch=16))
    if options.peak:
        what, size = options.peak.split(":")
        options.peak, options.evaluation = what, int(size)
        comparing.serve_peak(options, runs)
        return
    torch.set_num_threads(options.threads)
    sizes, report = SIZES[:2] if options.quick else SIZES, []
    for size in sizes:
        pair = build(comparing.shape_of(options)._replace(evaluation=size))
        both = [runs(pair)[name] for name in SYSTEMS]
        rounds = max(1, options.rounds * sizes[1] // size) if size > sizes[1] else options.rounds
        taken = timing.side_by_side(*both, rounds, options.device, warm=size > sizes[0])
        peaks = {name: comparing.peak(options, f"{name}:{size}") for name in SYSTEMS}
        seconds = dict(zip(SYSTEMS, taken.seconds, strict=True))
        report.append({"evaluation": size, "rounds": rounds, "seconds": seconds, "mib": peaks, "time": taken._asdict()})
    _show(report)
    fits = {name: _fits(report, name) for name in SYSTEMS}
    for name, fit in fits.items():
        print("{0}: {milliseconds:.2f} ms and {kib:.2f} KiB for one more sequence of E".format(name, **fit))
    comparing.write("scaling", options, [{"sizes": report, "one more sequence": fits}], pair.params)


def _fits(report: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """Return what one more sequence of E costs, from the smallest to the largest size."""
    low, high = report[0], report[-1]
    more = high["evaluation"] - low["evaluation"]
    return {
        "milliseconds": 1e3 * (high["seconds"][name] - low["seconds"][name]) / more,
        "kib": 1024 * (high["mib"][name] - low["mib"][name]) / more,
    }


def _show(report: Sequence[dict[str, Any]]) -> None:
    """Print the table: seconds of a probe, milliseconds of one more sequence since the size above, and the peak."""
    rows: list[list[str]] = []
    for before, row in zip([None, *report], report, strict=False):
        cells = [f"{row['evaluation']:,}"]
        for name in SYSTEMS:
            slope = "" if before is None else f"{_fits([before, row], name)['milliseconds']:.2f} ms"
            cells += [f"{row['seconds'][name]:.2f} s", slope, f"{row['mib'][name]:.0f} MiB"]
        rows.append(cells)
    headings = [f"{name}{what}" for name in SYSTEMS for what in ("", ", one more", ", peak")]
    comparing.show("one probe", ("|E|", *headings), rows)


if __name__ == "__main__":
    main()
