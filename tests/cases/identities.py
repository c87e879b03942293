"""Observables as users write them, and the identity of a sweep of one of them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import funcprobe as fp
from funcprobe.measurement.identity import identity_of
from funcprobe.measurement.measurement import Measurement
from funcprobe.measurement.options import Options
from funcprobe.types import Observable
from tests.cases.probes import Case, E, U


@functools.cache
def case() -> Case:
    return Case()


def nudged(tree_: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tree with one entry of one leaf moved."""
    leaf = tree_[name].clone()
    leaf.view(-1)[1] += 1e-9  # between two samples, where there are few
    return {**tree_, name: leaf}


def identity_with(observable: Observable, optimizer: Any = None) -> str:
    c = case()
    step = fp.make_step(c.policy, fp.grpo(), optimizer or c.optimizer, 1.0)
    state = c.state if optimizer is None else optimizer.init(c.params)
    return identified(fp.Update.from_step(step, c.params, state, U), observable)


def identified(update: fp.Update, observable: Observable) -> str:
    return identity_of(update, Measurement.of(update, E, {"mine": observable}, Options()))


def share_above(threshold: float, **options: Any) -> Observable:
    """Return an observable that is a closure, as users write them."""

    @fp.observable("share", "of completions", **options)
    def share(scores: fp.TokenScores, anchor: fp.TokenScores, rollouts: fp.Rollouts) -> Tensor:
        w = torch.softmax((scores.logp - anchor.logp).sum(-1), 0) * rollouts.weight
        values = sum(scores.extra.values(), torch.zeros(()))
        return (w * (rollouts.rewards > threshold)).sum() / w.sum() + values.sum()

    return share


def power(exponent: float) -> dict[str, Any]:
    return {"power": lambda log_probs, token: (log_probs.exp() ** exponent).sum(-1)}
