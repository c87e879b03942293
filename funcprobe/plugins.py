"""Observables, objectives, readers and trackers that other installed packages bring: entry points, found by name.

A package declares one in its own metadata, and nothing of it is imported before it is named:

    [project.entry-points."funcprobe.observables"]
    depth = "my_package.observables:depth"

| group | name | the thing itself |
|---|---|---|
| funcprobe.observables | as `also` gives it | a function without required arguments that returns an Observable |
| funcprobe.objectives | as `objective.name` gives it | a function of options that returns an Objective |
| funcprobe.readers | the suffix of a file, without its dot | a function of a path that returns Rollouts |
| funcprobe.trackers | as `trackers` gives it | a function of a result |
| funcprobe.sinks | as `LedgerCallback(trackers=...)` gives it | a function of a ledger's folder that returns a Sink |
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from funcprobe.errors import FuncprobeError, InputError

Kind = Literal["observable", "objective", "reader", "tracker", "sink"]

#: Kind of thing -> how it is called, for messages.
_EXPECTED: dict[Kind, str] = {
    "observable": "a function without required arguments that returns an observable",
    "objective": "a function of options that returns an objective",
    "reader": "a function of a path that returns rollouts",
    "tracker": "a function of a result",
    "sink": "a function of a ledger's folder that returns a sink",
}


def names(kind: Kind, own: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of funcprobe's own things of a kind, and after them those that other packages bring."""
    return (*own, *sorted({entry.name for entry in _entries(kind)} - set(own)))


def find(kind: Kind, name: str, own: Mapping[str, Callable[..., Any]]) -> Callable[..., Any] | None:
    """Return the thing of that name, one of `own` or another package's; None where there is none.

    Whatever another package's raises when it is called is one calm error.

    Raises:
        InputError: If several have the name, it cannot be loaded, or it is not what the kind expects.
    """
    found = [entry for entry in _entries(kind) if entry.name == name]
    owners = [*(["funcprobe itself"] if name in own else []), *(_origin(entry) for entry in found)]
    if len(owners) > 1:
        raise InputError(
            f"The {kind} '{name}' is brought by {' and by '.join(owners)}; uninstall one, or give it another name."
        )
    return own.get(name) if not found else _guarded(kind, found[0], _loaded(kind, found[0]))


def wrong(kind: Kind, name: str, found: object) -> InputError:
    """Return the error for a thing that is, or returns, something other than its kind expects."""
    return InputError(f"The {kind} '{name}' gave {type(found).__name__}; expected {_EXPECTED[kind]}.")


def _loaded(kind: Kind, entry: EntryPoint) -> Callable[..., Any]:
    try:
        found = entry.load()
    except Exception as error:  # a package raises whatever it likes when it is imported
        raise InputError(
            f"The {kind} '{entry.name}' of {_origin(entry)} cannot be loaded: {_told(error)}; mend or uninstall it."
        ) from error
    if not callable(found):
        raise InputError(
            f"The {kind} '{entry.name}' of {_origin(entry)} is {type(found).__name__}; expected {_EXPECTED[kind]}."
        )
    return found


def _guarded(kind: Kind, entry: EntryPoint, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except FuncprobeError:
            raise
        except Exception as error:
            raise InputError(f"The {kind} '{entry.name}' of {_origin(entry)} failed: {_told(error)}.") from error

    return guarded


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".: ")


def _origin(entry: EntryPoint) -> str:
    package = "a package" if entry.dist is None else entry.dist.name
    return f"{package} ({entry.value})"


def _entries(kind: Kind) -> tuple[EntryPoint, ...]:
    return _entries_on(f"funcprobe.{kind}s", tuple(sys.path))


@functools.lru_cache(maxsize=16)
def _entries_on(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group; reading the metadata of every package takes long enough to do it once."""
    return tuple(entry_points(group=group))
