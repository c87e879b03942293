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

from funcprobe.data.numbers import LARGEST
from funcprobe.data.reading import text_of
from funcprobe.errors import ConfigError, InputError, missing_extra

_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float"))
#: Suffixes of what a configuration names, and is not.
_ROLLOUTS = (".parquet", ".jsonl")

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; every key is text.

    Raises:
        ConfigError: If the file is missing, not YAML, holds a key twice, or is no mapping.
    """
    yaml = _yaml()
    if path.suffix in _ROLLOUTS:
        raise ConfigError(
            f"{path}: this is named like a file of rollouts; give a YAML configuration, which names such."
        )
    try:
        found = yaml.load(text_of(path), Loader=_loader())
    except InputError as error:
        absent = f"{path}: there is no such file; expected a YAML configuration."
        raise ConfigError(absent if error.kind == "absent" else str(error)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {_calm(error)}.") from None
    except RecursionError:
        raise ConfigError(f"{path}: it is nested too deeply; a configuration has two levels.") from None
    except (ValueError, LookupError, TypeError, AttributeError):  # whatever a tag's constructor stumbles over
        raise ConfigError(f"{path}: a value is not what its tag (!!...) says; leave the tag out.") from None
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

        def compose_node(self, parent: Any, index: Any) -> Any:
            """Compose a node that is no alias: what repeats itself grows without bound."""  # noqa: DOC501
            if self.check_event(yaml.events.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.composer.ComposerError(None, None, "an alias (*name) is not read; write it out", mark)
            return super().compose_node(parent, index)

    def resolve(tag: str, pattern: str, construct: Callable[[str], Any]) -> None:
        def constructor(loader: Any, node: Any) -> Any:
            return construct(loader.construct_scalar(node))

        Loader.add_implicit_resolver(tag, re.compile(rf"^(?:{pattern})$", re.IGNORECASE), None)
        Loader.add_constructor(tag, constructor)

    resolve(_NULL, "~|null|none|", lambda text: None)
    resolve(_BOOL, "|".join(_WORDS), lambda text: _WORDS[text.lower()])
    resolve(_INT, r"[-+]?[0-9]+(_[0-9]+)*", _int)
    resolve(_FLOAT, r"[-+]?([0-9]+(_[0-9]+)*(\.[0-9]*)?|\.[0-9]+)(e[-+]?[0-9]+)?|[-+]?\.inf|\.nan", _float)
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


def _int(text: str) -> int | str:
    """Return an integer of 64 bits; a longer one stays the text that it is, and is refused as that."""
    if len(text) <= 25 and abs(int(text)) <= LARGEST:
        return int(text)
    return text


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _calm(error: Exception) -> str:
    """Return the parser's complaint as one line."""
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    mark = getattr(error, "problem_mark", None)
    where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    return where + " ".join(str(problem).split()).rstrip(".")
