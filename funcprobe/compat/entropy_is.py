"""`DeltaEntropyIS`: one step on U, and how far it moves the entropy on E; the live pair is read, never stepped."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from funcprobe import tree
from funcprobe.analysis.probe import probe
from funcprobe.checkpoints.live import from_training, unwrapped
from funcprobe.compat import settings
from funcprobe.compat.batches import Batch, for_the_loss, rows_of_prompts, to_rollouts
from funcprobe.compat.settings import Importance
from funcprobe.errors import FuncprobeWarning, InputError
from funcprobe.estimators.importance import log_ratios
from funcprobe.results.probe import ProbeResult
from funcprobe.training.step import make_step
from funcprobe.types import Rollouts

log = logging.getLogger(__name__)

#: How many leaves of the largest ‖Δθ‖ are logged.
SHOWN_LEAVES = 5


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
        self.model = model
        self.config = config
        self.logger = logger or log
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
            cfg_importance: See `Importance`.

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
        importance = Importance.read(cfg_importance)
        module = self.model if model is None else model
        if module is None:
            raise InputError("There is no model; pass the live module that the optimizer belongs to.")
        found = self._probed(module, E_batch, U_batch, optimizer, importance)
        for message in (*found.warnings, *(note for note in found.notes if "path integral" in note)):
            self.logger.warning(message)  # of the notes, the one that bears on how good a number is
        return {**self._numbers(found, importance), "timing": {"total_time": time.perf_counter() - start}}

    #: The name that an older interface has for it.
    entropy_change_two_batch_rl = entropy_change_two_batch

    def _probed(
        self,
        module: nn.Module,
        E_batch: Batch,
        U_batch: Batch,
        optimizer: torch.optim.Optimizer,
        importance: Importance,
    ) -> ProbeResult:
        """Return a probe of values that share nothing with the pair but storage that is read."""
        pair = from_training(module, optimizer)
        assert pair.optimizer is not None  # one was given
        assert pair.opt_state is not None
        evaluation, update = self._evaluation(E_batch, module, importance), self.update_rollouts(U_batch, module)
        pieces = math.ceil(rows_of_prompts(importance.microbatch, update) / importance.rl_grad_accum)
        loss, bound = settings.objective(self.config), settings.max_grad_norm(self.config)
        _check_moves(optimizer, importance.lr_override)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FuncprobeWarning)  # the result holds them, and they are logged
            return probe(
                pair.policy,
                make_step(pair.policy, loss, pair.optimizer, bound, pieces),
                pair.params,
                pair.opt_state,
                evaluation,
                update,
                observables=settings.entropies(self.config, importance),
                lr=importance.lr_override,
                bars=None,
                microbatch=rows_of_prompts(importance.microbatch, evaluation),
                rounding=False,
                top_k=SHOWN_LEAVES,
                keep_delta=True,
                keep_scores=True,
            )

    def _evaluation(self, batch: Batch, module: nn.Module, importance: Importance) -> Rollouts:
        found = self.evaluation_rollouts(batch, module)
        if importance.measure != "p":
            return found
        if bool((found.temperature != 1.0).any()):
            self.logger.warning(
                "measure 'p' scores E at temperature 1, and E was sampled at another one: the weights compare θ′ with "
                "θ and not with the sampler, so H is that of the sampled sequences under p; 'q' is consistent"
            )
        return found._replace(temperature=torch.ones_like(found.temperature))

    def evaluation_rollouts(self, batch: Batch, module: nn.Module) -> Rollouts:
        """Return E as rollouts, read with the temperature and the end tokens of the configuration.

        Raises:
            InputError: If the batch cannot be used.
        """
        eos = settings.end_tokens(self.config, self.sequence_processor, unwrapped(module))
        return to_rollouts(batch, settings.temperature_of(self.config, self.sequence_processor), eos)

    def update_rollouts(self, batch: Batch, module: nn.Module) -> Rollouts:
        """Return U as rollouts, with the base weights of the RL loss.

        Raises:
            InputError: If the batch cannot be used.
        """
        return for_the_loss(batch, self.evaluation_rollouts(batch, module))

    def _numbers(self, found: ProbeResult, importance: Importance) -> dict[str, Any]:
        whole, per_token = (found.readings[name] for name in ("sequence", "token"))
        assert found.delta is not None  # asked for with keep_delta
        l2 = float(tree.norm(found.delta))
        self.logger.info("[GT] H_orig=%.6f, H_upd=%.6f nats per sequence", whole.before, whole.after)
        largest = ", ".join(f"{name} {norm:.2e}" for name, norm in found.top)
        self.logger.debug("[GT] ||Δθ||₂=%.4e, largest: %s", l2, largest)
        tokens = {"H_orig_tok": per_token.before, "H_upd_tok": per_token.after, "deltaH_true_tok": per_token.change}
        return {
            "H_orig": whole.before,
            "H_upd": whole.after,
            "deltaH_true": whole.change,
            **(tokens if importance.report_per_token else {}),
            "param_update_buf_named": found.delta if importance.return_param_update_buf else None,
            "param_update_l2": l2,
            "learning_rate_used": found.lr,
            "diagnostics": {
                "is_mode": importance.is_mode,
                "training_loss": "rl",
                "rl_grad_accum": importance.rl_grad_accum,
                **weight_diagnostics(found, importance),
            },
        }


def weight_diagnostics(found: ProbeResult, importance: Importance) -> dict[str, float | int]:
    """Return the health of the sequence weights that were used; float64 throughout."""
    evidence = found.evidence
    assert evidence is not None  # asked for with keep_scores
    log_weight = log_ratios(evidence.after, evidence.anchor, evidence.rollouts).sum(-1)
    used = log_weight.clamp(max=math.log(importance.clip_c)) if importance.is_mode == "clip" else log_weight
    w: Tensor = torch.exp(used - used.max())
    ess = float(w.sum() ** 2 / (w * w).sum())
    return {
        "ESS": ess,
        "ESS_fraction": ess / len(w),
        "N_total": len(w),
        "logw_max_global": float(log_weight.max()),
        "logw_mean": float(log_weight.mean()),
        "logw_std": float(log_weight.std(correction=0)),
        "w_max": float(w.max()),
        "w_min": float(w.min()),
        "w_sum_global": float(w.sum()),
    }


def _check_moves(optimizer: torch.optim.Optimizer, lr: float | None) -> None:
    rates = [float(group["lr"]) for group in optimizer.param_groups if group["params"]] if lr is None else [lr]
    if not any(rates):
        raise InputError(
            "The learning rate is 0 in every group, as at the end of a linear schedule, so the step would move "
            "nothing; pass the rate to probe with as lr_override."
        )
