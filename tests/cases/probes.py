"""Cases for the suites of probes and sweeps: a real policy, a step whose moments are real, rollouts of many prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe import tree
from funcprobe.training.step import Step
from funcprobe.types import Optimizer, OptState, Params, Rollouts
from tests.cases import models, tables


def prompted(prompts: int, each: int, seed: int, first: int = 0) -> Rollouts:
    """Return `each` rollouts, with rewards, of every one of the prompts numbered `first`, `first + 1`, ..."""
    g = torch.Generator().manual_seed(seed)
    v = models.VOCABULARY
    numbers = [first + k for k in range(prompts) for _ in range(each)]
    lengths = torch.randint(2, 7, (len(numbers),), generator=g).tolist()
    return fp.rollouts_from_lists(
        [[n // v**2 % v, n // v % v, n % v] for n in numbers],
        [torch.randint(v, (length,), generator=g).tolist() for length in lengths],
        temperature=0.8,
        rewards=torch.randn(len(numbers), generator=g, dtype=torch.float64).tolist(),
        vocab_size=v,
    )


#: Evaluation and update rollouts that have no prompt in common; their numbers of rows differ, so that passes show.
E, U = prompted(5, 2, seed=1), prompted(3, 4, seed=2, first=50)


class Case:
    """A policy with an optimizer that has already taken a step, so that its moments are real."""

    def __init__(
        self, model: str | nn.Module = "two lines", optimizer: Optimizer | None = None, lr: float = 1e-3
    ) -> None:
        module = tables.POLICIES[model]() if isinstance(model, str) else model
        self.policy, self.params = fp.from_module(module)
        self.optimizer = optimizer or fp.adamw(lr, weight_decay=0.1)
        self.step = fp.make_step(self.policy, fp.grpo(), self.optimizer, max_grad_norm=1.0)
        cold = self.optimizer.init(self.params)
        self.state: OptState = self.step(self.params, cold, prompted(3, 3, seed=9, first=80), lr).opt_state

    def update(self, lr: float | None = None, **own: Any) -> fp.Update:
        """Return the update that a step on U makes; `step`, `params`, `state` or `batch` stand in for the case's."""
        given = {"step": self.step, "params": self.params, "state": self.state, "batch": U, **own}
        return fp.Update.from_step(given["step"], given["params"], given["state"], given["batch"], lr)

    def probe(self, lr: float | None, **options: Any) -> fp.ProbeResult:
        """Probe the step at one learning rate."""
        update, evaluation = self._taken(options, lr)
        return fp.probe(update, evaluation, **options)

    def sweep(self, lrs: Any, **options: Any) -> fp.SweepResult:
        """Sweep the step over learning rates."""
        update, evaluation = self._taken(options)
        return fp.sweep(update, evaluation, lrs, **options)

    def curve(self, lr_max: float, **options: Any) -> fp.CurveResult:
        """Return the curve of the step up to a learning rate."""
        update, evaluation = self._taken(options)
        return fp.curve(update, evaluation, lr_max, **options)

    def largest(self, **options: Any) -> fp.LargestLr:
        """Return the largest learning rate within bounds."""
        update, evaluation = self._taken(options)
        return fp.largest_lr(update, evaluation, **options)

    def watched(self, calls: list[str]) -> Case:
        """Return the case with a policy that notes every pass over a whole batch: "E" or "U"."""
        names = {len(E.ids): "E", len(U.ids): "U"}  # their numbers of rows differ
        return self._told(lambda rows: calls.append(names[rows]) if rows in names else None)

    def watched_rows(self, rows: list[int]) -> Case:
        """Return the case with a policy that notes the rows of every pass."""
        return self._told(rows.append)

    def _told(self, tell: Callable[[int], None]) -> Case:
        found = object.__new__(type(self))
        found.__dict__.update(self.__dict__)

        def features(params: Params, ids: Tensor, mask: Tensor) -> Tensor:
            tell(ids.shape[0])
            return self.policy.features(params, ids, mask)

        found.policy = dataclasses.replace(self.policy, features=features)
        found.step = dataclasses.replace(self.step, policy=found.policy)
        return found

    def _taken(self, options: dict[str, Any], lr: float | None = None) -> tuple[fp.Update, Rollouts]:
        own = {name: options.pop(name) for name in ("step", "params", "state", "batch") if name in options}
        return self.update(lr, **own), options.pop("evaluation", E)


class Variant(NamedTuple):
    """One step to compare; what is None is the comparison's own."""

    step: Step
    lr: float | None = None
    opt_state: OptState | None = None
    batch: Rollouts | None = None


def updates(steps: Any, params: Params, state: OptState, batch: Rollouts) -> dict[str, fp.Update]:
    """Return the updates of several steps by name, of which a `Variant` has a rate, a state or a batch of its own."""
    each = {name: step if isinstance(step, Variant) else Variant(step) for name, step in steps.items()}
    return {
        name: fp.Update.from_step(
            v.step, params, state if v.opt_state is None else v.opt_state, batch if v.batch is None else v.batch, v.lr
        )
        for name, v in each.items()
    }


def attributed(case: Case, evaluation: fp.Rollouts = E, **options: Any) -> fp.Attribution:
    return fp.attribute(fp.Update.from_step(case.step, case.params, case.state, U), evaluation, **options)


class Offset:
    """A hand-written optimizer that is not proportional to its learning rate: SGD, and a fixed drift beside it."""

    lr = 1e-3

    def __init__(self, scale: float = 1e-3) -> None:
        self.scale = scale

    def init(self, params: Params) -> OptState:
        return fp.sgd(self.lr).init(params)

    def apply(self, params: Params, state: OptState, gradient: Params, lr: float | None = None) -> Any:
        taken = fp.sgd(self.lr).apply(params, state, gradient, lr)
        drift = models.direction(params, self.scale, seed=8)
        return taken._replace(params=tree.add(taken.params, drift), delta=tree.add(taken.delta, drift))
