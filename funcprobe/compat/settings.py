"""What the stateful system is told: `cfg_importance` of one call, and the sections that training and probe share.

Every key does what it says. One that could do nothing is an error, unless it stands at the value that asks for
nothing: `snapshot_device: cpu` is accepted, since nothing is snapshotted, and `snapshot_device: cuda` is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from funcprobe.compat.clipping import Clipped
from funcprobe.errors import ConfigError
from funcprobe.estimators.observables import Integrand, entropy
from funcprobe.objectives.by_name import PolicyGradient, dr_grpo
from funcprobe.optimizers.groups import check_lr
from funcprobe.types import Observable

#: `estimator.x_estimator_mode`, and the integrand of the entropy that it means.
INTEGRANDS: dict[str, Integrand] = {"rb_residual": "rao_blackwell", "rb": "rao_blackwell", "naive": "surprisal"}

#: The clip constant that callers of old pass along whatever the mode is.
CLIP_C = 10.0

_KEYS = (
    "importance_microbatch_size",
    "report_per_token",
    "snapshot_device",
    "return_param_update_buf",
    "measure",
    "lr_override",
    "rl_grad_accum",
    "training_loss",
    "is_mode",
    "clip_c",
)


@dataclass(frozen=True)
class Importance:
    """`cfg_importance`, read and checked."""

    microbatch: int = 1  #: importance_microbatch_size: prompts that the model sees at a time, with all completions
    report_per_token: bool = False
    return_param_update_buf: bool = True
    measure: str | None = None  #: "q": at the sampling temperature (also None), "p": at temperature 1
    lr_override: float | None = None  #: of every group, for this step
    rl_grad_accum: int = 1  #: into how many pieces more the microbatches of U are cut
    is_mode: str = "snis"  #: or "clip": no weight above clip_c times that of an unmoved sequence
    clip_c: float = CLIP_C

    @classmethod
    def read(cls, cfg: Mapping[str, Any] | None) -> Importance:
        """Return the typed values of a `cfg_importance`, or of the section `true_delta_h` as it stands.

        Raises:
            ConfigError: If a key is unknown, has a wrong value, or can do nothing.
        """
        given = {key: value for key, value in (cfg or {}).items() if key != "enabled"}
        if "microbatch_size" in given:  # what the section calls it
            given["importance_microbatch_size"] = given.pop("microbatch_size")
        if unknown := [key for key in given if key not in _KEYS]:
            raise ConfigError(f"cfg_importance has no key '{unknown[0]}'; its keys are {', '.join(_KEYS)}.")
        _only(given, "snapshot_device", "cpu", "nothing is snapshotted, because nothing is stepped in place")
        _only(given, "training_loss", "rl", "the step is taken on the RL loss")
        found = cls(
            whole(given, "importance_microbatch_size", 1),
            _truth(given, "report_per_token", False),
            _truth(given, "return_param_update_buf", True),
            _one_of(given, "measure", ("p", "q", None), None),
            None if given.get("lr_override") is None else check_lr(given["lr_override"]),
            whole(given, "rl_grad_accum", 1),
            _one_of(given, "is_mode", ("snis", "clip"), "snis"),
            number(given, "clip_c", CLIP_C),
        )
        if found.is_mode == "snis" and found.clip_c != CLIP_C:
            raise ConfigError(f"clip_c is {found.clip_c}, and is_mode 'snis' clips nothing; set is_mode to 'clip'.")
        if found.is_mode == "clip" and not found.clip_c > 1:
            raise ConfigError(f"clip_c is {found.clip_c}; expected more than 1, the weight where nothing has moved.")
        return found


def entropies(config: Mapping[str, Any], importance: Importance | None = None) -> dict[str, Observable]:
    """Return the entropy per sequence and per token, as deltaH_true and deltaH1 both mean it: under sequence weights.

    Raises:
        ConfigError: If `estimator.x_estimator_mode` is unknown.
    """
    mode = section(config, "estimator").get("x_estimator_mode", "rb_residual")
    if mode not in INTEGRANDS:
        raise ConfigError(f"estimator.x_estimator_mode is {mode!r}; expected one of {', '.join(INTEGRANDS)}.")
    found: dict[str, Observable] = {
        "sequence": entropy(INTEGRANDS[mode], "sequence", "sequence"),
        "token": entropy(INTEGRANDS[mode], "sequence", "token"),
    }
    if importance is None or importance.is_mode != "clip":
        return found
    return {name: Clipped(o, importance.clip_c) for name, o in found.items()}


def objective(config: Mapping[str, Any]) -> PolicyGradient:
    """Return the RL loss `Σ_i a_i Σ_t −min(r A, clip(r) A)`: Dr. GRPO over the base weights of `for_the_loss`.

    A = r − mean_g r where the batch brings rewards alone; `clip_eps` and `clip_+` bound the ratio below and above.

    Raises:
        ConfigError: If a value is no number.
    """
    upper = None if config.get("clip_+") is None else number(config, "clip_+", 0.0)
    return dr_grpo(
        epsilon=number(config, "clip_eps", 0.2),
        epsilon_high=upper,
        beta=number(config, "kl_beta", 0.0),
        use_bias_correction_kl=False,
        normaliser=1.0,
    )


def max_grad_norm(config: Mapping[str, Any]) -> float | None:
    """Return the bound on the gradient's norm; 0 and none both leave it as it is.

    Raises:
        ConfigError: If it is no number.
    """
    return number(config, "max_grad_norm", 0.0) or None


def temperature_of(config: Mapping[str, Any], sequence_processor: Any = None) -> float:
    """Return the temperature that rows were sampled at: of section `generation`, of the processor, or 1.

    Raises:
        ConfigError: If it is no number.
    """
    of_processor = getattr(getattr(sequence_processor, "config", None), "temperature", None)
    return number(section(config, "generation"), "temperature", 1.0 if of_processor is None else float(of_processor))


def end_tokens(config: Mapping[str, Any], sequence_processor: Any, model: Any) -> frozenset[int]:
    """Return the ids of end-of-sequence tokens: of section `generation`, of the tokenizer, or of the model."""
    for found in (
        section(config, "generation").get("eos_token_id"),
        getattr(getattr(sequence_processor, "tokenizer", None), "eos_token_id", None),
        getattr(getattr(model, "config", None), "eos_token_id", None),
    ):
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a section of the configuration; an absent one is empty.

    Raises:
        ConfigError: If it is no mapping.
    """
    found = config.get(name)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"{name} is {found!r}; expected keys of its own.")
    return found


