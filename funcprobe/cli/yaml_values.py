"""YAML without its traps: values arrive as a person wrote them.

YAML 1.1 reads `2e-8` as text, `010` as eight, `1:30` as ninety and `2026-01-01` as a date, and takes the later of two
equal keys in silence. Here numbers are decimal numbers, dates are text, `none` is none, and an equal key is an error.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from funcprobe.errors import ConfigError, missing_extra

_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float"))
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; every key is text.

    Raises:
        ConfigError: If the file is missing, not YAML, holds a key twice, or is no mapping.
    """
    yaml = _yaml()
    try:
        found = yaml.load(path.read_bytes(), Loader=_loader())
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; expected a YAML configuration.") from None
    except OSError as error:
        raise ConfigError(f"{path}: the configuration cannot be read ({error.strerror}).") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {_calm(error)}.") from None
    if found is None:
        raise ConfigError(f"{path}: the configuration is empty; it needs checkpoint, evaluation and batch at least.")
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: found {type(found).__name__}, expected lines of the form 'key: value'.")
    return found


def scalar(text: str) -> Any:
    """Return the value of one plain scalar: a number, a truth value, none, or the text itself.

    Example:
        >>> scalar("2e-8"), scalar("none"), scalar("off"), scalar("dapo")
        (2e-08, None, False, 'dapo')
    """
    loader, node = _loader()(""), _yaml().ScalarNode
    try:
        return loader.construct_object(node(loader.resolve(node, text, (True, False)), text))
    finally:
        loader.dispose()


def dumped(values: Mapping[str, Any]) -> str:
    """Return a mapping as YAML, its keys in their order."""
    return _yaml().safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def _yaml() -> Any:
    """Return the package that reads YAML, which few of those who import this need.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        missing = missing_extra("pyyaml", "app", "reading a configuration")
        raise missing from error
    return yaml


@functools.cache
def _loader() -> Any:
    """Return a SafeLoader with its own idea of plain values."""
    _yaml()  # says which extra is missing
    import yaml

    class Loader(yaml.SafeLoader):
        """A SafeLoader without the traps, which live in the inherited resolvers."""

        yaml_implicit_resolvers = {}  # noqa: RUF012

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            return _mapping_of(self, node)

    def resolve(tag: str, pattern: str, construct: Callable[[str], Any]) -> None:
        def constructor(loader: Any, node: Any) -> Any:
            return construct(loader.construct_scalar(node))

        Loader.add_implicit_resolver(tag, re.compile(rf"^(?:{pattern})$", re.IGNORECASE), None)
        Loader.add_constructor(tag, constructor)

    resolve(_NULL, "~|null|none|", lambda text: None)
    resolve(_BOOL, "|".join(_WORDS), lambda text: _WORDS[text.lower()])
    resolve(_INT, r"[-+]?\d+(_\d+)*", int)
    resolve(_FLOAT, r"[-+]?(\d+(_\d+)*(\.\d*)?|\.\d+)(e[-+]?\d+)?|[-+]?\.inf|\.nan", _float)
    return Loader


def _mapping_of(loader: Any, node: Any) -> dict[str, Any]:
    """Return the keys and values of a node.

    Raises:
        ConstructorError: If a key is no word, or stands twice.
    """
    yaml, seen = _yaml(), dict[str, Any]()
    wrong = yaml.constructor.ConstructorError
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise wrong(None, None, "a key must be a word", key.start_mark)
        if key.value in seen:
            raise wrong(None, None, f"the key '{key.value}' stands here a second time", key.start_mark)
        seen[key.value] = loader.construct_object(value, deep=True)
    return seen


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _calm(error: Exception) -> str:
    """Return the parser's complaint as one line."""
    problem = getattr(error, "problem", None) or str(error)
    mark = getattr(error, "problem_mark", None)
    where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    return where + " ".join(str(problem).split()).rstrip(".")
