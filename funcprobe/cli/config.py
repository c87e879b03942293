"""The configuration of `funcprobe run`: one typed, frozen value, from a YAML file and `--key value` overrides.

Relative paths in the file are relative to the file's folder, those of overrides to the working directory.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from funcprobe.cli.fields import (
    FilePath,
    Further,
    ObjectiveConfig,
    ObservableConfig,
    Strict,
    further,
    key,
    objective_model,
)
from funcprobe.cli.messages import check_known, explain, show
from funcprobe.cli.yaml_values import read_mapping, scalar, yaml
from funcprobe.errors import ConfigError, missing_extra
from funcprobe.types import Microbatch, Observable, TokenBudget

try:
    from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, model_validator
except ImportError as error:
    missing = missing_extra("pydantic", "app", "reading a configuration")
    raise missing from error

#: Fields that hold a path; `base_model` may also be a name in the local Hugging Face cache.
PATHS = ("checkpoint", "base_model", "evaluation", "update", "output")


class Config(Strict):
    """Everything a run depends on."""

    checkpoint: FilePath = key(..., "the path of a checkpoint folder", "Hugging Face or TRL folder")
    base_model: str | None = key(
        None, "a folder, a model name, or none", "base of an adapter; none: as it names it", min_length=1
    )
    optimizer: Literal["auto", "fresh"] | None = key(
        "auto", "auto, fresh or none", "auto reads optimizer.pt; fresh is a new AdamW at lr"
    )
    lr: float | None = key(None, "a number ≥ 0, or none", "learning rate; none: the saved one", ge=0)
    dtype: str = key("float32", "the name of a floating-point dtype, or auto", "what the weights are loaded as")
    storage: str | None = key(
        "auto",
        "auto, none, or the name of a floating-point dtype",
        "what the run keeps weights and moments in; auto: as saved",
        min_length=1,
    )
    device: str = key("auto", "auto, cpu, cuda or cuda:N", "where the model runs; auto: CUDA where there is one")
    evaluation: FilePath = key(..., "the path of a rollout file", "rollouts E that measure the step")
    update: FilePath = key(..., "the path of a rollout file", "rollouts U that the step is taken on")
    objective: SerializeAsAny[ObjectiveConfig] = Field(
        default_factory=lambda: objective_model("grpo")(),
        description="the loss: a name and its options",
        json_schema_extra={"expected": "keys of its own, objective.name and the options of that objective"},
    )
    max_grad_norm: float | None = key(None, "a number > 0, or none", "clip the gradient's global norm", gt=0)
    microbatch: int | None = key(None, "an integer ≥ 1, or none", "sequences at a time", ge=1)
    microbatch_tokens: int | None = key(
        4096, "an integer ≥ 1, or none", "tokens at a time, padding included; none: no cutting", ge=1
    )
    observable: ObservableConfig = Field(
        default_factory=ObservableConfig,
        description="what is measured: a member of the entropy family",
        json_schema_extra={"expected": "keys of its own: integrand, weighting, per, proposal"},
    )
    also: Further = key(
        (), "a list of reward, kl, kl_before and length", "read beside it, a list: reward, kl, kl_before, length"
    )
    mode: Literal["auto", "forward", "reverse"] = key(
        "auto", "auto, forward or reverse", "how δF₁ is taken; auto: forward where the model allows"
    )
    method: Literal["auto", "difference", "path"] = key(
        "auto", "auto, difference or path", "how ΔF is measured; auto: by a path where float32 cannot subtract"
    )
    tolerance: float = key(1e-5, "a number > 0", "what a path has to agree to, relative to Σ|terms|", gt=0)
    order: Literal["auto", 1, 2] = key(
        "auto", "auto, 1 or 2", "2 adds δF₂ and the crossover; auto: in a sweep, not in a run"
    )
    bars: Literal["auto", "jackknife", "infinitesimal", "bootstrap"] | None = key(
        "auto", "auto, jackknife, infinitesimal, bootstrap or none", "error bars over prompts"
    )
    level: float = key(0.95, "a number between 0 and 1", "coverage of the bars' intervals", gt=0, lt=1)
    seed: int = key(0, "an integer ≥ 0", "of the bootstrap", ge=0)
    rounding: Literal["auto"] | bool = key(
        "auto", "auto, true or false", "true, false or auto: the effect of storing θ′ in its dtype"
    )
    ess_threshold: float = key(0.1, "a number from 0 to 1", "least effective sample, of all rollouts", ge=0, le=1)
    on_low_ess: Literal["warn", "raise"] = key("warn", "warn or raise", "warn or raise below ess_threshold")
    top_k: int = key(10, "an integer ≥ 0", "how many of the most moved leaves are listed", ge=0)
    keep_delta: bool = key(False, "true or false", "write Δθ beside the result, as safetensors")
    output: FilePath = key(Path("results"), "the path of a folder", "where the results go")
    force: bool = key(False, "true or false", "replace the results of an earlier run in output")

    @model_validator(mode="before")
    @classmethod
    def _one_microbatch(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("microbatch") is not None:
            return {"microbatch_tokens": None, **values}
        return values

    @model_validator(mode="after")
    def _every_key_counts(self) -> Config:
        if said := _idle_keys(self):
            raise ValueError("; ".join(said))
        return self

    @property
    def microbatching(self) -> Microbatch:
        """How batches are cut: by `microbatch` sequences, by `microbatch_tokens` tokens, or not at all."""
        return self.microbatch or (None if self.microbatch_tokens is None else TokenBudget(self.microbatch_tokens))

    @property
    def observables(self) -> dict[str, Observable]:
        """What is measured, by name: the entropy first."""
        return {"entropy": self.observable.build(), **{name: further(name) for name in self.also}}

    def measuring(self) -> dict[str, Any]:
        """Return the options that a probe and a sweep share, by the names of their keywords."""
        names = ("mode", "method", "tolerance", "bars", "level", "seed", "ess_threshold", "on_low_ess")
        return {**{name: getattr(self, name) for name in names}, "microbatch": self.microbatching}

    def probing(self) -> dict[str, Any]:
        """Return the options that the commands of one step share, by the names of their keywords."""
        names = ("observables", "rounding", "top_k", "keep_delta")
        own = {name: getattr(self, name) for name in names}
        return {**own, "order": 2 if self.order == 2 else 1, **self.measuring()}  # "auto" is 1 where there is one step


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Return the configuration in a YAML file, with overrides such as `["--objective.name", "dapo", "--lr", "2e-8"]`.

    Raises:
        ConfigError: Naming every field that is wrong, what was found and what was expected.
        MissingExtraError: If pydantic or PyYAML is not installed.
    """
    path = Path(path)
    values = _located({"output": "results", **read_mapping(path)}, path.parent)
    for name, value in parse_overrides(overrides).items():
        _set(values, name, value)
    problems: list[str] = []
    if isinstance(values.setdefault("objective", {}), dict):
        values["objective"] = _objective(values["objective"], problems)
    found = _validated(Config, values, (), problems)
    if problems:
        raise ConfigError(f"{path}: {'; '.join(dict.fromkeys(problems))}.")
    return cast(Config, found)


