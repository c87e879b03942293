"""A configuration of the stateful system: every key that there is, the values that it takes, and their meaning.

A key does what it says, or is an error. One that can do nothing is accepted only at the values that ask for nothing:
`snapshot_device: cpu`, since nothing is snapshotted, and not `snapshot_device: cuda`. None is the default of every key.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from funcprobe.cli.yaml_values import read_mapping
from funcprobe.compat.weights import Clipped
from funcprobe.errors import ConfigError
from funcprobe.estimators.observables import Entropy, Integrand, entropy
from funcprobe.objectives.losses import dr_grpo
from funcprobe.objectives.policy_gradient import PolicyGradient


class Kind(NamedTuple):
    """The values that a key takes."""

    expected: str  #: in words or, of a key that does nothing, why
    fits: Callable[[Any], bool]
    idle: bool = False  #: whether the key can do nothing, and these values ask for nothing


def _whole(found: Any) -> bool:
    return isinstance(found, int) and not isinstance(found, bool)


def _one_of(*choices: str) -> Kind:
    return Kind(f"one of {', '.join(choices)}", lambda found: found in choices)


def _idle(why: str, *nothing: Any) -> Kind:
    return Kind(why, lambda found: found in nothing, idle=True)


NUMBER = Kind("a number", lambda found: (_whole(found) or isinstance(found, float)) and math.isfinite(found))
COUNT = Kind("a whole number of at least 1", lambda found: _whole(found) and found >= 1)
TRUTH = Kind("true or false", lambda found: isinstance(found, bool))
TEXT, PATH = (Kind(words, lambda found: isinstance(found, str)) for words in ("text", "a path, or a name"))
LEVEL = Kind("a level of logging", lambda found: str(found).upper() in logging.getLevelNamesMapping())
TOKENS = Kind("a token id, or several", lambda found: all(map(_whole, found if isinstance(found, list) else [found])))
WEIGHTING = Kind(
    "dr_grpo: δH₁ has the normalisation of the entropy that is measured, deltaH1 per sequence, deltaH1_tok per token",
    lambda found: found == "dr_grpo",
)

#: `estimator.x_estimator_mode`, and the integrand of the entropy that it means.
INTEGRANDS: dict[str, Integrand] = {"rb_residual": "rao_blackwell", "rb": "rao_blackwell", "naive": "surprisal"}

#: The clip constant that callers of old pass along whatever the mode is.
CLIP_C = 10.0


def _keys(kind: Kind, section: str, names: str) -> dict[str, Kind]:
    return {f"{section}.{name}" if section else name: kind for name in names.split()}


#: What every key takes. Section `true_delta_h` is `cfg_importance`, which says importance_microbatch_size.
KEYS: dict[str, Kind] = {
    **_keys(NUMBER, "", "learning_rate clip_eps clip_+ kl_beta max_grad_norm"),
    **_keys(PATH, "checkpoint", "checkpoint_path optimizer_path model_config_path"),
    **_keys(TEXT, "checkpoint", "dtype device_map"),
    "checkpoint.use_qlora": _idle("quantised weights are not read", False),
    **_keys(PATH, "batch_config", "dataset_name"),
    **_keys(TEXT, "batch_config", "reward split E_split U_split"),
    **_keys(COUNT, "batch_config", "B_E B_U G"),
    "batch_config.B_E_values": Kind("sizes", lambda found: True),  # one of them, in place of B_E
    **_keys(COUNT, "computation_options", "mb_size_prompts"),
    **_keys(WEIGHTING, "computation_options", "weighting_mode"),
    **_keys(NUMBER, "computation_options", "master_seed"),
    "computation_options.compute_delta_h1": _idle("δH₁ is what a probe is for", True),
    "computation_options.rl_grad_accum": _idle("it belongs to true_delta_h", 1),
    **_keys(WEIGHTING, "estimator", "weighting_mode"),
    "estimator.x_estimator_mode": _one_of(*INTEGRANDS),
    **_keys(TRUTH, "true_delta_h", "enabled report_per_token return_param_update_buf"),
    **_keys(COUNT, "true_delta_h", "importance_microbatch_size microbatch_size rl_grad_accum"),
    **_keys(NUMBER, "true_delta_h", "lr_override clip_c"),
    "true_delta_h.measure": _one_of("p", "q"),  # at temperature 1, or (the default) at that of sampling
    "true_delta_h.is_mode": _one_of("snis", "clip"),  # clip: no weight above clip_c times that of an unmoved sequence
    "true_delta_h.snapshot_device": _idle("nothing is snapshotted, because nothing is stepped in place", "cpu"),
    "true_delta_h.training_loss": _idle("the step is taken on the RL loss", "rl"),
    **_keys(TRUTH, "probe_reuse", "reuse_E reuse_U log_param_update_buf"),
    **_keys(PATH, "probe_reuse", "e_batch_cache_path u_batch_cache_path"),
    **_keys(NUMBER, "generation", "temperature"),
    **_keys(COUNT, "generation", "max_new_tokens gen_batch_size"),
    "generation.eos_token_id": TOKENS,
    "generation.top_p": _idle("rows are drawn from the whole distribution, which is what is scored", 1),
    "generation.do_sample": _idle("greedy completions have no distribution", True),
    "generation.rb_requires_grad": TRUTH,  # either asks for nothing
    "memory_config.amp": _idle("scores are taken in the model's own dtype; load it in checkpoint.dtype", False),
    "memory_config.dtype": _idle("load the model in checkpoint.dtype", "float32", "fp32"),
    "memory_config.microbatch_size": _idle("set computation_options.mb_size_prompts", 1),
    **_keys(PATH, "output", "results_path"),
    **_keys(LEVEL, "output", "log_level"),
    "distributed.find_unused_parameters": TRUTH,  # either asks for nothing
    "detailed_logging.enabled": _idle("results_path holds everything", False),
}
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}

#: Keys whose value is a name, where there is no such file.
NAMES = ("checkpoint.model_config_path", "batch_config.dataset_name")


class Settings:
    """A configuration, read key by key and checked as it is read: `settings.get("generation.temperature", 1.0)`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Settings:
        """Return the configuration in a YAML file, checked; relative paths are taken from its folder.

        Raises:
            ConfigError: If the file cannot be read, or a key is unknown, has a wrong value or can do nothing.
        """
        folder, found = Path(path).parent, cls(read_mapping(Path(path)))
        found.check()
        for key, value in list(found._entries()):
            if value and KEYS[key] is PATH and (key not in NAMES or (folder / value).exists()):
                section, _, name = key.partition(".")
                found.config[section][name] = str(folder / value)
        return found

    def get(self, key: str, default: Any = None, *, named: str | None = None) -> Any:
        """Return the value of a key, the default where it is absent or none; `named` names a key that has to be there.

        Raises:
            ConfigError: If it is missing, or no value that the key takes.
        """
        section, _, name = key.rpartition(".")
        found = self._section(section).get(name)
        if problem := _problem(key, found):
            raise ConfigError(f"{problem}.")
        if found is None and named is not None:
            raise ConfigError(f"{key} is missing; name {named}.")
        return default if found is None else found

    def check(self) -> None:
        """Check every key that there is, whether or not anything asks for it.

        Raises:
            ConfigError: If one is unknown, has a wrong value, or can do nothing.
        """
        if problems := [problem for key, value in self._entries() if (problem := _problem(key, value))]:
            raise ConfigError(f"The configuration asks for what is not done: {'; '.join(problems)}.")
        bound, is_clip = self.get("true_delta_h.clip_c", CLIP_C), self.get("true_delta_h.is_mode") == "clip"
        if not is_clip and bound != CLIP_C:
            raise ConfigError(f"clip_c is {bound}, and is_mode 'snis' clips nothing; set is_mode to 'clip'.")
        if is_clip and not bound > 1:
            raise ConfigError(f"clip_c is {bound}; expected more than 1, the weight where nothing has moved.")

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(B_E, B_U, G): prompts of E, with one completion each, prompts of U, and completions of each of these.

        Raises:
            ConfigError: If one is missing, or there are several of E.
        """
        several = self.get("batch_config.B_E_values")
        one = several[0] if isinstance(several, list) and len(several) == 1 else several
        b_e, b_u, group_size = (
            self.get("batch_config.B_E", one),
            self.get("batch_config.B_U"),
            self.get("batch_config.G"),
        )
        for name, size in {"B_E": b_e, "B_U": b_u, "G": group_size}.items():
            if not COUNT.fits(size):
                raise ConfigError(f"batch_config.{name} is {size!r}; expected {COUNT.expected}.")
        return b_e, b_u, group_size

    @property
    def clip(self) -> float:
        """The largest importance weight: infinite unless `is_mode` is clip."""
        is_clip = self.get("true_delta_h.is_mode") == "clip"
        return float(self.get("true_delta_h.clip_c", CLIP_C)) if is_clip else math.inf

    def entropies(self, largest: float = math.inf) -> dict[str, Entropy]:
        """Return the entropy per sequence and per token under sequence weights, none of them above `largest`."""
        integrand = INTEGRANDS[self.get("estimator.x_estimator_mode", "rb_residual")]
        found = {per: entropy(integrand, "sequence", per) for per in ("sequence", "token")}
        return dict(found) if largest == math.inf else {per: Clipped(**vars(o), c=largest) for per, o in found.items()}

    def objective(self) -> PolicyGradient:
        """Return the RL loss `Σ_i a_i Σ_t −min(r A, clip(r) A)`: Dr. GRPO over the base weights of `for_the_loss`.

        A = r − mean_g r where the batch brings rewards alone; `clip_eps` and `clip_+` bound the ratio below and above.
        """
        clip = {"epsilon": self.get("clip_eps", 0.2), "epsilon_high": self.get("clip_+")}
        return dr_grpo(**clip, beta=self.get("kl_beta", 0.0), use_bias_correction_kl=False, normaliser=1.0)

    def temperature(self, sequence_processor: Any = None) -> float:
        """Return the temperature that rows were sampled at: of section `generation`, of the processor, or 1."""
        of_processor = getattr(getattr(sequence_processor, "config", None), "temperature", None)
        return float(self.get("generation.temperature", 1.0 if of_processor is None else of_processor))

    def end_tokens(self, sequence_processor: Any, model: Any = None) -> list[int]:
        """Return the ids of end-of-sequence tokens: of section `generation`, of the tokenizer, or of the model."""
        of_tokenizer = getattr(getattr(sequence_processor, "tokenizer", None), "eos_token_id", None)
        of_model = getattr(getattr(model, "config", None), "eos_token_id", None)
        found = self.get("generation.eos_token_id", of_model if of_tokenizer is None else of_tokenizer)
        return [found] if isinstance(found, int) else list(found or [])

    def _entries(self) -> Iterator[tuple[str, Any]]:
        for name, value in self.config.items():
            inner = self._section(name).items() if name in SECTIONS else None
            yield from [(name, value)] if inner is None else ((f"{name}.{key}", each) for key, each in inner)

    def _section(self, name: str) -> Mapping[str, Any]:
        found = self.config.get(name) if name else self.config
        if found is not None and not isinstance(found, Mapping):
            raise ConfigError(f"{name} is {found!r}; expected keys of its own.")
        return found or {}


def _problem(key: str, found: Any) -> str | None:
    """Return the fault of a key's value, None where it is fine."""
    if key not in KEYS:
        return f"{key} is unknown"
    kind = KEYS[key]
    if found is None or kind.fits(found):
        return None
    if kind.idle:
        return f"{key}: {found!r} can do nothing ({kind.expected})"
    return f"{key} is {found!r}, a {type(found).__name__}; expected {kind.expected}"
