"""The framework that a run was trained with, by the plain files that it leaves, and the loss that it takes by default.

| framework | recognised by | objective | max_grad_norm | source |
|---|---|---|---|---|
| TRL, GRPO | names in log_history | dapo, epsilon .2, epsilon_high .2 | 1.0 | `GRPOConfig` of TRL 1.16 |
| TRL, RLOO | the same, and the run's model card | rloo, epsilon .2, epsilon_high .2 | 1.0 | `RLOOConfig` |
| ms-swift | args.json, which states them | as stated there | as stated there | `BaseArguments.save_args` |
| verl | U is its dump | dapo, epsilon .2, epsilon_high .2, delta 3 | 1.0 | `actor.yaml`, `dp_actor.yaml` |

verl's `loss_agg_mode` of token-mean is dapo's, its `clip_ratio_c` is `delta`, and rewards of a group make advantages as
its `adv_estimator: grpo` does. A run's own settings stand in `training_args.bin`, a pickle, which is never opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from funcprobe.checkpoints.trainer_state import TrainerState
from funcprobe.cli.fields import ObjectiveConfig, objective_model
from funcprobe.data.reading import MIB, json_object, text_of
from funcprobe.errors import InputError

#: Names that TRL's GRPOTrainer and RLOOTrainer log, and no trainer of transformers itself.
LOGGED = {"completions/mean_length", "frac_reward_zero_std", "reward"}

#: Losses of ms-swift's `loss_type` that are objectives of the same name.
SWIFT = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")


class Framework(NamedTuple):
    """A framework, and the step that it takes unless it is told otherwise."""

    name: str
    objective: ObjectiveConfig
    max_grad_norm: float | None
    is_stated: bool = False  #: whether the run's files state them, so that they are no defaults


def _clipped(name: str, **options: Any) -> ObjectiveConfig:
    return objective_model(name).model_validate({"epsilon": 0.2, "epsilon_high": 0.2, **options})


TRL_GRPO = Framework("TRL's GRPOTrainer", _clipped("dapo"), 1.0)
TRL_RLOO = Framework("TRL's RLOOTrainer", _clipped("rloo"), 1.0)
VERL = Framework("verl", _clipped("dapo", delta=3.0), 1.0)


def framework_of(checkpoint: Path, state: TrainerState | None, dump: str | None) -> Framework | None:
    """Return the framework that a checkpoint, or the dump that U is, comes from; None where nothing tells.

    `dump` is the name that `read_rollouts` knows it by, None for funcprobe's own files.
    """
    if dump == "verl":
        return VERL
    if (stated := _of_swift(checkpoint)) is not None or dump == "ms-swift":
        return stated
    if (state is not None and state.names >= LOGGED) or dump == "trl":
        return TRL_RLOO if "rloo" in _tags(checkpoint.absolute().parent / "README.md") else TRL_GRPO
    return None


def _of_swift(folder: Path) -> Framework | None:
    """Return the loss that ms-swift's `args.json` states; None without one, or where it is no objective here."""
    try:
        found = json_object(folder / "args.json", MIB)
    except InputError:
        return None
    loss, low, high, norm = (found.get(name) for name in ("loss_type", "epsilon", "epsilon_high", "max_grad_norm"))
    if found.get("rlhf_type") != "grpo" or loss not in SWIFT or found.get("importance_sampling_level") != "token":
        return None
    options = {"epsilon": low, "epsilon_high": low if high is None else high, "beta": found.get("beta") or 0.0}
    options |= {} if found.get("delta") is None else {"delta": found["delta"]}
    try:
        objective = objective_model(loss).model_validate(options)
    except ValidationError:
        return None
    bound = float(norm) if isinstance(norm, int | float) and 0 < norm < float("inf") else None
    return Framework("ms-swift", objective, bound, is_stated=True)


def _tags(card: Path) -> set[str]:
    """Return the items of lists in a model card, among which are its tags."""
    try:
        lines = text_of(card).splitlines()
    except InputError:
        return set()
    return {line.strip().removeprefix("- ") for line in lines if line.strip().startswith("- ")}
