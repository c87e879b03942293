"""Steps to compare: variants of a case's own."""

from __future__ import annotations

import dataclasses
from typing import Any

import funcprobe as fp
from funcprobe.results.comparison import Comparison
from tests.cases.probes import Case, E, U, Variant, prompted, updates


def variants(case: Case) -> dict[str, Any]:
    """Return steps that differ in objective, clip range, learning rate, optimizer, clip norm and update rollouts."""
    sgd = fp.sgd(1e-2)
    return {
        "grpo": case.step,
        "a third": Variant(case.step, lr=case.optimizer.lr / 3),
        "dapo": dataclasses.replace(case.step, objective=fp.dapo(epsilon=0.1)),
        "entropy bonus": dataclasses.replace(case.step, objective=fp.entropy_bonus(entropy_coef=1.0)),
        "drop negatives": dataclasses.replace(case.step, objective=fp.drop_negatives()),
        "unclipped": dataclasses.replace(case.step, max_grad_norm=None),
        "sgd": Variant(dataclasses.replace(case.step, optimizer=sgd), opt_state=sgd.init(case.params)),
        "other prompts": Variant(case.step, batch=prompted(3, 4, seed=12, first=70)),
    }


def compared(case: Case, steps: Any = None, **options: Any) -> Comparison:
    steps = variants(case) if steps is None else steps
    return fp.compare(updates(steps, case.params, case.state, U), E, **options)
