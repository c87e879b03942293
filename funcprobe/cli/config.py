"""The configuration of the commands: one typed, frozen value, from a YAML file and `--key value` overrides.

Relative paths in the file are relative to the file's folder, those of overrides to the working directory.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from funcprobe import plugins
from funcprobe.cli.fields import (
    MEASURING,
    FilePath,
    Names,
    ObjectiveConfig,
    Observables,
    Strict,
    default_of,
    key,
    objective_model,
    observable_model,
    option_fields,
)
from funcprobe.cli.messages import MOST, explain, show
from funcprobe.cli.overrides import located, parsed_overrides, set_key
from funcprobe.cli.yaml_values import dumped, read_mapping
from funcprobe.data.paths import path_of
from funcprobe.errors import ConfigError, missing_extra
from funcprobe.estimators.by_name import observable_named, observable_names
from funcprobe.estimators.observables import entropy
from funcprobe.objectives.by_name import objective_names
from funcprobe.types import Microbatch, Observable, TokenBudget

try:
    from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, create_model, model_validator
except ImportError as error:
    missing = missing_extra("pydantic", "app", "reading a configuration")
    raise missing from error

ObservableConfig = observable_model()


class Inputs(Strict):
    """The keys of a configuration that every command shares: inputs, the step, and the observables."""

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
    offload: Literal["cpu"] | None = key(
        None, "cpu, or none", "cpu keeps moments and gradient off the device: for a model that would not fit"
    )
    shard: bool = key(
        False, "true or false", "under torchrun: each process keeps an N-th of the leaves, moments and gradient"
    )
    evaluation: FilePath = key(..., "the path of a rollout file", "rollouts E that measure the step")
    batch: FilePath = key(..., "the path of a rollout file", "rollouts U that the step is taken on")
    temperature: float | None = key(
        None, "a number > 0, or none", "of rollouts in a framework's dump, which does not say", gt=0
    )
    step: int | None = key(
        None, "an integer ≥ 0, or none", "whose rows of a dump are read; none: the checkpoint's next", ge=0, lt=2**63
    )
    objective: SerializeAsAny[ObjectiveConfig] = Field(
        default_factory=lambda: objective_model("grpo")(),
        description="the loss: a name and its options; the framework's where one is recognised",
        json_schema_extra={"expected": "keys of its own, objective.name and the options of that objective"},
    )
    max_grad_norm: float | None = key(
        None, "a number > 0, or none", "clip the gradient's global norm; left out: a recognised framework's", gt=0
    )
    microbatch: int | None = key(None, "an integer ≥ 1, or none", "sequences at a time", ge=1)
    microbatch_tokens: int | None = key(
        default_of("microbatch").tokens,
        "an integer ≥ 1, or none",
        "tokens at a time, padding included; none: no cutting",
        ge=1,
    )


#: What is measured, and how: a key for every option of `entropy` and for every field of `Options`, with its words.
_Measuring: Any = create_model(
    "_Measuring",
    __base__=Inputs,
    observable=(
        ObservableConfig,
        Field(
            default_factory=ObservableConfig,
            description="what is measured: a member of the entropy family",
            json_schema_extra={"expected": f"keys of its own: {', '.join(ObservableConfig.model_fields)}"},
        ),
    ),
    also=(Observables, key((), "a list of names", "read beside it, a list")),
    **option_fields(),
)


class Config(_Measuring, Inputs):
    """Everything that a command depends on."""

    trackers: Names = key((), "a list of names", "trackers of installed packages that are given the result, a list")
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
        if idle := _idle_keys(self):
            raise ValueError("; ".join(idle))
        return self

    @property
    def microbatching(self) -> Microbatch:
        """How batches are cut: by `microbatch` sequences, by `microbatch_tokens` tokens, or not at all."""
        return self.microbatch or (None if self.microbatch_tokens is None else TokenBudget(self.microbatch_tokens))

    @property
    def observables(self) -> dict[str, Observable]:
        """The observables to measure, by name: the entropy first."""
        return {
            "entropy": entropy(**self.observable.model_dump()),
            **{name: observable_named(name) for name in self.also},
        }

    def options(self, *without: str) -> dict[str, Any]:
        """Return the options of a measurement by the names of their keywords, but for those that are named."""
        every = {name: getattr(self, name) for name in MEASURING} | {"microbatch": self.microbatching}
        return {name: value for name, value in every.items() if name not in without}


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = (), own: Sequence[str] = ()) -> Config:
    """Return the configuration in a YAML file, with overrides such as `["--objective.name", "dapo", "--lr", "2e-8"]`.

    `own` are a command's own options, for the message about a word that is neither.

    Raises:
        ConfigError: Naming every field that is wrong, what was found and what was expected.
        MissingExtraError: If pydantic or PyYAML is not installed.
    """
    path = path_of(path, "CONFIG.yaml")
    values = located({"output": "results", **read_mapping(path)}, path.parent)
    for name, value in parse_overrides(overrides, own).items():
        set_key(values, name, value)
    problems: list[str] = []
    if isinstance(values.get("objective"), dict):
        values["objective"] = _objective(values["objective"], problems)
    found = _validated(Config, values, (), problems)
    if problems:
        every = list(dict.fromkeys(problems))
        more = "; and more" if len(every) > MOST or len(values) > 10 * len(Config.model_fields) else ""
        raise ConfigError(f"{path}: {'; '.join(every[:MOST])}{more}.")
    return cast(Config, found)


def parse_overrides(words: Sequence[str], own: Sequence[str] = ()) -> dict[str, Any]:
    """Return {dotted key: value} of words that override keys of a configuration; see `parsed_overrides`.

    Example:
        >>> parse_overrides(["--max-grad-norm", "1", "--objective.epsilon=.1", "--force"])
        {'max_grad_norm': 1, 'objective.epsilon': 0.1, 'force': True}
    """
    return parsed_overrides(words, Config, own)


def dump(config: Config) -> str:
    """Return the configuration as YAML that `load_config` reads back to an equal one."""
    return dumped(config.model_dump(mode="json"))


#: Where the defaults of `objective` and `max_grad_norm` come from.
_RECOGNISED = "without objective, what a framework that is recognised takes"


def describe_keys(columns: int = 120) -> str:
    """Return a line a key, or several where they have to fit into columns: its name, default and meaning."""
    width = max(columns - 44, 32)
    listed = {"also": observable_names(), "trackers": plugins.names("tracker", {})}
    lines = []
    for name, field in Config.model_fields.items():
        if name == "objective":
            lines += _lines("objective.name", "grpo", f"{', '.join(objective_names())}; {_RECOGNISED}", width)
            lines += _lines("objective.OPTION", "", "an option of it: epsilon, beta, base, scale_rewards, ...", width)
        elif name == "observable":
            for inner, f in ObservableConfig.model_fields.items():
                lines += _lines(f"{name}.{inner}", f.default, f.description, width)
        else:
            default = "required" if field.is_required() else "[]" if field.default == () else field.default
            names = f": {', '.join(listed[name])}" if listed.get(name) else ""
            lines += _lines(name, default, f"{field.description}{names}", width)
    return "\n".join(lines)


def _lines(name: str, default: object, meaning: str | None, width: int) -> list[str]:
    first, *more = textwrap.wrap(meaning or "", width)
    shown = default if isinstance(default, str | Path) else show(default)
    return [f"  {name:<28}{shown!s:<14}{first}", *(" " * 44 + rest for rest in more)]


def _objective(values: dict[str, Any], problems: list[str]) -> ObjectiveConfig | None:
    """Return the objective, or add to `problems` the reason why there is none."""
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


def _idle_keys(config: Config) -> list[str]:
    """Say which keys could do nothing, or something else than they say."""
    idle = []
    if config.microbatch is not None and config.microbatch_tokens is not None:
        idle.append("microbatch and microbatch_tokens exclude one another; leave one out, or set it to none")
    if config.optimizer == "fresh" and config.lr is None:
        idle.append("lr: missing, and optimizer fresh has no learning rate of its own; give one")
    if config.optimizer is None and config.lr is not None:
        idle.append("lr: can do nothing with optimizer none; leave one of them out")
    if config.mode == "reverse" and config.rounding is False:
        idle.append("rounding: false can do nothing in mode reverse, where the row is free; leave it out")
    if config.mode == "reverse" and config.method == "path":
        idle.append("method: path is made of forward-mode passes; use mode auto or forward with it")
    if config.mode == "reverse" and config.order == 2:
        idle.append("order: 2 is made of forward-mode passes; use mode auto or forward with it")
    if config.method == "difference" and config.tolerance != default_of("tolerance"):
        idle.append("tolerance: can do nothing with method difference; leave one of them out")
    if config.bars is None and config.level != default_of("level"):
        idle.append("level: can do nothing without bars; leave one of them out")
    if config.seed and config.bars != "bootstrap":
        idle.append("seed: can do nothing without bars bootstrap; leave one of them out")
    if config.ess_threshold == 0 and config.on_low_ess == "raise":
        idle.append("on_low_ess: raise can do nothing with ess_threshold 0; set a threshold above 0")
    return idle
