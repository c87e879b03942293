"""A validation that was written by hand."""

from __future__ import annotations

import math

from funcprobe.attribution.trials import ENDS, Agreement, Chance, Drop
from funcprobe.results.provenance import BatchCounts, Provenance
from funcprobe.results.validation import Validation


def validation() -> Validation:
    effects = {("additive", "lowest"): (5e-4, 9e-4), ("additive", "highest"): (-3e-4, -4e-4)}
    effects |= {("entropy", "lowest"): (0.0, 1e-5), ("entropy", "highest"): (1e-4, 2e-4)}
    return Validation(
        observable="entropy",
        dropped="tokens",
        base=-2e-3,
        drops=tuple(
            Drop(m, end, share, n, effect)
            for m in ("additive", "entropy")
            for end in ENDS
            for share, n, effect in zip((0.01, 0.1), (1, 10), effects[m, end], strict=True)
        ),
        chance=(Chance(0.01, 1, 1e-6, 1e-4), Chance(0.1, 10, 2e-6, 2e-4)),
        agreements={"additive": Agreement(0.99, 0.98), "entropy": Agreement(math.nan, 0.1)},
        fit=BatchCounts(8, 50, 4),
        subsets=32,
        provenance=Provenance(BatchCounts(8, 48, 4), BatchCounts(12, 100, 3), "forward"),
    )
