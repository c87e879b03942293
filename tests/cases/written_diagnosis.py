"""Diagnoses written by hand: their components are the results that stand beside, their answers those of the rules."""

from __future__ import annotations

from typing import Any

from funcprobe.measurement.drawn import Drawn, Ratios
from funcprobe.results.any_lr import CurveResult
from funcprobe.results.diagnosis import Diagnosis
from funcprobe.results.diagnosis_answers import answers_of
from funcprobe.results.findings import Findings, LargestStep
from tests.cases.written_attribution import attribution, with_bars
from tests.cases.written_comparison import comparison
from tests.cases.written_sweep import DIVERGENCE, ENTROPY, REWARD, sweep

LAWS = {"entropy": ENTROPY, "reward": REWARD, "kl": DIVERGENCE}


def findings(**changes: Any) -> Findings:
    """Return findings with everything in them, with some fields changed."""
    values: dict[str, Any] = {
        "attribution": with_bars(attribution(info=INFO), 1e-7, "layers"),
        "alone": None,
        "curve": CurveResult(**vars(sweep()), nodes=2, reach=1e-3),
        "largest": LargestStep(5e-4, "max_nonlinearity 0.5 (found 0.6)"),
        "comparison": comparison({"as it is": 1e-5, "half the lr": 5e-6}, laws=LAWS),
        "ess": 0.98,
        "drawn": {"E": drawn(), "U": drawn(gap=1e-6, holes=3)},
        "ratios": Ratios(0.001, 1.01, 0.999),
        "missing": {},
        "left_out": {"clip-higher": "no ratio is above 1.2, where clipping begins"},
    }
    return Findings(**{**values, **changes})


INFO = {"loss": 0.5, "clip_fraction": 0.002, "grad_norm": 0.6, "clip_coefficient": 1.0}


def drawn(**changes: Any) -> Drawn:
    """Return how a batch was drawn, with some fields changed."""
    return Drawn((1.0, 1.0), (3, 3), False, None, 24, 0)._replace(**changes)


def diagnosis(notes: Any = (), warnings: Any = (), **changes: Any) -> Diagnosis:
    """Return the diagnosis of such findings."""
    found = findings(**changes)
    return Diagnosis(**vars(found), answers=answers_of(found), notes=notes, warnings=warnings)
