"""One probe by mutation: snapshot, measure H on E, step on U, measure again, restore, then δH₁ from that very step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from funcprobe.data.rollouts import to_device
from funcprobe.errors import InputError
from funcprobe.types import Microbatch, Rollouts

from .entropy import PER, WEIGHTINGS, accumulate_entropy_gradient, entropy, gradient_coefficients
from .losses import OBJECTIVES
from .scoring import Scores, scores
from .snapshot import Snapshot, clear_gradients, undisturbed
from .updates import accumulate_loss_gradient, dot, l2, optimizer_step, param_update, trainable


class StatefulResult(NamedTuple):
    """What one probe found."""

    H_orig: float  #: entropy on E at θ
    H_upd: float  #: entropy on E at θ′, importance-sampled
    deltaH_true: float  #: H_upd − H_orig
    deltaH1: float  #: ⟨∇H(θ), Δθ⟩, in the same unit as deltaH_true
    param_update: dict[str, Tensor]  #: Δθ = after − before over the trainable leaves, on the snapshot's device
    param_update_l2: float  #: ‖Δθ‖₂, accumulated in float64
    learning_rate_used: float  #: of the step (the first group's, where groups differ)
    terms_scale: dict[str, float]  #: Σ|terms| of H_orig, H_upd, deltaH_true and deltaH1, for relative errors
    timing: dict[str, float]  #: seconds of each phase, and "total"


@dataclass(frozen=True)
class StatefulProbe:
    """The plan taken literally, on a live module and a live optimizer; both are left bit for bit as they were found.

    One step, 1 forward pass over E at θ and 1 at θ′, and a forward and backward pass over U and over E each. The scores
    at θ serve H_orig, the importance weights of H_upd and the coefficients of ∇H alike.

    Raises:
        InputError: If an option is not one of its choices, or the optimizer misses a trainable parameter.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    objective: str = "dr_grpo"  #: "dr_grpo", "grpo" or "reinforce"
    microbatch: Microbatch = None  #: how E and U are cut for the module; it changes memory and no result
    max_grad_norm: float | None = None  #: global norm that the gradient is clipped to
    weighting: str = "per_decision"  #: importance weights: "per_decision" or "sequence"
    snapshot_device: torch.device | str = "cpu"  #: where parameters and optimizer state are kept meanwhile
    per: str = "token"  #: entropy in nats per "token" or per "sequence"

    def __post_init__(self) -> None:
        for option, choices in (("objective", OBJECTIVES), ("weighting", WEIGHTINGS), ("per", PER)):
            if getattr(self, option) not in choices:
                raise InputError(f"{option} is '{getattr(self, option)}'; expected one of {', '.join(choices)}.")
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if missed := [name for name, p in trainable(self.module).items() if id(p) not in held]:
            raise InputError(f"The optimizer misses the trainable parameter '{missed[0]}'; pass the pair that trains.")

    def run(self, evaluation: Rollouts, update: Rollouts, lr: float | None = None) -> StatefulResult:
        """Take one step on `update`, measure and predict how far the entropy moves on `evaluation`, and undo the step.

        `lr` overrides the learning rate of every group for this call.

        Raises:
            InputError: If a batch or the learning rate cannot be used.
        """
        evaluation, update = (to_device(batch, self._device) for batch in (evaluation, update))
        seconds: dict[str, float] = {}
        with self._clock("total", seconds), undisturbed(self.module, self.optimizer):
            with self._clock("snapshot", seconds):
                snapshot = Snapshot(self.module, self.optimizer, self.snapshot_device)
            try:
                with self._clock("H_orig", seconds):
                    anchor = scores(self.module, evaluation, self.microbatch)
                with self._clock("step", seconds):
                    used = self._rl_update(update, lr)
                    delta = param_update(self.module, snapshot.before)
                with self._clock("H_upd", seconds):
                    moved = scores(self.module, evaluation, self.microbatch)
            finally:
                with self._clock("restore", seconds):
                    snapshot.restore()
            with self._clock("deltaH1", seconds):
                first_order, size = self._first_order(evaluation, anchor, delta)
        before, after = (self._entropy(at, anchor, evaluation) for at in (anchor, moved))
        return StatefulResult(
            H_orig=before,
            H_upd=after,
            deltaH_true=after - before,
            deltaH1=first_order,
            param_update=delta,
            param_update_l2=l2(delta),
            learning_rate_used=used,
            terms_scale={"H_orig": before, "H_upd": after, "deltaH_true": before + after, "deltaH1": size},
            timing=seconds,
        )

    def _rl_update(self, update: Rollouts, lr: float | None) -> float:
        """Take the one step on U; return the learning rate used."""
        accumulate_loss_gradient(self.module, update, self.objective, self.microbatch)
        used = optimizer_step(self.module, self.optimizer, self.max_grad_norm, lr)
        clear_gradients(self.module, self.optimizer)
        return used

    def _first_order(self, evaluation: Rollouts, anchor: Scores, delta: dict[str, Tensor]) -> tuple[float, float]:
        """Return δH₁ = ⟨∇H(θ), Δθ⟩ and Σ|terms| of it; the module is back at θ by now."""
        coefficients = gradient_coefficients(anchor, evaluation, self.weighting, self.per)
        accumulate_entropy_gradient(self.module, evaluation, coefficients, self.microbatch)
        return dot(self.module, delta)

    def _entropy(self, at: Scores, anchor: Scores, evaluation: Rollouts) -> float:
        return entropy(at, anchor, evaluation, self.weighting, self.per)

    @property
    def _device(self) -> torch.device:
        return next(self.module.parameters()).device

    @contextmanager
    def _clock(self, phase: str, seconds: dict[str, float]) -> Iterator[None]:
        """Write down the seconds of a phase, with the device's queue empty before and after."""
        start = self._now()
        yield
        seconds[phase] = self._now() - start

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
