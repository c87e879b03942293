"""One probe, stateful and functional: `python benchmarks/one_step.py [--model NAME] [--lora] [--device cuda]`.

Both take one AdamW step (dr_grpo) on U and measure and predict the entropy change on E, by difference. FLOPs are exact;
times alternate in one process; peaks come from a process each.

What was expected, in forward passes with u = e: the stateful way 3u + 5e (an entropy pass at θ, one at θ′, forward and
backward over E), the functional one 3u + 4e (scores and tangents at θ in one pass, scores at θ′): 7/8 of it. With LoRA
backward passes and tangents cost one pass less each: (2u + 3e)/(2u + 4e) = 5/6, plus what the adapters themselves cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import comparing, timing
from harness.pair import Pair, build


def runs(pair: Pair) -> dict[str, Callable[[], Any]]:
    """Return the two runs by name."""
    return {"stateful": pair.stateful, "functional": pair.functional}


def main() -> None:
    """Measure, print and write."""
    options = comparing.parsed(comparing.parser("One probe, stateful and functional."))
    if options.peak:
        comparing.serve_peak(options, runs)
        return
    torch.set_num_threads(options.threads)
    pair = build(comparing.shape_of(options))
    count = {name: comparing.flops(run) for name, run in runs(pair).items()}
    taken = timing.side_by_side(pair.functional, pair.stateful, options.rounds, options.device)
    old, new = pair.stateful(), pair.functional()
    peaks = {name: comparing.peak(options, name) for name in ("stateful", "functional")}
    targets = (0.87, 1.0, 1.0) if options.lora else (0.92, 1.0, None)
    ratios = (count["functional"] / count["stateful"], taken.median, peaks["functional"] / peaks["stateful"])
    behind = (
        "{functional:.3e} / {stateful:.3e}".format(**count),
        f"{taken.seconds[0]:.2f} / {taken.seconds[1]:.2f} s, quartiles {taken.low:.3f} .. {taken.high:.3f}, "
        f"processor time {taken.cpu:.3f}",
        "{functional:.0f} / {stateful:.0f} MiB".format(**peaks),
    )
    rows = []
    for what, ratio, target, text in zip(("FLOPs", "time", "peak memory"), ratios, targets, behind, strict=True):
        rows.append([what, f"{ratio:.3f}", "" if target is None else f"≤ {target}", text])
    comparing.show("functional / stateful, one probe", ("what", "ratio", "target", "behind it"), rows)
    same = {"ΔH": (old.deltaH_true, new.change), "δH₁": (old.deltaH1, new.first_order)}
    for name, (a, b) in same.items():
        print(f"{name}: stateful {a:+.6e}, functional {b:+.6e}")
    phases = {"stateful": old.timing, "functional": new.timings}
    for name, seconds in phases.items():
        print(f"{name}: " + ", ".join(f"{phase} {spent:.2f} s" for phase, spent in seconds.items()))
    report = {
        "flops": count,
        "seconds": taken._asdict(),
        "mib": peaks,
        "ratios": ratios,
        "same": same,
        "phases": phases,
    }
    comparing.write("one_step", options, [report], pair.params)


if __name__ == "__main__":
    main()
