"""The few error classes. Every message names the value found, the value expected, and the remedy."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from funcprobe.visible_text import message


class FuncprobeError(Exception):
    """The base of everything funcprobe raises on purpose: a sentence for people, fields for programs.

    Attributes:
        text: What was found and what was expected; with a hint, without its full stop.
        hint: What to do about it, where that may be said otherwise by whoever knows more.
        kind: What went wrong, in a word, where a program may want to tell it from other errors of the class.
        quantity: The name, or the number, of what is wrong.
        found: What it is.
        expected: What it should be.
        is_shared: Whether all processes of a run raise it together, so that one of them says it for all.

    Example:
        >>> error = ForwardModeError("The model has no forward derivative", hint="use mode='reverse'")
        >>> print(error.within("Step 'a'").but("take another model"))
        Step 'a': The model has no forward derivative; take another model.
    """

    is_shared: bool = False

    def __init__(
        self,
        text: str = "",
        *,
        hint: str | None = None,
        kind: str | None = None,
        quantity: object = None,
        found: object = None,
        expected: object = None,
    ) -> None:
        text = message(text)
        super().__init__(text if hint is None else f"{text}; {hint}.")
        self.text, self.hint, self.kind = text, hint, kind
        self.quantity, self.found, self.expected = quantity, found, expected

    def within(self, place: str) -> Self:
        """Return the same error, said of a place."""
        return self._again(f"{place}: {self.text}", self.hint)

    def but(self, hint: str) -> Self:
        """Return the same error with another hint."""
        return self._again(self.text, hint)

    def _again(self, text: str, hint: str | None) -> Self:
        fields = {"kind": self.kind, "quantity": self.quantity, "found": self.found, "expected": self.expected}
        again = type(self)(text, hint=hint, **fields)  # type: ignore[arg-type]
        again.is_shared = self.is_shared
        return again


class InputError(FuncprobeError, ValueError):
    """Something the caller brought (an argument, a file, a batch) is not usable; the message says how to mend it."""


class CheckpointError(InputError):
    """A checkpoint folder, an adapter or an optimizer state cannot be read faithfully."""


class ConfigError(InputError):
    """A configuration file or a command-line option is wrong; the message names the field."""


class NumericsError(FuncprobeError, ArithmeticError):
    """A model or a step produced numbers that are not finite; the message names where."""


class ForwardModeError(FuncprobeError):
    """The model has an operation without a forward derivative; reverse mode still works."""


class ReverseModeError(FuncprobeError):
    """The model has no backward pass that can be run; the message holds torch's own."""


class EffectiveSampleSizeError(FuncprobeError):
    """The importance weights degenerated below the threshold and the caller asked for that to be an error."""


class ParallelError(FuncprobeError):
    """Another process of the same run failed or is gone; the message names it."""


class MissingExtraError(FuncprobeError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class FuncprobeWarning(UserWarning):
    """A result is usable but something about it should be known."""

    def __init__(self, text: str = "") -> None:
        super().__init__(text if isinstance(text, Note) else message(text))


class Note(str):
    """A sentence beside numbers, with the kind by which programs tell it from others: no one reads its words.

    Example:
        >>> note = Note("overlap", "2 of 8 evaluation sequences also stand in the batch.")
        >>> note.kind, note.startswith("2 of 8")
        ('overlap', True)
    """

    __slots__ = ("kind",)
    kind: str

    def __new__(cls, kind: str, text: str) -> Note:
        """Return the note of that kind."""
        made = super().__new__(cls, message(text))
        made.kind = kind
        return made

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        """Return the arguments that a copy is made of."""
        return self.kind, str(self)


@contextmanager
def placed(place: str, *kinds: type[FuncprobeError]) -> Iterator[None]:
    """Let an error of some kinds say where it arose: a learning rate, an update.

    Raises:
        FuncprobeError: The same error, with the place before its words.
    """
    try:
        yield
    except kinds as error:
        raise error.within(place) from error


@contextmanager
def collected_notes(kind: str) -> Iterator[list[Note]]:
    """Yield a list that fills with all that funcprobe warns of in the block, unissued; other warnings pass through.

    A warning that carries no note becomes one of `kind`.
    """
    collected: list[Note] = []
    with warnings.catch_warnings():
        show = warnings.showwarning

        def collect(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, FuncprobeWarning):
                show(message, category, *where, **more)
                return
            text = message.args[0] if isinstance(message, Warning) and message.args else message
            collected.append(text if isinstance(text, Note) else Note(kind, str(text)))

        warnings.showwarning = collect
        warnings.simplefilter("always", FuncprobeWarning)
        yield collected


def listed(names: Iterable[object], limit: int = 5) -> str:
    """Return the first few of several things, and how many more there are.

    Example:
        >>> listed(range(7))
        '0, 1, 2, 3, 4 and 2 more'
    """
    every = [str(name) for name in names]
    return ", ".join(every[:limit]) + (f" and {len(every) - limit} more" if len(every) > limit else "")


def percent(share: float, digits: int = 1) -> str:
    """Return a share in percent, as every text writes it: with a space before the sign.

    Example:
        >>> percent(0.05, 0), percent(1.0161)
        ('5 %', '101.6 %')
    """
    return f"{share:.{digits}%}".replace("%", " %")


def missing_extra(package: str, extra: str, purpose: str) -> MissingExtraError:
    """Return the error for an optional dependency that is not installed, naming the extra that brings it.

    Example:
        >>> print(missing_extra("pyarrow", "app", "reading parquet"))
        reading parquet needs the package 'pyarrow', which is not installed; pip install 'funcprobe[app]'.
    """
    return MissingExtraError(
        f"{purpose} needs the package '{package}', which is not installed; pip install 'funcprobe[{extra}]'."
    )
