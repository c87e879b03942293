"""YAML without its traps: values arrive as a person wrote them.

YAML 1.1 reads `2e-8` as text, `010` as eight, `1:30` as ninety and `2026-01-01` as a date, and takes the later of two
equal keys in silence. Here numbers are decimal numbers, dates are text, `none` is none, and an equal key is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from funcprobe.errors import ConfigError, missing_extra

try:
    import yaml
except ImportError as error:
    missing = missing_extra("pyyaml", "app", "reading a configuration")
    raise missing from error

_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float"))
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; every key is text.

    Raises:
        ConfigError: If the file is missing, not YAML, holds a key twice, or is no mapping.
    """
    try:
        found = yaml.load(path.read_bytes(), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; expected a YAML configuration.") from None
    except OSError as error:
        raise ConfigError(f"{path}: the configuration cannot be read ({error.strerror}).") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {_calm(error)}.") from None
    if found is None:
        raise ConfigError(f"{path}: the configuration is empty; it needs checkpoint, evaluation and update at least.")
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: found {type(found).__name__}, expected lines of the form 'key: value'.")
    return found


def scalar(text: str) -> Any:
    """Return the value of one plain scalar: a number, a truth value, none, or the text itself.

    Example:
        >>> scalar("2e-8"), scalar("none"), scalar("off"), scalar("dapo")
        (2e-08, None, False, 'dapo')
    """
    loader = _Loader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, text))
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """A SafeLoader with its own idea of plain values."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  the traps live in the inherited ones

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key_node.value}' stands here a second time", key_node.start_mark
                )
            seen[key_node.value] = self.construct_object(value_node, deep=True)
        return seen


def _resolve(tag: str, pattern: str, construct: Callable[[str], Any]) -> None:
    def constructor(loader: Any, node: Any) -> Any:
        return construct(loader.construct_scalar(node))

    _Loader.add_implicit_resolver(tag, re.compile(rf"^(?:{pattern})$", re.IGNORECASE), None)
    _Loader.add_constructor(tag, constructor)


_resolve(_NULL, "~|null|none|", lambda text: None)
_resolve(_BOOL, "|".join(_WORDS), lambda text: _WORDS[text.lower()])
_resolve(_INT, r"[-+]?\d+(_\d+)*", int)
_resolve(_FLOAT, r"[-+]?(\d+(_\d+)*(\.\d*)?|\.\d+)(e[-+]?\d+)?|[-+]?\.inf|\.nan", lambda text: _float(text))


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _calm(error: yaml.YAMLError) -> str:
    """Return the parser's complaint as one line."""
    problem = getattr(error, "problem", None) or str(error)
    mark = getattr(error, "problem_mark", None)
    where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    return where + " ".join(str(problem).split()).rstrip(".")
