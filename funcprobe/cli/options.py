"""Arguments and options of a command, declared once: read from words, checked, and told in its help."""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from funcprobe.data.numbers import LARGEST, whole
from funcprobe.errors import ConfigError, InputError
from funcprobe.visible_text import shortened

#: Columns of a help text.
WIDTH = 80


@dataclass(frozen=True)
class Argument:
    """A word that stands in a place of its own, such as the configuration."""

    name: str  #: as `do` finds it
    placeholder: str  #: in the usage line, such as CONFIG.yaml
    meaning: str  #: in the help


@dataclass(frozen=True)
class Option:
    """An option of one command, `--name VALUE`, or `--name` alone where it is a flag."""

    name: str  #: with hyphens, without the two in front; `do` finds it with underscores
    placeholder: str  #: of the value in the help, such as N
    meaning: str  #: in the help
    default: Any = None  #: where it is not given
    read: Callable[[str], Any] = str  #: text -> value; raises ValueError where it cannot
    expected: str = ""  #: of a value, in messages; not needed beside choices
    choices: tuple[str, ...] = ()  #: the only values, where there are few
    several: bool = False  #: whether it takes several values with commas, as a tuple
    required: bool = False  #: whether it has to be given
    flag: bool = False  #: whether it stands alone and is true where it does

    @property
    def key(self) -> str:
        """The name under which the value is found."""
        return self.name.replace("-", "_")

    @property
    def told(self) -> str:
        """The help text of the option: its meaning, whether it has to be given, and its default."""
        default = "" if self.default is None or self.default == () or self.flag else f" (default: {self.default})"
        return f"{'required: ' if self.required else ''}{self.meaning}{default}"

    def value(self, text: str) -> Any:
        """Return the value that a text stands for.

        Raises:
            ConfigError: If it stands for none.
        """
        parts = [part.strip() for part in text.split(",")] if self.several else [text]
        try:
            values = [self._one(part) for part in parts]
        except InputError as error:  # a value that was read, and is out of range: that is said in its own words
            raise ConfigError(f"--{self.name}: {error}") from None
        except _WrongError as error:
            raise ConfigError(
                f"--{self.name}: found '{shortened(str(error), 60)}', expected {self._expected()}."
            ) from None
        return tuple(values) if self.several else values[0]

    def _one(self, text: str) -> Any:
        if self.choices and text not in self.choices:
            raise _WrongError(text)
        try:
            return self.read(text)
        except InputError:
            raise
        except ValueError:
            raise _WrongError(text) from None

    def _expected(self) -> str:
        if not self.choices:
            return self.expected or "another value"
        *others, last = self.choices
        return f"{', '.join(others)} or {last}"


def counted(low: int, high: int = LARGEST) -> dict[str, Any]:
    """Return how an option of a count is read, and the words for its values."""
    return {"read": lambda text: whole(text, low, high), "expected": f"a whole number from {low} to {high:,}"}


class _WrongError(Exception):
    """A text that stands for no value."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors like any other."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Refuse the words.

        Raises:
            ConfigError: Always.
        """
        wrong = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        near = wrong and difflib.get_close_matches(wrong[1], self._option_string_actions, n=1)
        meant = f", did you mean '{near[0]}'?" if near else ";"
        raise ConfigError(f"{message}{meant} see {self.prog} --help.")


def parsed(
    parser: Parser, words: Sequence[str], arguments: Sequence[Argument], options: Sequence[Option]
) -> argparse.Namespace:
    """Return the values of words that are all a command's own.

    Raises:
        ConfigError: If one is wrong, unknown or missing.
    """
    for argument in arguments:
        parser.add_argument(argument.name, metavar=argument.placeholder, help=argument.meaning)
    for option in options:
        more: dict[str, Any] = (
            {"action": "store_true"}
            if option.flag
            else {"default": None, "metavar": option.placeholder, "required": option.required}
        )
        parser.add_argument(f"--{option.name}", help=option.told, **more)
    found = parser.parse_args(list(words))
    for option in (option for option in options if not option.flag):
        text = getattr(found, option.key)
        setattr(found, option.key, option.default if text is None else option.value(text))
    return found


def split(words: Sequence[str], options: Sequence[Option]) -> tuple[argparse.Namespace, list[str]]:
    """Return the values of a command's own options, and the other words, which override keys of a configuration.

    Raises:
        ConfigError: If an option stands twice, has no value or a wrong one, or is missing and has to be given.

    Example:
        >>> chunk = Option("chunk", "N", "how many go together", default=1, read=int)
        >>> split(["--chunk", "4", "--order", "1"], [chunk])
        (Namespace(chunk=4), ['--order', '1'])
    """
    found, rest = argparse.Namespace(), list(words)
    for option in options:
        text = _taken_out(rest, option)
        if text is None and option.required:
            raise ConfigError(f"--{option.name} is missing; give {option.expected}.")
        setattr(found, option.key, option.default if text is None else option.value(text))
    return found, rest


def _taken_out(rest: list[str], option: Option) -> str | None:
    """Return the text of an option's value, taken out of the words; None where it is not there.

    Raises:
        ConfigError: If it stands twice or has no value.
    """
    name = f"--{option.name}"
    places = [i for i, word in enumerate(rest) if word == name or word.startswith(f"{name}=")]
    if not places:
        return None
    if len(places) > 1:
        raise ConfigError(f"{name} stands twice; give it once.")
    (place,) = places
    _, equals, text = rest[place].partition("=")
    if not equals and (place + 1 == len(rest) or rest[place + 1].startswith("--")):
        raise ConfigError(f"{name} has no value; write {name} {option.choices[-1] if option.choices else 'VALUE'}.")
    text = text if equals else rest[place + 1]
    rest[place : place + (1 if equals else 2)] = []
    return text


def described(options: Sequence[Option]) -> str:
    """Return the lines of a help text about options, each with its meaning beside it."""
    return table((f"--{option.name} {option.placeholder}", option.told) for option in options)


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Return rows of a help text: a head, and its meaning beside it, broken between words."""
    found = list(rows)
    width = max((len(head) for head, _ in found), default=0) + 5
    lines = []
    for head, meaning in found:
        first, *more = textwrap.wrap(meaning, WIDTH - width)
        lines += [f"  {head:<{width - 2}}{first}", *(" " * width + line for line in more)]
    return "\n".join(lines)


def usage_of(name: str, options: Sequence[Option]) -> str:
    """Return the usage of a command that has a configuration, wrapped where it does not fit on a line."""
    own = [f"--{o.name} {o.placeholder}" if o.required else f"[--{o.name} {o.placeholder}]" for o in options]
    lines = [f"funcprobe {name} CONFIG.yaml"]
    indent = " " * len(f"usage: funcprobe {name} ")
    for part in (*own, "[--key value ...]"):
        if len(lines[-1]) + len(part) < WIDTH - len("usage: "):
            lines[-1] += f" {part}"
        else:
            lines.append(indent + part)
    return "\n".join(lines)
