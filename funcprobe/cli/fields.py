"""The parts that a configuration is made of: strict models whose fields know expected values and meanings."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from funcprobe.errors import ConfigError, InputError, missing_extra
from funcprobe.estimators.by_name import observable_named, observable_names
from funcprobe.estimators.observables import entropy
from funcprobe.measurement.options import Options
from funcprobe.objectives.by_name import factory_of, objective, objective_names, options_of
from funcprobe.objectives.losses import BASES
from funcprobe.objectives.variants import VARIANTS
from funcprobe.types import Objective

try:
    from pydantic import (
        AfterValidator,
        BaseModel,
        BeforeValidator,
        ConfigDict,
        Field,
        create_model,
        model_serializer,
        model_validator,
    )
    from pydantic_core import PydanticCustomError
except ImportError as error:
    missing = missing_extra("pydantic", "app", "reading a configuration")
    raise missing from error


def key(default: Any, expected: str, meaning: str, **limits: Any) -> Any:
    """Return a field that knows its expected values (for messages) and its meaning (for `--help`)."""
    return Field(default, description=meaning, json_schema_extra={"expected": expected}, **limits)


def _path(value: Any) -> Path:
    if isinstance(value, str | Path) and str(value).strip():
        return Path(value)
    raise PydanticCustomError("path", "not a path")


#: A path; text is taken for one, a number is not.
FilePath = Annotated[Path, BeforeValidator(_path)]


def _listed(value: Any) -> Any:
    """Return a tuple of names from a list, or from `reward, kl` as it stands on a command line."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    return tuple(value) if isinstance(value, list) else () if value is None else value


def _known(names: tuple[str, ...]) -> tuple[str, ...]:
    """Check that every name is an observable's, and that it can be made.

    Raises:
        ValueError: If one is not.
    """
    for name in names:
        if name not in (known := observable_names()):
            raise ValueError(f"found {name!r}, expected a list of {', '.join(known[:-1])} and {known[-1]}")
        observable_named(name)
    return names


#: Names in a list, or with commas between them.
Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]

#: Names of observables that can be read beside the entropy.
Observables = Annotated[Names, AfterValidator(_known)]


class Strict(BaseModel):
    """Frozen; no key that it does not know, no text for a number, no number for a truth value."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ObjectiveConfig(Strict):
    """An objective by name; the options are those of its factory, so `objective_model` adds them."""

    name: str = key("grpo", "the name of an objective", "the loss, under TRL's name")

    @model_validator(mode="after")
    def _in_range(self) -> ObjectiveConfig:
        self.build()
        return self

    def build(self) -> Objective:
        """Return the objective itself."""
        return objective(self.name, **self.model_dump(exclude={"name"}))


class VariantConfig(ObjectiveConfig):
    """A variant over a base, which is named too: its options are its own and the base's, whose defaults they have.

    The model has a field for every option of every base. Those that the base lacks are never set, and not written.
    """

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        options = options_of(cls.model_fields["name"].default, values.get("base", "grpo"))
        return {**{option: parameter.default for option, parameter in options.items()}, **values}

    @model_serializer(mode="wrap")
    def _without_unset(self, serialise: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {k: v for k, v in serialise(self).items() if k == "name" or k in self.model_fields_set}


def objective_model(name: str) -> type[ObjectiveConfig]:
    """Return the model of the objective of that name: the parameters of its factory, with their types and defaults.

    Raises:
        ConfigError: If there is no such objective, several have the name, or another package's cannot be loaded.
    """
    if name not in (known := objective_names()):
        near = next(iter(difflib.get_close_matches(name, known, n=1)), None)
        meant = "" if near is None else f" (did you mean {near}?)"
        raise ConfigError(f"objective.name: found {name!r}, expected one of {', '.join(known)}{meant}")
    try:
        return _model_of(name, factory_of(name))
    except InputError as error:
        raise ConfigError(f"objective.name: {str(error).rstrip('.')}") from None


@functools.cache
def _model_of(name: str, factory: Callable[..., Any]) -> type[ObjectiveConfig]:
    options = _fields(factory)
    if name not in VARIANTS:
        return create_model(f"{name}_config", __base__=ObjectiveConfig, name=(str, name), **options)
    # where types differ the first one stands: epsilon_high may be none, but for cispo, which says so itself
    inherited = {option: f for base in reversed(BASES.values()) for option, f in _fields(base, unset=True).items()}
    options = {**inherited, **options, "base": (str, key("grpo", "the name of a loss", ""))}
    return create_model(f"{name}_config", __base__=VariantConfig, name=(str, name), **options)


#: What the options of `entropy` mean; names, types and defaults are its own.
_MEANING = {
    "integrand": "rao_blackwell or surprisal: entropy of each distribution, or −log p",
    "weighting": "per_decision or sequence: how importance weights multiply",
    "per": "token or sequence: nats per which",
    "proposal": "anchor or sampler: weigh against recomputed log-probs, or the sampler's",
    "control_variate": "subtract the mean of a prompt's other rollouts",
}


def observable_model() -> type[Strict]:
    """Return the model of a member of the entropy family: the parameters of `entropy`, with types and defaults."""
    return create_model("ObservableConfig", __base__=Strict, **_fields(entropy, meaning=_MEANING))


#: Options of a measurement that a configuration has no key for: `keep_scores` keeps tensors in memory, not on disk.
_NO_KEY = ("keep_scores",)

#: Options of a measurement that have a key.
MEASURING = tuple(f.name for f in dataclasses.fields(Options) if f.name not in _NO_KEY)


def option_fields() -> dict[str, Any]:
    """Return a field for every option of a measurement; how batches are cut has two keys of its own."""
    return {name: option(name) for name in MEASURING if name != "microbatch"}


def option(name: str) -> tuple[Any, Any]:
    """Return type and field of an option of a measurement, with the default and the words that `Options` gives it."""
    (found,) = (f for f in dataclasses.fields(Options) if f.name == name)
    words = found.metadata
    return get_type_hints(Options)[name], key(found.default, words["expected"], words["meaning"], **words["limits"])


def default_of(name: str) -> Any:
    """Return the default of an option of a measurement."""
    return next(f.default for f in dataclasses.fields(Options) if f.name == name)


def _fields(
    factory: Callable[..., Any], *, unset: bool = False, meaning: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return a field for every option of a factory, with its default or, `unset`, with None."""
    hints = get_type_hints(factory)
    fields = {}
    for name, parameter in inspect.signature(factory).parameters.items():
        if name == "base" or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        hint = hints.get(name, Any)
        words = _words(hint)
        default = None if unset else ... if parameter.default is parameter.empty else parameter.default
        fields[name] = (Any if words is None else hint, key(default, words or "a value", (meaning or {}).get(name, "")))
    return fields


def _words(hint: Any) -> str | None:
    """Return the words for a value of that type; None for a type that a configuration cannot hold."""
    if get_origin(hint) is not Literal:
        return _EXPECTED.get(hint) if isinstance(hint, Hashable) else None
    *others, last = map(str, get_args(hint))
    return f"{', '.join(others)} or {last}" if others else last


_EXPECTED: dict[Any, str] = {
    bool: "true or false",
    str: "a word",
    int: "an integer",
    int | None: "an integer, or none",
    float: "a number",
    float | None: "a number, or none",
}
