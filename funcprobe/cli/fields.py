"""The parts that a configuration is made of: strict models whose fields know what they expect and what they mean."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from funcprobe.errors import ConfigError, missing_extra
from funcprobe.types import Objective, Observable

try:
    from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_serializer, model_validator
    from pydantic_core import PydanticCustomError
except ImportError as error:
    missing = missing_extra("pydantic", "app", "reading a configuration")
    raise missing from error


def key(default: Any, expected: str, meaning: str, **limits: Any) -> Any:
    """Return a field that knows what it expects (for messages) and what it means (for `--help`)."""
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


#: Observables that can be read beside the entropy, by the names that a configuration gives them.
Further = Annotated[tuple[Literal["reward", "kl", "kl_before", "length"], ...], BeforeValidator(_listed)]


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
        from funcprobe.objectives.by_name import objective

        return objective(self.name, **self.model_dump(exclude={"name"}))


class VariantConfig(ObjectiveConfig):
    """A variant over a base, which is named too: its options are its own and the base's, whose defaults they have.

    The model has a field for every option of every base. Those that the base lacks are never set, and not written.
    """

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, values: Any) -> Any:
        from funcprobe.objectives.by_name import options_of

        if not isinstance(values, dict):
            return values
        options = options_of(cls.model_fields["name"].default, values.get("base", "grpo"))
        return {**{option: parameter.default for option, parameter in options.items()}, **values}

    @model_serializer(mode="wrap")
    def _without_unset(self, serialise: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {k: v for k, v in serialise(self).items() if k == "name" or k in self.model_fields_set}


class ObservableConfig(Strict):
    """A member of the entropy family."""

    def build(self) -> Observable:
        """Return the estimator itself."""
        from funcprobe.estimators.observables import entropy

        return entropy(**self.model_dump())

    integrand: Literal["rao_blackwell", "surprisal"] = key(
        "rao_blackwell",
        "rao_blackwell or surprisal",
        "rao_blackwell or surprisal: entropy of each distribution, or −log p",
    )
    weighting: Literal["per_decision", "sequence"] = key(
        "per_decision", "per_decision or sequence", "per_decision or sequence: how importance weights multiply"
    )
    per: Literal["token", "sequence"] = key("token", "token or sequence", "token or sequence: nats per which")
    proposal: Literal["anchor", "sampler"] = key(
        "anchor", "anchor or sampler", "anchor or sampler: weigh against recomputed log-probs, or the sampler's"
    )
    control_variate: bool = key(False, "true or false", "subtract the mean of a prompt's other rollouts")


def further(name: str) -> Observable:
    """Return the observable of that name."""
    from funcprobe.estimators.divergence import kl
    from funcprobe.estimators.returns import expected_reward, mean_length

    factories: dict[str, Callable[[], Observable]] = {
        "reward": expected_reward,
        "kl": kl,
        "kl_before": functools.partial(kl, "before"),
        "length": mean_length,
    }
    return factories[name]()


@functools.cache
def objective_model(name: str) -> type[ObjectiveConfig]:
    """Return the model of the objective of that name: the parameters of its factory, with their types and defaults.

    Raises:
        ConfigError: If there is no such objective.
    """
    from funcprobe.objectives.by_name import BASES, OBJECTIVES, VARIANTS

    if name not in OBJECTIVES:
        near = next(iter(difflib.get_close_matches(name, OBJECTIVES, n=1)), None)
        meant = "" if near is None else f" (did you mean {near}?)"
        raise ConfigError(f"objective.name: found {name!r}, expected one of {', '.join(OBJECTIVES)}{meant}")
    options = _fields(OBJECTIVES[name])
    if name not in VARIANTS:
        return create_model(f"{name}_config", __base__=ObjectiveConfig, name=(str, name), **options)
    # where types differ the first one stands: epsilon_high may be none, but for cispo, which says so itself
    inherited = {option: f for base in reversed(BASES.values()) for option, f in _fields(base, unset=True).items()}
    options = {**inherited, **options, "base": (str, key("grpo", "the name of a loss", ""))}
    return create_model(f"{name}_config", __base__=VariantConfig, name=(str, name), **options)


def _fields(factory: Callable[..., Any], *, unset: bool = False) -> dict[str, Any]:
    """Return a field for every option of a factory, with its default or, `unset`, with None."""
    hints = get_type_hints(factory)
    return {
        option: (hints[option], key(None if unset else parameter.default, _EXPECTED[hints[option]], ""))
        for option, parameter in inspect.signature(factory).parameters.items()
        if option != "base" and parameter.kind is not parameter.VAR_KEYWORD
    }


_EXPECTED: dict[Any, str] = {
    bool: "true or false",
    str: "a word",
    int: "an integer",
    int | None: "an integer, or none",
    float: "a number",
    float | None: "a number, or none",
}
