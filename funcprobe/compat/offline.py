"""`OfflineEntropyProbe`: a probe from a YAML file, a checkpoint and a dataset, in the phases of the user's plan."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from funcprobe.checkpoints.adapters import load_adapter
from funcprobe.checkpoints.folder import torch_dtype
from funcprobe.checkpoints.models import load_full, load_tokenizer
from funcprobe.checkpoints.saved_optimizer import load_optimizer
from funcprobe.compat import buffers
from funcprobe.compat.components import Preconditioner, ProbeComponents
from funcprobe.compat.entropy_is import DeltaEntropyIS
from funcprobe.compat.sampling import Source
from funcprobe.compat.settings import Settings
from funcprobe.errors import CheckpointError, ConfigError
from funcprobe.optimizers.closed_form import PureOptimizer
from funcprobe.optimizers.state import state_to_torch
from funcprobe.policy.devices import device_of
from funcprobe.policy.module import from_module
from funcprobe.types import Rollouts

#: What the stateful system calls dtypes.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


class OfflineEntropyProbe:
    """ΔH of one RL step and δH₁ from that very step, for a checkpoint and its optimizer state."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config, self.settings = config, Settings(config)
        self.settings.check()
        self.logger = logging.getLogger("funcprobe.compat.offline")
        if level := self.settings.get("output.log_level"):
            self.logger.setLevel(str(level).upper())
        self.model: nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.tokenizer: Any = None
        self.adam_preconditioner: Preconditioner | None = None  #: None: read off the optimizer
        self.delta_entropy_is: DeltaEntropyIS | None = None
        self.probe_components: ProbeComponents | None = None

    @classmethod
    def from_config_file(cls, path: str | os.PathLike[str]) -> OfflineEntropyProbe:
        """Return the probe that a YAML file of the stateful system describes; relative paths are from its folder.

        Raises:
            ConfigError: If the file cannot be read, or a key is unknown or can do nothing.
        """
        return cls(Settings.read(path).config)

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], optimizer_path: str | os.PathLike[str] | None = None
    ) -> None:
        """Load model, optimizer and tokenizer from a folder; the optimizer with every moment of its file.

        The state is `optimizer_path`, or `optimizer.pt` in the folder or beside it.

        Raises:
            CheckpointError: If weights or optimizer state cannot be read faithfully, or there is no optimizer state.
            ConfigError: If a key of section `checkpoint` cannot be used.
        """
        settings, folder = self.settings, Path(checkpoint_path)
        named = settings.get("checkpoint.dtype", "float32")
        into = torch_dtype(DTYPES.get(named, named)), device_of(settings.get("checkpoint.device_map", "auto"))
        base_model, base = settings.get("checkpoint.model_config_path"), None
        state = _state_file(folder, optimizer_path)
        if (folder / "adapter_config.json").is_file():
            self.model, base = load_adapter(folder, base_model, *into)
        elif base_model is not None:
            raise ConfigError(f"checkpoint.model_config_path is the base of an adapter, and {folder} holds none.")
        else:
            self.model = load_full(folder, *into)
        self.tokenizer = load_tokenizer(folder, base)
        # without a rate of its own the override stands in for the saved one, which may be 0
        rates = (settings.get(key) for key in ("learning_rate", "true_delta_h.lr_override"))
        self.optimizer = _live(self.model, state, next((lr for lr in rates if lr is not None), None))
        shared: dict[str, Any] = {"config": self.config, "logger": self.logger, "sequence_processor": self}
        self.delta_entropy_is = DeltaEntropyIS(model=self.model, **shared)
        self.probe_components = ProbeComponents(self.model, **shared)
        self.logger.info("Loaded %s with %s", folder, state)

    def run_mixed_probe(self, checkpoint_path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """Sample E and U, take one step on U to measure ΔH on E, and predict δH₁ on E from that very step.

        With `true_delta_h.enabled: false` there is no step: δH₁ is that of the legacy path.

        Args:
            checkpoint_path: What to load first; None takes what is loaded, or `checkpoint.checkpoint_path`.

        Returns:
            `bars_dot`, `deltaH1`, `deltaH1_tok`, `learning_rate`, `B_E`, `B_U`, `mb_size_prompts`, `weighting_mode`,
            `importance_enabled`, `timing`, and all keys of `DeltaEntropyIS`; the buffer with
            `probe_reuse.log_param_update_buf` only.

        Raises:
            InputError: If anything that is configured cannot be used.
            RuntimeError: If `return_param_update_buf` is off: there is no Δθ to predict from.
        """
        settings, start = self.settings, time.perf_counter()
        if checkpoint_path is not None or self.model is None:
            place = checkpoint_path or settings.get("checkpoint.checkpoint_path", named="the folder")
            self.load_checkpoint(place, settings.get("checkpoint.optimizer_path"))
        assert self.model is not None
        assert self.probe_components is not None
        self.logger.info("Phase 0: sampling E and U")
        source = Source(settings, *from_module(self.model), self.tokenizer)
        E_batch, U_batch = source.batch("E"), source.batch("U")
        sampled, enabled = time.perf_counter(), settings.get("true_delta_h.enabled", True)
        truth = self._ground_truth(E_batch, U_batch) if enabled else {}
        measured = time.perf_counter()
        self.logger.info("Phase 2: δH₁ from X on E and %s", "the same Δθ" if enabled else "the preconditioned gradient")
        size = settings.get("computation_options.mb_size_prompts", 2)
        chosen = {"mb_size_prompts": size, "weighting_mode": "dr_grpo"}  # there is one mode
        predicted = self.probe_components.compute_delta_h1_from_batches(
            E_batch=E_batch,
            U_batch=U_batch,
            adam_preconditioner=self.adam_preconditioner,
            optimizer=self.optimizer,
            param_update_buf=truth.get("param_update_buf_named"),
            **chosen,
        )
        self.logger.info(
            f"[δH1] bars_dot={predicted['bars_dot']:.10f}, deltaH1={predicted['deltaH1']:.10f}"
            + (" (uses same Δθ)" if enabled else "")
        )
        if not settings.get("probe_reuse.log_param_update_buf"):
            truth.pop("param_update_buf_named", None)
        drawn = {"B_E": len(E_batch.ids)} if isinstance(E_batch, Rollouts) else {}  # with replacement
        times = {"phase0_sampling": sampled - start, "phase5_importance": measured - sampled, **predicted["timing"]}
        times["total_time"] = time.perf_counter() - start
        found = {**truth, **predicted, **chosen, **drawn, "importance_enabled": enabled, "timing": times}
        self._save(found)
        return found

    #: The name for a folder, read with `checkpoint.optimizer_path`.
    run_offline_analysis = run_mixed_probe

    def _ground_truth(self, E_batch: Any, U_batch: Any) -> dict[str, Any]:
        """Return the measured change of H on E under the one step on U, and the step itself.

        Raises:
            RuntimeError: If the configuration leaves out Δθ.
        """
        assert self.optimizer is not None
        assert self.delta_entropy_is is not None
        self.logger.info("Phase 1: ground truth ΔH on E, and Δθ, from one step on U")
        found = self.delta_entropy_is.entropy_change_two_batch(
            self.model, E_batch, U_batch, self.optimizer, self.config.get("true_delta_h")
        )
        self.logger.info(
            f"[GT] deltaH_true = {found['deltaH_true']:.10f} (||Δθ||₂={found['param_update_l2']:.4e}, "
            f"lr_used={found['learning_rate_used']})"
        )
        if found["param_update_buf_named"] is None:
            raise RuntimeError(
                "Ground-truth stage did not return param_update_buf_named; set return_param_update_buf=True"
            )
        return found

    def _save(self, found: Mapping[str, Any]) -> None:
        place = self.settings.get("output.results_path")
        if place is None:
            return
        plain = {key: value for key, value in found.items() if key != "param_update_buf_named"}
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).write_text(json.dumps(_finite(plain), indent=2, allow_nan=False) + "\n")
        if found.get("param_update_buf_named") is not None:
            torch.save(found["param_update_buf_named"], Path(place).with_suffix(".update.pt"))


