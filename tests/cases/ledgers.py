"""A training loop as a user writes one in plain torch, in place, with a ledger that looks on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import funcprobe as fp
from funcprobe.errors import FuncprobeWarning
from funcprobe.results.window import Window
from funcprobe.types import Params, Rollouts
from tests.cases import models

SYMBOLS = models.VOCABULARY


class Loop:
    """A module, its torch optimizer, and rollouts that are sampled from it: everything that a trainer has."""

    def __init__(
        self, optimizer: str = "AdamW", *, prompts: int = 8, each: int = 2, seed: int = 0, lr: float = 1e-2
    ) -> None:
        self.module = models.two_lines()
        known: dict[str, Callable[..., torch.optim.Optimizer]] = {
            "AdamW": lambda p: torch.optim.AdamW(p, lr, weight_decay=0.1),
            "SGD": lambda p: torch.optim.SGD(p, 10 * lr, momentum=0.9),
            "RMSprop": lambda p: torch.optim.RMSprop(p, lr / 10),
        }
        self.optimizer = known[optimizer]([*self.module.parameters()])
        self.pair = fp.from_training(self.module, self.optimizer)
        self.generator = torch.Generator().manual_seed(seed)
        self.prompts, self.each = prompts, each
        self.objective = fp.grpo()

    @property
    def policy(self) -> fp.Policy:
        return self.pair.policy

    @property
    def params(self) -> Params:
        return self.pair.params

    def draw(self, prompts: int | None = None) -> Rollouts:
        """Sample a generation; the reward is the share of even symbols."""
        count = self.prompts if prompts is None else prompts
        ids = torch.randint(1, SYMBOLS, (count, 3), generator=self.generator).tolist()
        return fp.sample(
            self.policy,
            self.params,
            ids,
            generator=self.generator,
            max_new_tokens=5,
            eos_id=0,
            group_size=self.each,
            reward=lambda completions, **_: [sum(t % 2 == 0 for t in c) / len(c) for c in completions],
        )

    def backward(self, batch: Rollouts) -> fp.Update:
        """Fill `.grad` by the loss on a batch, as a trainer's backward does, and return the update that it makes."""
        pair = self.pair.again(self.optimizer)
        gradient = pair.update(self.objective, batch).gradient().gradient
        for name, p in self.module.named_parameters():
            g = gradient[name]
            p.grad = None if g is None else g.clone()
        return pair.update_from_grad()

    def step(self, ledger: fp.Ledger, batch: Rollouts, number: int | None = None, *, told: bool = True) -> None:
        """Take one optimizer step in place, seen by the ledger."""
        update = self.backward(batch)
        of_batch = self.pair.again(self.optimizer).update(self.objective, batch) if told else None
        ledger.before_step(update, number, of_batch=of_batch)
        self.optimizer.step()
        ledger.after_step()

    def run(self, ledger: fp.Ledger, generations: int, iterations: int = 1) -> list[Window]:
        """Train on some generations, with a last one at the end, and return the windows that closed."""
        closed = []
        for number in range(generations + 1):
            batch = self.draw()
            closed.append(ledger.generation(self.params, batch))
            if number < generations:
                for _ in range(iterations):
                    self.step(ledger, batch)
        return [window for window in closed if window is not None]


def ledger(loop: Loop, folder: Path, observables: Any = None, **options: Any) -> fp.Ledger:
    """Return a ledger that raises where it cannot measure."""
    return fp.Ledger(loop.policy, folder, observables, **{"on_error": "raise", **options})


@contextmanager
def telling() -> Iterator[list[str]]:
    """Collect the sentences that funcprobe warns with in the block."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        told: list[str] = []
        yield told
    told += [str(w.message) for w in caught if issubclass(w.category, FuncprobeWarning)]


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of a module's parameters."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}
