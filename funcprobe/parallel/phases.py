"""Work that each process does by itself, ending in one agreement: an error of one is the same error of all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from funcprobe import errors
from funcprobe.errors import FuncprobeError, ParallelError
from funcprobe.parallel.world import World, world

#: What a process that has failed adds to a sum of flags, of which the others add 0 or 1.
FAILED = 2**20


class FailedElsewhere(Exception):
    """Another process has failed inside a phase, so that this one need not wait for it; `phase` says how."""


class _Failure(NamedTuple):
    """The error of one process, as it is sent to the others."""

    name: str  #: the class, where it is one of ours
    text: str
    kind: str | None = None  #: see `FuncprobeError`


@contextmanager
def phase(what: str) -> Iterator[None]:
    """Return a context of work at whose end all processes know whether all succeeded.

    No other process waits for the work, or, where leaves lie in parts, only at places that begin with `any_inside`: a
    process that fails answers once, to whichever of these places the others have come to.

    An error that has been agreed on already passes through. An interrupt is not agreed on: whoever waits for this
    process finds that it is gone.

    Raises:
        FuncprobeError: The error of the first process that failed, with its rank: the same in every process.
    """
    own = world()
    if own.size == 1:
        yield
        return
    caught: Exception | None = None
    try:
        yield
    except FailedElsewhere as error:
        agreed = _agreed(own, what, None)
        raise agreed from error
    except Exception as error:
        if isinstance(error, FuncprobeError) and error.is_shared:
            raise
        caught = error
    if _sum_of(own, 0 if caught is None else FAILED) >= FAILED:
        agreed = _agreed(own, what, caught)
        raise agreed from caught


def any_inside(flag: bool = False) -> bool:
    """Return whether something holds in some process; asked in all of them, inside a phase, before they work together.

    Raises:
        FailedElsewhere: If another process has failed, and will not come.
    """
    found = _sum_of(world(), int(flag))
    if found >= FAILED:
        raise FailedElsewhere
    return found > 0


def _sum_of(own: World, number: int) -> int:
    return int(own.sum_of(torch.tensor(number, device=own.device)))


def _agreed(own: World, what: str, caught: Exception | None) -> FuncprobeError:
    """Return the error of the first process that failed, as every process raises it."""
    said = None
    if isinstance(caught, FuncprobeError):
        said = _Failure(type(caught).__name__, str(caught), caught.kind)
    elif caught is not None:
        first = next(iter(str(caught).strip().splitlines()), "")
        reason = "out of memory" if isinstance(caught, torch.OutOfMemoryError) else type(caught).__name__
        said = _Failure("", f"{reason} ({first})" if first else reason)
    everyone = own.all_of(said)
    rank, failure = next((rank, each) for rank, each in enumerate(everyone) if each is not None)
    name = getattr(errors, failure.name) if failure.name else ParallelError
    place = f"Process {rank} of {own.size}" + ("" if failure.name else f", {what}")
    alike = bool(failure.name) and all(each == failure for each in everyone)
    error: FuncprobeError = name(failure.text if alike else f"{place}: {failure.text}", kind=failure.kind)
    error.is_shared = True
    return error