def _finite(value: Any) -> Any:
    """Return plain values with null in the place of numbers that are not finite, which JSON has none of."""
    if isinstance(value, Mapping):
        return {key: _finite(x) for key, x in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _state_file(folder: Path, given: str | os.PathLike[str] | None) -> Path:
    if given is not None:
        return Path(given)
    places = [folder / "optimizer.pt", folder.parent / "optimizer.pt"]
    if found := [place for place in places if place.is_file()]:
        return found[0]
    raise CheckpointError(
        f"There is no optimizer state: neither {places[0]} nor {places[1]} exists. A step from zero moments is another "
        "step, so none is made up; set checkpoint.optimizer_path."
    )


def _live(module: nn.Module, state: Path, lr: float | None) -> torch.optim.Optimizer:
    """Return a torch optimizer over the module's leaves, with groups and moments of the file."""
    _, params = from_module(module)
    pure, opt_state = load_optimizer(state, params, lr)
    assert isinstance(pure, PureOptimizer)  # load_optimizer reads SGD, Adam and AdamW
    named = buffers.leaves(module)
    members = [params if group.names is None else group.names for group in pure.groups]
    groups = [
        {**group.hyperparameters, "params": [named[name] for name in names]}
        for group, names in zip(pure.groups, members, strict=True)
    ]
    live = pure.cls(groups, lr=pure.lr)  # type: ignore[call-arg]
    live.load_state_dict(state_to_torch(pure, opt_state, list(params)))
    return live
