"""`ProbeComponents`: δH₁ on E, along a buffer Δθ keyed by name or by id, or along a preconditioned gradient."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from funcprobe import tree
from funcprobe.checkpoints.live import from_training
from funcprobe.compat import buffers, settings
from funcprobe.compat.batches import Batch, prompts_in, rows_of_prompts
from funcprobe.compat.buffers import Buffer
from funcprobe.compat.entropy_is import DeltaEntropyIS
from funcprobe.compat.preconditioner import preconditioned
from funcprobe.engine.clock import Clock
from funcprobe.engine.passes import Passes
from funcprobe.errors import InputError
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.first_order import first_order
from funcprobe.measurement.measurement import Measurement
from funcprobe.measurement.messages import Messages
from funcprobe.measurement.options import Options
from funcprobe.optimizers.unreached import reached, with_zeros
from funcprobe.training.step import make_step
from funcprobe.types import Params

log = logging.getLogger(__name__)

#: A preconditioner of the caller's own: a gradient by name -> P g by name.
Preconditioner = Callable[[Params], Params]


class ProbeComponents:
    """The first order of the entropy, and small algebra on buffers over the module's trainable leaves."""

    def __init__(self, model: nn.Module, config: Mapping[str, Any], logger: logging.Logger | None = None) -> None:
        self.model = model
        self.config = config
        self.logger = logger or log

    def compute_delta_h1_from_batches(
        self,
        *,
        E_batch: Batch,
        U_batch: Batch | None = None,
        mb_size_prompts: int = 1,
        weighting_mode: str = "dr_grpo",
        adam_preconditioner: Preconditioner | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        param_update_buf: Buffer | None = None,
        strict: bool = True,
    ) -> dict[str, Any]:
        """Return δH₁ on E: the derivative of the very H that `deltaH_true` is the change of, in the same unit.

        With `param_update_buf` that is `⟨∇H(θ), Δθ⟩`, learning rate 1.0, and neither U, preconditioner nor optimizer
        is looked at. Without it, `lr · ⟨X̄, Ȳ⟩` with `X̄ = ∇H(θ)` and `Ȳ = −P ∇loss(U)`: no momentum, no weight decay
        and no gradient clipping, so it is the first order of no step that an optimizer takes.

        Args:
            E_batch: What the entropy is measured on.
            U_batch: What the legacy path takes its gradient on.
            mb_size_prompts: Prompts that the model sees at a time; it changes memory and no result.
            weighting_mode: "dr_grpo".
            adam_preconditioner: `gradient by name -> P g by name`; None is read off the optimizer.
            optimizer: The live one; the legacy path needs it.
            param_update_buf: Δθ, by name or by id.
            strict: Whether the buffer has to hold every trainable leaf and nothing else; see `buffers`.

        Returns:
            `deltaH1` and `bars_dot` in nats per sequence (without `lr`), `deltaH1_tok` in nats per token, `B_E`, `B_U`
            in prompts, `learning_rate`, and seconds by phase: E, U, and forming the direction.

        Raises:
            InputError: If an argument, a batch or the buffer cannot be used.
            NumericsError: If scores or gradient are not finite.
        """
        _check(mb_size_prompts, weighting_mode, adam_preconditioner)
        clock = Clock()
        direction, lr = (
            self._legacy(U_batch, mb_size_prompts, adam_preconditioner, optimizer, clock)
            if param_update_buf is None
            else (self._given(param_update_buf, strict, clock), 1.0)
        )
        with clock("phase1_time"):
            whole, per_token = self._slopes(E_batch, direction, mb_size_prompts)
        return {
            "deltaH1": lr * whole,
            "bars_dot": whole,
            "deltaH1_tok": lr * per_token,
            "B_E": prompts_in(E_batch),
            "B_U": prompts_in(U_batch),
            "learning_rate": lr,
            "timing": {phase: clock.seconds.get(phase, 0.0) for phase in ("phase1_time", "phase2_time", "phase3_time")},
        }

    def coerce_buffer_to_id_keys(self, buf: Buffer, *, strict: bool = True) -> dict[int, Tensor]:
        """Return a buffer keyed by name or id as one keyed by `id(parameter)`; see `buffers.by_id`.

        Raises:
            InputError: If it does not fit the module.
        """
        return buffers.by_id(buf, self.model, strict=strict, logger=self.logger)

    def dot_param_buffers(self, a: Buffer, b: Buffer) -> float:
        """Return ⟨a, b⟩ in float64; both hold every trainable leaf, by name or by id.

        Raises:
            InputError: If one of them does not.
        """
        left, right = (buffers.by_name(x, self.model, logger=self.logger) for x in (a, b))
        return float(tree.dot(left, {name: x.to(left[name].device) for name, x in right.items()}))

    def zeros_like_params(
        self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> dict[int, Tensor]:
        """Return a buffer of zeros, keyed by id."""
        return {id(p): torch.zeros(p.shape, dtype=dtype, device=device) for p in buffers.leaves(self.model).values()}

    def add_into_param_buffer(self, buf: dict[int, Tensor], scale: float = 1.0) -> None:
        """Add `scale · .grad` of every trainable leaf into a buffer keyed by id, in place; the module is only read.

        Raises:
            InputError: If the buffer does not hold every leaf that has a gradient.
        """
        graded = {id(p): (n, p.grad) for n, p in buffers.leaves(self.model).items() if p.grad is not None}
        if missing := [name for i, (name, _) in graded.items() if i not in buf]:
            raise InputError(f"The buffer has no entry for '{missing[0]}'; take it from zeros_like_params().")
        for i, (_, grad) in graded.items():
            buf[i].add_(grad.detach().to(buf[i]), alpha=scale)

    def _given(self, buffer: Buffer, strict: bool, clock: Clock) -> Params:
        with clock("phase3_time"):
            found = buffers.by_name(buffer, self.model, strict=strict, logger=self.logger)
            known = buffers.leaves(self.model)
            return {
                name: found[name].to(p.device) if name in found else torch.zeros_like(p.detach())
                for name, p in known.items()
            }

    def _legacy(
        self,
        batch: Batch | None,
        mb_size_prompts: int,
        preconditioner: Preconditioner | None,
        live: torch.optim.Optimizer | None,
        clock: Clock,
    ) -> tuple[Params, float]:
        """Return Ȳ = −P ∇loss(U) and the learning rate.

        Raises:
            InputError: If U or the optimizer is missing, or the groups have several rates.
        """
        if live is None or batch is None:
            raise InputError("Without param_update_buf, δH₁ needs U_batch and the live optimizer; pass both.")
        pair, lr = from_training(self.model, live), _one_rate(live)
        assert pair.optimizer is not None
        assert pair.opt_state is not None
        update = DeltaEntropyIS(config=self.config).update_rollouts(batch, self.model)
        rows = rows_of_prompts(mb_size_prompts, update)
        step = make_step(pair.policy, settings.objective(self.config), pair.optimizer, microbatch=rows)
        messages = Messages(quiet=True)
        with clock("phase2_time"), messages.recording():
            gradient, _ = step.gradient(pair.params, update)
        for message in messages.warnings:
            self.logger.warning(message)
        with clock("phase3_time"):
            whole = with_zeros(gradient, pair.params)
            if preconditioner is None:
                moved = preconditioned(reached(gradient), pair.optimizer, pair.opt_state)
                found = {**tree.zeros_like(tree.cast(whole, torch.float64)), **moved}
            else:
                found = preconditioner(whole)
            tree.same_keys(whole, found, what="gradient and what the preconditioner returned")
            return tree.scale(-1.0, found), lr

    def _slopes(self, batch: Batch, direction: Params, mb_size_prompts: int) -> tuple[float, float]:
        """Return DH(θ)[direction] per sequence and per token, from one forward-mode pass where the model has one."""
        pair = from_training(self.model)
        evaluation = DeltaEntropyIS(config=self.config).evaluation_rollouts(batch, self.model)
        observables = settings.entropies(self.config)
        rows = rows_of_prompts(mb_size_prompts, evaluation)
        passes = Passes.over(pair.policy, evaluation, observables, rows, None, Clock())
        measurement = Measurement(passes, observables, Options(bars=None), Messages(quiet=True), independent=True)
        first = first_order(measurement, pair.params, direction)
        evidence = Evidence(passes.evaluation, first.scores, first.scores, first.along)
        whole, per_token = (first.value(name, o, evidence, direction) for name, o in observables.items())
        assert whole is not None  # the gradient of every observable that was asked for is there
        assert per_token is not None
        return whole, per_token


def _check(mb_size_prompts: int, weighting_mode: str, preconditioner: object) -> None:
    settings.whole({"mb_size_prompts": mb_size_prompts}, "mb_size_prompts")
    if weighting_mode != "dr_grpo":
        raise InputError(
            f"weighting_mode is {weighting_mode!r}; expected 'dr_grpo'. δH₁ is the derivative of the measured entropy "
            "and has its normalisation: deltaH1 per sequence, deltaH1_tok per token."
        )
    if preconditioner is not None and not callable(preconditioner):
        raise InputError(
            f"adam_preconditioner is a {type(preconditioner).__name__}; expected None, which reads it off the "
            "optimizer, or a function from a gradient by name to P g by name."
        )


def _one_rate(optimizer: torch.optim.Optimizer) -> float:
    rates = {float(group["lr"]) for group in optimizer.param_groups if group["params"]}
    if len(rates) != 1:
        raise InputError(
            f"The groups have learning rates {sorted(rates)}, and lr·⟨X̄, Ȳ⟩ has one; pass param_update_buf."
        )
    return rates.pop()