def number(values: Mapping[str, Any], key: str, default: float) -> float:
    """Return a finite number; an absent one and none are the default.

    Raises:
        ConfigError: If it is anything else; a number in quotes is text.
    """
    found = values.get(key)
    if found is None:
        return default
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        raise ConfigError(f"{key} is {found!r}, a {type(found).__name__}; expected a number.")
    return float(found)


def whole(values: Mapping[str, Any], key: str, default: int | None = None, section: str = "") -> int:
    """Return a whole number of at least 1; an absent one and none are the default, if there is one.

    Raises:
        ConfigError: If it is anything else.
    """
    found = default if values.get(key) is None else values[key]
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ConfigError(f"{section}{key} is {found!r}; expected a whole number of at least 1.")
    return found


def _truth(values: Mapping[str, Any], key: str, default: bool) -> bool:
    found = values.get(key, default)
    if not isinstance(found, bool):
        raise ConfigError(f"{key} is {found!r}; expected true or false.")
    return found


def _one_of(values: Mapping[str, Any], key: str, choices: tuple[Any, ...], default: Any) -> Any:
    found = values.get(key, default)
    if found not in choices:
        raise ConfigError(f"{key} is {found!r}; expected one of {', '.join(map(str, choices))}.")
    return found


def _only(values: Mapping[str, Any], key: str, value: str, why: str) -> None:
    if values.get(key, value) != value:
        raise ConfigError(f"{key} is {values[key]!r}, which can do nothing: {why}. Leave it out, or at '{value}'.")
