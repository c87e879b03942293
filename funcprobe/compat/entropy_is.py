"""`DeltaEntropyIS`: one step on U, and how far it moves the entropy on E; the live pair is read, never stepped."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from funcprobe import tree
from funcprobe.analysis.probe import probe
from funcprobe.checkpoints.live import from_training
from funcprobe.compat.batches import Batch, configured, for_the_loss, rows_of_prompts
from funcprobe.compat.settings import Settings
from funcprobe.compat.weights import weight_diagnostics
from funcprobe.errors import InputError, collected_notes
from funcprobe.results.probe import ProbeResult

#: Said where E is scored at another temperature than it was sampled at.
MEASURE_P = (
    "measure 'p' scores E at temperature 1, and E was sampled at another one: the weights compare θ′ with θ and not "
    "with the sampler, so H is that of the sampled sequences under p; 'q' is consistent"
)


class DeltaEntropyIS:
    """Ground truth ΔH of one RL step, importance-sampled, and the step itself as a buffer keyed by name."""

    def __init__(
        self,
        *,
        model: nn.Module | None = None,
        config: Mapping[str, Any],
        logger: logging.Logger | None = None,
        sequence_processor: Any = None,
    ) -> None:
        self.model, self.config, self.logger = model, config, logger or logging.getLogger(__name__)
        self.sequence_processor = sequence_processor

    def entropy_change_two_batch(
        self,
        model: nn.Module | None,
        E_batch: Batch,
        U_batch: Batch,
        optimizer: torch.optim.Optimizer,
        cfg_importance: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return H(θ) and H(θ′) on E, θ′ one step of the optimizer on U away, with Δθ keyed by name.

        H is `Σ_i w_i Σ_t h_it` in nats per sequence, `w_i ∝ exp Σ_t d_it`; per token divided by `Σ_i w_i T_i`. Where
        float32 cannot subtract, ΔH is measured along the path from θ to θ + Δθ. Δθ is the step as a value, the
        optimizer's arithmetic in float64, and carries no rounding of stored parameters.

        Args:
            model: The live module; None takes the constructor's.
            E_batch: What the entropy is measured on, drawn at θ.
            U_batch: What the step is taken on.
            optimizer: The live optimizer of that module.
            cfg_importance: Keys of the section `true_delta_h`; see `settings.KEYS`.

        Returns:
            `H_orig`, `H_upd`, `deltaH_true` (and `_tok`, with `report_per_token`), `param_update_buf_named` (CPU,
            float32, trainable leaves; None with `return_param_update_buf=False`), `param_update_l2` (accumulated in
            float64), `learning_rate_used` (the first group's, where groups differ), `timing` and `diagnostics`: of the
            weights relative to the largest, `w_min`, `w_max`, `w_sum_global`, and of their logarithms in nats
            `logw_max_global`, `logw_mean`, `logw_std`.

        Raises:
            InputError: If a batch, a configuration key or the learning rate cannot be used.
            CheckpointError: If the optimizer is not the module's, or cannot be read.
            NumericsError: If scores, gradient or step are not finite.
        """
        start = time.perf_counter()
        Settings({"true_delta_h": cfg_importance}).check()
        settings = Settings({**self.config, "true_delta_h": cfg_importance})
        module = self.model if model is None else model
        if module is None:
            raise InputError("There is no model; pass the live module that the optimizer belongs to.")
        with logged(self.logger):
            found = self._probed(module, E_batch, U_batch, optimizer, settings)
        for note in found.notes:
            if note.kind == "path":  # the one that bears on how good a number is
                self.logger.warning(note)
        return {**self._numbers(found, settings), "timing": {"total_time": time.perf_counter() - start}}

    #: The name that an older interface has for it.
    entropy_change_two_batch_rl = entropy_change_two_batch

    def _probed(
        self, module: nn.Module, E_batch: Batch, U_batch: Batch, optimizer: torch.optim.Optimizer, settings: Settings
    ) -> ProbeResult:
        """Return a probe of values that share nothing with the pair but storage that is read.

        Raises:
            InputError: If the step would move nothing.
        """
        evaluation, batch = (configured(x, settings, self.sequence_processor, module) for x in (E_batch, U_batch))
        if settings.get("true_delta_h.measure") == "p":
            if bool((evaluation.temperature != 1.0).any()):
                self.logger.warning(MEASURE_P)
            evaluation = evaluation._replace(temperature=torch.ones_like(evaluation.temperature))
        lr = settings.get("true_delta_h.lr_override")
        rates = [group["lr"] for group in optimizer.param_groups if group["params"]]
        if not any(map(float, rates) if lr is None else [lr]):
            raise InputError(
                "The learning rate is 0 in every group, as at the end of a linear schedule, so the step would move "
                "nothing; pass the rate to probe with as lr_override."
            )
        size = settings.get("true_delta_h.importance_microbatch_size", 1)
        prompts = settings.get("true_delta_h.microbatch_size", size)  # as the section calls it
        return probe(
            from_training(module, optimizer).update(
                settings.objective(),
                for_the_loss(U_batch, batch),
                lr=lr,
                max_grad_norm=settings.get("max_grad_norm", 0.0) or None,
                microbatch=math.ceil(rows_of_prompts(prompts, batch) / settings.get("true_delta_h.rl_grad_accum", 1)),
            ),
            evaluation,
            settings.entropies(settings.clip),
            bars=None,
            microbatch=rows_of_prompts(prompts, evaluation),
            rounding=False,
            keep_delta=True,
            keep_scores=True,
        )

    def _numbers(self, found: ProbeResult, settings: Settings) -> dict[str, Any]:
        whole, per_token = (found.readings[per] for per in ("sequence", "token"))
        is_wanted = settings.get("true_delta_h.return_param_update_buf", True)
        assert found.delta is not None  # asked for with keep_delta
        self.logger.info("[GT] H_orig=%.6f, H_upd=%.6f nats per sequence", whole.before, whole.after)
        tokens = {"H_orig_tok": per_token.before, "H_upd_tok": per_token.after, "deltaH_true_tok": per_token.change}
        return {
            "H_orig": whole.before,
            "H_upd": whole.after,
            "deltaH_true": whole.change,
            **(tokens if settings.get("true_delta_h.report_per_token") else {}),
            "param_update_buf_named": found.delta if is_wanted else None,
            "param_update_l2": float(tree.norm(found.delta)),
            "learning_rate_used": found.lr,
            "diagnostics": {
                "is_mode": settings.get("true_delta_h.is_mode", "snis"),
                "training_loss": "rl",
                "rl_grad_accum": settings.get("true_delta_h.rl_grad_accum", 1),
                **weight_diagnostics(found, settings.clip),
            },
        }


@contextmanager
def logged(logger: logging.Logger) -> Iterator[None]:
    """Log the warnings of funcprobe in a block instead of issuing them; other warnings pass through."""
    with collected_notes("stateful") as notes:
        yield
    for note in notes:
        logger.warning(note)
