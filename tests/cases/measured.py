"""Steps of every objective and of optimizers of four kinds, each to be measured on one E and one U."""

from __future__ import annotations

import functools
from typing import Any

import torch

import funcprobe as fp
from funcprobe.types import OptState
from tests.cases import models, tables

#: Made at a learning rate.
AT_A_RATE = {
    "sgd": lambda lr: fp.sgd(lr, momentum=0.9, nesterov=True),
    "adam": fp.adam,
    "adamw": functools.partial(fp.adamw, weight_decay=0.1),
    "lifted": lambda lr: fp.from_torch(torch.optim.RMSprop, lr=lr),
}
E, U = models.rollouts(9, seed=1), models.rollouts(9, seed=2)


class Case:
    """A policy with an optimizer that has already taken a step, so that its moments are real."""

    def __init__(self, build: str, objective: str = "grpo", optimizer: str = "adamw", lr: float = 1e-3) -> None:
        self.module = tables.POLICIES[build]().train()
        self.policy, self.params = fp.from_module(self.module)
        self.optimizer = AT_A_RATE[optimizer](lr)
        made = tables.OBJECTIVES[objective]
        self.step = fp.make_step(self.policy, made, self.optimizer, max_grad_norm=1.0, microbatch=4)
        warm = self.step(self.params, self.optimizer.init(self.params), models.rollouts(6, seed=9))
        self.state: OptState = warm.opt_state

    def probe(self, **options: Any) -> fp.ProbeResult:
        """Probe the step with E and U."""
        given = {"microbatch": 4, **options}
        evaluation, batch, lr = given.pop("evaluation", E), given.pop("batch", U), given.pop("lr", None)
        return fp.probe(fp.Update.from_step(self.step, self.params, self.state, batch, lr), evaluation, **given)


@functools.cache
def case(build: str = "gpt2", objective: str = "grpo", optimizer: str = "adamw") -> Case:
    return Case(build, objective, optimizer)
