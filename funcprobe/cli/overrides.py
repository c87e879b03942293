"""Words of a command line that override keys of a configuration, and where the paths in either are."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from funcprobe.cli.messages import check_known
from funcprobe.cli.yaml_values import scalar
from funcprobe.data.paths import path_of
from funcprobe.errors import ConfigError

#: Fields that hold a path; `base_model` may also be a name in the local Hugging Face cache.
PATHS = ("checkpoint", "base_model", "evaluation", "batch", "output")


def parsed_overrides(words: Sequence[str], model: type[BaseModel], own: Sequence[str] = ()) -> dict[str, Any]:
    """Return {dotted key: value} of `--key value` and `--key=value`; paths are made absolute.

    A truth value may stand alone: `--force`. Hyphens and underscores are one. `own` are the command's own options,
    which are named with the keys where a word is neither.

    Raises:
        ConfigError: If a word is no option, an option is unknown or stands twice, or a value is missing.
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
            check_known(name, model, option=True, own=own)
        if name in found:
            raise ConfigError(f"--{name} stands twice; give it once.")
        if not has_value and (not rest or rest[0].startswith("--")):
            if name not in model.model_fields or model.model_fields[name].annotation is not bool:
                raise ConfigError(f"--{name} has no value; write --{name} VALUE.")
            text = "true"
        elif not has_value:
            text = rest.pop(0)
        found[name] = text if name in PATHS and scalar(text) is not None else scalar(text)
    return located(found, Path.cwd())


def set_key(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a key of a mapping, or one of a mapping in it."""
    outer, dot, inner = dotted.partition(".")
    if not dot:
        values[outer] = value
        return
    inside = values.get(outer)
    values[outer] = {**inside, inner: value} if isinstance(inside, dict) else {inner: value}


def located(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the values with relative paths taken from `folder`; a base model that is no path there stays a name."""
    result = dict(values)
    for name in PATHS:
        text = values.get(name)
        if not isinstance(text, str) or not text.strip():
            continue
        path = Path(os.path.abspath(folder / path_of(text, name)))
        is_name = name == "base_model" and not text.startswith((".", "/", "~")) and not path.exists()
        result[name] = text if is_name else str(path)
    return result
