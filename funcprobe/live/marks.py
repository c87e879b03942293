"""The value of observables at one moment, on rollouts of its own: the ends that a ledger's books close against."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from funcprobe.engine.clock import Clock
from funcprobe.engine.passes import Passes
from funcprobe.errors import InputError, NumericsError
from funcprobe.estimators.divergence import Divergence
from funcprobe.estimators.uncertainty import bar
from funcprobe.measurement.options import Options
from funcprobe.measurement.readings import resampled
from funcprobe.policy.module import Policy
from funcprobe.results.provenance import BatchCounts
from funcprobe.results.window import Mark
from funcprobe.types import Observable, Params, Progress, Rollouts


def value_at(
    policy: Policy,
    params: Params,
    evaluation: Rollouts,
    observables: Mapping[str, Observable],
    options: Options,
    step: int,
    progress: Progress | None = None,
) -> Mark:
    """Return F(θ) of every observable that is no divergence, with its standard error over prompts: one pass over E.

    Estimand: F at θ over prompts as they were drawn. Bias: that of the observable's own mean.

    Raises:
        InputError: If an observable cannot be used on these rollouts.
        NumericsError: If a score is not finite.
    """
    plain = {name: o for name, o in observables.items() if not isinstance(o, Divergence)}
    passes = Passes.over(policy, evaluation, plain, options.microbatch, progress, Clock())
    anchor = passes.scores(params, "E, its own value")
    rollouts = passes.evaluation

    def values(a: Tensor) -> Tensor:
        weighed = rollouts._replace(weight=a)
        return torch.stack([o(anchor, anchor, weighed) for o in plain.values()])

    found = values(rollouts.weight)
    errors = dict.fromkeys(plain, math.nan)
    try:
        cells = rollouts.completion_mask.numel() * len(plain)
        labels = [f"The value of '{name}'" for name in plain]
        drawn = resampled(values, rollouts, "auto", labels, cells)
        errors = {name: bar(drawn, lambda q, k=k: q[k]).error for k, name in enumerate(plain)}  # type: ignore[misc]
    except (InputError, NumericsError):
        pass  # one prompt: a value without a bar
    return Mark(step, {n: float(x) for n, x in zip(plain, found, strict=True)}, errors, BatchCounts.of(rollouts))