def dump(config: Config) -> str:
    """Return the configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def describe_keys() -> str:
    """Return a line a key: its name, its default, what it means."""
    from funcprobe.objectives.by_name import OBJECTIVES

    lines = []
    for name, field in Config.model_fields.items():
        if name == "objective":
            first, *more = textwrap.wrap(", ".join(OBJECTIVES), 74)
            lines += [_line("objective.name", "grpo", first), *(_line("", "", rest) for rest in more)]
            lines.append(
                _line("objective.OPTION", "", "an option of that objective: epsilon, beta, base, scale_rewards, ...")
            )
        elif name == "observable":
            lines += [
                _line(f"{name}.{key}", f.default, f.description) for key, f in ObservableConfig.model_fields.items()
            ]
        else:
            default = "required" if field.is_required() else "[]" if field.default == () else field.default
            lines.append(_line(name, default if isinstance(default, str | Path) else show(default), field.description))
    return "\n".join(lines)


def _line(name: str, default: object, meaning: str | None) -> str:
    return f"  {name:<28}{default!s:<14}{meaning}"


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Return {dotted key: value} of `--key value` and `--key=value`; paths are made absolute.

    A truth value may stand alone: `--force`. Hyphens and underscores are one.

    Raises:
        ConfigError: If a word is no option, an option is unknown or stands twice, or a value is missing.

    Example:
        >>> parse_overrides(["--max-grad-norm", "1", "--objective.epsilon=.1", "--force"])
        {'max_grad_norm': 1, 'objective.epsilon': 0.1, 'force': True}
    """
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"'{word}' stands where an option was expected; options have the form --key value.")
        name, has_value, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if not name.startswith("objective."):
            check_known(name, Config, option=True)
        if name in found:
            raise ConfigError(f"--{name} stands twice; give it once.")
        if not has_value and (not rest or rest[0].startswith("--")):
            if name not in Config.model_fields or Config.model_fields[name].annotation is not bool:
                raise ConfigError(f"--{name} has no value; write --{name} VALUE.")
            text = "true"
        elif not has_value:
            text = rest.pop(0)
        found[name] = text if name in PATHS and scalar(text) is not None else scalar(text)
    return _located(found, Path.cwd())


