"""Cases for the suites of probes and sweeps: a real policy, a step whose moments are real, rollouts of many prompts."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe import tree
from funcprobe.types import Optimizer, OptState, Params, Rollouts
from tests.cases import models


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
        module = models.EVERY_MODEL[model]() if isinstance(model, str) else model
        self.policy, self.params = fp.from_module(module)
        self.optimizer = optimizer or fp.adamw(lr, weight_decay=0.1)
        self.step = fp.make_step(self.policy, fp.grpo(), self.optimizer, max_grad_norm=1.0)
        cold = self.optimizer.init(self.params)
        self.state: OptState = self.step(self.params, cold, prompted(3, 3, seed=9, first=80), lr).opt_state

    def probe(self, lr: float, **options: Any) -> fp.ProbeResult:
        """Probe the step at one learning rate."""
        return fp.probe(*self._arguments(options), lr=lr, **options)

    def sweep(self, lrs: Any, **options: Any) -> fp.SweepResult:
        """Sweep the step over learning rates."""
        return fp.sweep(*self._arguments(options), lrs, **options)

    def largest(self, **options: Any) -> fp.LargestLr:
        """Return the largest learning rate within bounds."""
        return fp.largest_lr(*self._arguments(options), **options)

    def watched(self, calls: list[str]) -> Case:
        """Return the case with a policy that notes every pass over a whole batch: "E" or "U"."""
        found = object.__new__(type(self))
        found.__dict__.update(self.__dict__)

        def noting(which: str, rows: int) -> fp.Policy:
            def features(params: Params, ids: Tensor, mask: Tensor) -> Tensor:
                if ids.shape[0] == rows:
                    calls.append(which)
                return self.policy.features(params, ids, mask)

            return dataclasses.replace(self.policy, features=features)

        found.policy = noting("E", len(E.ids))
        found.step = dataclasses.replace(self.step, policy=noting("U", len(U.ids)))
        return found

    def _arguments(self, options: dict[str, Any]) -> tuple[Any, ...]:
        batches = options.pop("evaluation", E), options.pop("update", U)
        own = options.pop("step", self.step), options.pop("params", self.params), options.pop("state", self.state)
        return self.policy, *own, *batches


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
        return taken._replace(params=tree.add(taken.params, drift), update=tree.add(taken.delta, drift))
