"""`ProbeComponents`: δH₁ on E, along a buffer Δθ keyed by name or by id, or along a preconditioned gradient."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from funcprobe import tree
from funcprobe.analysis.slope import slope
from funcprobe.checkpoints.live import from_training
from funcprobe.compat import buffers
from funcprobe.compat.batches import Batch, configured, for_the_loss, prompts_in, rows_of_prompts
from funcprobe.compat.buffers import Buffer
from funcprobe.compat.entropy_is import logged
from funcprobe.compat.settings import COUNT, Settings
from funcprobe.errors import InputError
from funcprobe.measurement.update import Update
from funcprobe.optimizers.closed_form import PureOptimizer
from funcprobe.optimizers.unreached import with_zeros
from funcprobe.types import Params

#: A preconditioner of the caller's own: a gradient by name -> P g by name.
Preconditioner = Callable[[Params], Params]


class ProbeComponents:
    """The first order of the entropy, and small algebra on buffers over the module's trainable leaves."""

    def __init__(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        logger: logging.Logger | None = None,
        sequence_processor: Any = None,
    ) -> None:
        self.model, self.config, self.logger = model, config, logger or logging.getLogger(__name__)
        self.sequence_processor = sequence_processor

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
        lr, start = 1.0, time.perf_counter()
        if param_update_buf is None:
            update, lr = self._legacy(U_batch, mb_size_prompts, optimizer)
            taken = time.perf_counter()
            direction = tree.scale(-1.0, _preconditioned(update, adam_preconditioner))
        else:
            taken, direction = start, self._given(param_update_buf, strict)
        formed = time.perf_counter()
        found = self._slopes(E_batch, direction, mb_size_prompts)
        end = time.perf_counter()
        return {
            "deltaH1": lr * found["sequence"],
            "bars_dot": found["sequence"],
            "deltaH1_tok": lr * found["token"],
            "B_E": prompts_in(E_batch),
            "B_U": prompts_in(U_batch),
            "learning_rate": lr,
            "timing": {"phase1_time": end - formed, "phase2_time": taken - start, "phase3_time": formed - taken},
        }

    def coerce_buffer_to_id_keys(self, buf: Buffer, *, strict: bool = True) -> dict[int, Tensor]:
        """Return a buffer keyed by name or id as one keyed by `id(parameter)`; see `buffers.by_name` for refusals."""
        return buffers.by_id(buf, self.model, strict=strict, logger=self.logger)

    def dot_param_buffers(self, a: Buffer, b: Buffer) -> float:
        """Return ⟨a, b⟩ in float64; both have to hold every trainable leaf, by name or by id."""
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
        graded = {name: p for name, p in buffers.leaves(self.model).items() if p.grad is not None}
        if missing := [name for name, p in graded.items() if id(p) not in buf]:
            raise InputError(f"The buffer has no entry for '{missing[0]}'; take it from zeros_like_params().")
        for p in graded.values():
            assert p.grad is not None
            buf[id(p)].add_(p.grad.detach().to(buf[id(p)]), alpha=scale)

    def _given(self, buffer: Buffer, strict: bool) -> Params:
        found = buffers.by_name(buffer, self.model, strict=strict, logger=self.logger)
        known = {name: p.detach() for name, p in buffers.leaves(self.model).items()}
        return {name: found[name].to(p.device) if name in found else torch.zeros_like(p) for name, p in known.items()}

    def _legacy(
        self, batch: Batch | None, mb_size_prompts: int, live: torch.optim.Optimizer | None
    ) -> tuple[Update, float]:
        """Return the step on U, with its gradient taken, and the learning rate.

        Raises:
            InputError: If U or the optimizer is missing, or the groups have several rates.
        """
        if live is None or batch is None:
            raise InputError("Without param_update_buf, δH₁ needs U_batch and the live optimizer; pass both.")
        rates = {float(group["lr"]) for group in live.param_groups if group["params"]}
        if len(rates) != 1:
            raise InputError(
                f"The groups have learning rates {sorted(rates)}, and lr·⟨X̄, Ȳ⟩ has one; pass param_update_buf."
            )
        settings = Settings(self.config)
        rollouts = for_the_loss(batch, configured(batch, settings, self.sequence_processor, self.model))
        with logged(self.logger):
            rows = rows_of_prompts(mb_size_prompts, rollouts)
            update = from_training(self.model, live).update(settings.objective(), rollouts, microbatch=rows)
            update.gradient()
        for note in update.warnings:
            self.logger.warning(note)
        return update, rates.pop()

    def _slopes(self, batch: Batch, direction: Params, mb_size_prompts: int) -> dict[str, float]:
        """Return DH(θ)[direction] per sequence and per token, from one forward-mode pass where the model has one."""
        settings = Settings(self.config)
        evaluation = configured(batch, settings, self.sequence_processor, self.model)
        with logged(self.logger):
            pair = from_training(self.model)
            update = Update.from_delta(pair.policy, pair.params, direction)
            rows = rows_of_prompts(mb_size_prompts, evaluation)
            return slope(update, evaluation, settings.entropies(), microbatch=rows)


def _preconditioned(update: Update, preconditioner: Preconditioner | None) -> Params:
    """Return `P g`: by default `g / (√(v / (1 − β₂^t)) + ε)` for Adam and AdamW, and g itself for SGD, in float64.

    v and t are the state's before the step; β₂ and ε are those of each leaf's group. That is the stateful system's
    stand-in for a step: no momentum, no weight decay, no new moments.

    Raises:
        InputError: If the optimizer is none of these, or a leaf has no second moment yet.
    """
    taken = update.gradient().gradient
    gradient = with_zeros(taken, update.params)
    if preconditioner is not None:
        found = preconditioner(gradient)
        tree.same_keys(gradient, found, what="gradient and what the preconditioner returned")
        return found
    optimizer = None if update.rule is None else update.rule.optimizer
    if not isinstance(optimizer, PureOptimizer) or update.opt_state is None:
        raise InputError("The path without a buffer knows SGD, Adam and AdamW; pass param_update_buf for any other.")
    found = tree.cast(gradient, torch.float64)
    if optimizer.cls is torch.optim.SGD:
        return found
    for group in optimizer.groups:
        beta2, eps = group.hyperparameters["betas"][1], group.hyperparameters["eps"]
        for name in (n for n in (found if group.names is None else group.names) if taken[n] is not None):
            state = update.opt_state[name]
            if not state:
                raise InputError(f"'{name}' has never stepped, so it has no second moment; pass param_update_buf.")
            v, t = state["exp_avg_sq"].double(), float(state["step"])
            found[name] = found[name] / (torch.sqrt(v / (1 - beta2**t)) + eps)
    return found


def _check(mb_size_prompts: int, weighting_mode: str, preconditioner: object) -> None:
    if not COUNT.fits(mb_size_prompts):
        raise InputError(f"mb_size_prompts is {mb_size_prompts!r}; expected {COUNT.expected}.")
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