def _objective(values: dict[str, Any], problems: list[str]) -> ObjectiveConfig | None:
    """Return the objective, or say in `problems` what is wrong with it."""
    name = values.get("name", "grpo")
    try:
        model = objective_model(name if isinstance(name, str) else show(name))
    except ConfigError as error:
        problems.append(str(error))
        return None
    # `scale_rewards: none` is a word among words, unlike `delta: none`
    words = {name: "none" for name, f in model.model_fields.items() if f.annotation is str and name in values}
    return _validated(
        model, {name: words.get(name, v) if v is None else v for name, v in values.items()}, ("objective",), problems
    )


def _validated(
    model: type[BaseModel], values: dict[str, Any], prefix: tuple[str, ...], problems: list[str]
) -> Any | None:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        known = bool(problems)  # an objective that failed has been explained already
        problems += [line for line in explain(error, model, prefix) if not (known and line.startswith("objective:"))]
        return None


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    outer, dot, inner = dotted.partition(".")
    if not dot:
        values[outer] = value
        return
    inside = values.get(outer)
    values[outer] = {**inside, inner: value} if isinstance(inside, dict) else {inner: value}


def _located(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the values with relative paths taken from `folder`; a base model that is no path there stays a name."""
    result = dict(values)
    for name in PATHS:
        text = values.get(name)
        if not isinstance(text, str) or not text.strip():
            continue
        path = Path(os.path.abspath(folder / Path(text).expanduser()))
        is_name = name == "base_model" and not text.startswith((".", "/", "~")) and not path.exists()
        result[name] = text if is_name else str(path)
    return result


def _idle_keys(config: Config) -> list[str]:
    """Say which keys could do nothing, or not what they say."""
    said = []
    if config.microbatch is not None and config.microbatch_tokens is not None:
        said.append("microbatch and microbatch_tokens exclude one another; leave one out, or set it to none")
    if config.optimizer == "fresh" and config.lr is None:
        said.append("lr: missing, and optimizer fresh has no learning rate of its own; give one")
    if config.optimizer is None and config.lr is not None:
        said.append("lr: can do nothing with optimizer none; leave one of them out")
    if config.mode == "reverse" and config.rounding is False:
        said.append("rounding: false can do nothing in mode reverse, where the row is free; leave it out")
    if config.mode == "reverse" and config.method == "path":
        said.append("method: path is made of forward-mode passes; use mode auto or forward with it")
    if config.mode == "reverse" and config.order == 2:
        said.append("order: 2 is made of forward-mode passes; use mode auto or forward with it")
    if config.method == "difference" and config.tolerance != 1e-5:
        said.append("tolerance: can do nothing with method difference; leave one of them out")
    if config.bars is None and config.level != 0.95:
        said.append("level: can do nothing without bars; leave one of them out")
    if config.seed and config.bars != "bootstrap":
        said.append("seed: can do nothing without bars bootstrap; leave one of them out")
    if config.ess_threshold == 0 and config.on_low_ess == "raise":
        said.append("on_low_ess: raise can do nothing with ess_threshold 0; set a threshold above 0")
    return said
