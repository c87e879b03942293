"""One result of every kind, written by hand, by its name."""

from __future__ import annotations

from typing import Any

from tests.cases.written_attribution import attribution
from tests.cases.written_comparison import comparison
from tests.cases.written_probe import result, warned
from tests.cases.written_sweep import DIVERGENCE, ENTROPY, sweep

RESULTS: dict[str, Any] = {
    "probe": result(second_order=1e-5, warnings=warned("careful")),
    "sweep": sweep({"entropy": ENTROPY, "kl": DIVERGENCE}, warnings=warned("one", "two"), notes=warned("decided")),
    "comparison": comparison(notes=warned("decided")),
    "attribution": attribution(warnings=warned("careful")),
}
