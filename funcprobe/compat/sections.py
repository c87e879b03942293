"""The YAML files of the stateful system: which keys there are, and which of them mean anything here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from funcprobe.compat import settings
from funcprobe.errors import ConfigError

#: Keys that are honoured, by section; "" holds the top level. `true_delta_h` is read by `Importance`.
HONOURED: dict[str, tuple[str, ...]] = {
    "": ("learning_rate", "clip_eps", "clip_+", "kl_beta", "max_grad_norm"),
    "checkpoint": ("checkpoint_path", "optimizer_path", "model_config_path", "dtype", "device_map"),
    "batch_config": ("dataset_name", "reward", "split", "E_split", "U_split", "B_E", "B_E_values", "B_U", "G"),
    "computation_options": ("mb_size_prompts", "weighting_mode", "master_seed"),
    "estimator": ("weighting_mode", "x_estimator_mode"),
    "probe_reuse": ("reuse_E", "reuse_U", "e_batch_cache_path", "u_batch_cache_path", "log_param_update_buf"),
    "generation": ("temperature", "max_new_tokens", "gen_batch_size", "eos_token_id"),
    "output": ("results_path", "log_level"),
    "memory_config": (),
    "distributed": (),
    "detailed_logging": (),
}

#: Keys that do nothing here, with the values that ask for nothing, and why any other is refused.
IDLE: dict[tuple[str, str], tuple[tuple[Any, ...], str]] = {
    ("checkpoint", "use_qlora"): ((False,), "quantised weights are not read"),
    ("computation_options", "compute_delta_h1"): ((True,), "δH₁ is what a probe is for"),
    ("computation_options", "rl_grad_accum"): ((1,), "it belongs to true_delta_h"),
    ("generation", "top_p"): ((1, None), "rows are drawn from the whole distribution, which is what is scored"),
    ("generation", "do_sample"): ((True,), "greedy completions have no distribution"),
    ("generation", "rb_requires_grad"): ((True, False), ""),
    ("memory_config", "amp"): ((False,), "scores are taken in the model's own dtype; load it in checkpoint.dtype"),
    ("memory_config", "dtype"): (("float32", "fp32", None), "load the model in checkpoint.dtype"),
    ("memory_config", "microbatch_size"): ((1, None), "set computation_options.mb_size_prompts"),
    ("distributed", "find_unused_parameters"): ((True, False), ""),
    ("detailed_logging", "enabled"): ((False,), "results_path holds everything"),
}


class Sections:
    """A configuration of the stateful system, its keys known to do what they say.

    Raises:
        ConfigError: If a key is unknown, or stands at a value that can do nothing.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        known = {*HONOURED, "true_delta_h"} - {""}
        problems = [f"there is no key '{key}'" for key in config if key not in known | {*HONOURED[""]}]
        for name in HONOURED:
            values = (
                {k: v for k, v in config.items() if k not in known} if name == "" else settings.section(config, name)
            )
            problems += [said for key, value in values.items() if name and (said := _problem(name, key, value))]
        if problems:
            raise ConfigError(f"The configuration asks for what is not done: {'; '.join(problems)}.")
        settings.Importance.read(self.section("true_delta_h"))
        settings.entropies(config)
        settings.objective(config)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Sections:
        """Return the configuration in a YAML file, every value typed; relative paths are taken from its folder.

        Raises:
            ConfigError: If the file cannot be read, or a key cannot be used.
            MissingExtraError: If PyYAML is not installed.
        """
        from funcprobe.cli.yaml_values import read_mapping

        place = Path(path)
        values = read_mapping(place)
        for name, keys in PATHS.items():
            for key in keys:
                value = values.get(name, {}).get(key) if isinstance(values.get(name), dict) else None
                if isinstance(value, str) and (key not in MAYBE_PATHS or (place.parent / value).exists()):
                    values[name][key] = str(place.parent / value)
        return cls(values)

    def section(self, name: str) -> Mapping[str, Any]:
        """Return a section; an absent one is empty."""
        return settings.section(self.config, name)

    @property
    def learning_rate(self) -> float | None:
        """The rate that the optimizer is loaded with; none takes the saved one, or the override where that is 0."""
        found = self.config.get("learning_rate")
        override = self.section("true_delta_h").get("lr_override")
        return settings.number(self.config, "learning_rate", 0.0) if found is not None else override

    @property
    def weighting_mode(self) -> str:
        """The one weighting mode; two sections may name it, and have to agree.

        Raises:
            ConfigError: If they do not.
        """
        sections = [self.section(name) for name in ("estimator", "computation_options")]
        found = [str(values["weighting_mode"]) for values in sections if values.get("weighting_mode") is not None]
        if len(set(found)) > 1:
            raise ConfigError(f"weighting_mode is {' and '.join(found)} in two sections; write it once.")
        return found[0] if found else "dr_grpo"

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(B_E, B_U, G): prompts of E, with one completion each, prompts of U, and completions of each of these.

        Raises:
            ConfigError: If one is missing or no whole number.
        """
        batch = dict(self.section("batch_config"))
        several = batch.pop("B_E_values", None)
        if several is not None and "B_E" not in batch:
            if isinstance(several, list) and len(several) != 1:
                raise ConfigError(f"batch_config.B_E_values is {several}; one probe has one size of E, so write B_E.")
            batch["B_E"] = several[0] if isinstance(several, list) else several
        b_e, b_u, group_size = (settings.whole(batch, key, section="batch_config.") for key in ("B_E", "B_U", "G"))
        return b_e, b_u, group_size


#: Keys that hold a path; those of MAYBE_PATHS only where there is such a file, otherwise a name.
PATHS = {
    "checkpoint": ("checkpoint_path", "optimizer_path", "model_config_path"),
    "batch_config": ("dataset_name",),
    "probe_reuse": ("e_batch_cache_path", "u_batch_cache_path"),
    "output": ("results_path",),
}
MAYBE_PATHS = ("model_config_path", "dataset_name")


def _problem(section: str, key: str, value: Any) -> str:
    """Return what is wrong with a key of a section, nothing where it is fine."""
    if key in HONOURED[section]:
        return ""
    if (section, key) not in IDLE:
        return f"{section}.{key} is unknown"
    accepted, why = IDLE[section, key]
    return "" if value in accepted else f"{section}.{key}: {value!r} can do nothing ({why})"
