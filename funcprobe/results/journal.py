"""A journal of derivatives and finished points, so that a sweep that was killed goes on from where it was."""

from __future__ import annotations

import hashlib
import json
import math
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

from funcprobe import tree
from funcprobe.data.locks import lock_own
from funcprobe.errors import InputError
from funcprobe.measurement.outcome import Outcome
from funcprobe.optimizers.unreached import reached
from funcprobe.parallel.phases import phase
from funcprobe.parallel.world import world
from funcprobe.results.codec import DamagedError, Inline, decode, encode
from funcprobe.results.curve import lr_of
from funcprobe.types import Gradients, Json, TokenScores

#: What the first line of a journal says it is.
TITLE = "funcprobe sweep, journal 6"

#: How that line begins: a file that holds no more than a piece of it was cut off before there was anything to keep.
START = json.dumps({"line": {"title": TITLE}}).removesuffix("}}").encode()

#: The kind of the errors of a journal that is there, and not this sweep's.
OTHER_JOURNAL = "journal"

#: Gradients of U that differ by less, relative to their norm, are those of one model: kernels and dtypes round.
SAME_MODEL = 0.01


class Node(NamedTuple):
    """How fast the scores of E move with the learning rate: at one of them, or on the way to it from 0."""

    kind: str  #: "tangent": ds/dη there; "secant": (s − s at 0) / η
    lr: float
    slope: TokenScores  #: [B, T]


class Entry(NamedTuple):
    """One line: a node of a curve, or a finished point."""

    node: Node | None = None
    point: Outcome | None = None


class Journal:
    """Slopes along a curve and finished points, as lines of JSON; the first line names their measurement.

    Every line carries its own SHA-256: {"line": {...}, "sha256": "..."}. As long as the object lives, no other process
    can open the same journal. Of several processes of one run the first keeps it, for all of them. Without a path,
    nothing is kept on disk.

    Raises:
        InputError: If the file is not such a journal, is damaged or that of another sweep (then of the kind "journal"),
            or another process is writing it.
    """

    def __init__(self, path: str | os.PathLike[str] | None, identity: str) -> None:
        self.path = None if path is None else Path(path)
        self.identity = identity
        self._file: IO[bytes] | None = None
        self.points: dict[float, Outcome] = {}
        self.nodes: dict[tuple[str, float], TokenScores] = {}  #: slopes over E by their kind and the learning rate
        self._norm: float | None = None
        if self.path is None:
            return
        with phase("reading the journal"):
            if world().is_first and self.path.exists():
                self._norm, self.points, self.nodes = _read(self.path, self._open(), identity)
        self._norm, self.points, self.nodes = world().all_of((self._norm, self.points, self.nodes))[0]

    def begin(self, gradient: Gradients) -> None:
        """Write the first line; or hold the one there is to the gradient on U, in which frozen weights show.

        Raises:
            InputError: If the gradient is of another size.
        """
        if self.path is None:
            return
        norm = float(tree.norm(reached(gradient)))
        if self._norm is None:
            with phase("beginning the journal"):
                if world().is_first:
                    self._begin(self.path, norm)
        elif not math.isclose(norm, self._norm, rel_tol=SAME_MODEL):
            raise InputError(
                f"{self.path} belongs to a sweep of another model: its gradient on the batch has norm "
                f"{self._norm:.6g}, and this one {norm:.6g}, though parameters and options agree. Give another file, "
                "or delete it to begin anew.",
                kind=OTHER_JOURNAL,
            )

    def _begin(self, path: Path, norm: float) -> None:
        self._close()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # a first line that was cut off
        self._open()
        self._append({"title": TITLE, "identity": self.identity, "gradient_norm": norm})

    def add(self, point: Outcome) -> None:
        """Keep a finished point, on disk before this returns."""
        self.points[lr_of(point)] = point
        self._keep(Entry(point=point))

    def node(self, kind: str, lr: float, compute: Callable[[], TokenScores]) -> TokenScores:
        """Return the slope of a kind at a learning rate as it was kept, or computed now, and kept."""
        if (kind, lr) not in self.nodes:
            self.nodes[kind, lr] = compute()
            self._keep(Entry(node=Node(kind, lr, self.nodes[kind, lr])))
        return self.nodes[kind, lr]

    def _keep(self, entry: Entry) -> None:
        self._append(encode(entry, Entry, Inline()))

    def _append(self, plain: Json) -> None:
        if self._file is None or self.path is None:
            return
        text = json.dumps({"line": plain, "sha256": _digest(plain)}, allow_nan=False)
        try:
            self._file.seek(0, os.SEEK_END)
            self._file.write(text.encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:  # a full disk
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _open(self) -> IO[bytes]:
        assert self.path is not None
        self._file = _opened(self.path)
        weakref.finalize(self, self._file.close)
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _opened(path: Path) -> IO[bytes]:
    """Return a journal's file, which no other process has open.

    Raises:
        InputError: If one has, or it is no file.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is {_kind(path)}; a journal is a file, so give the name of one.")
    file = path.open("r+b" if path.exists() else "x+b", buffering=0)
    if not lock_own(file.fileno()):
        file.close()
        raise InputError(f"{path} is being written by another sweep; wait for it, or give another output.")
    return file


def _kind(path: Path) -> str:
    return "a folder" if path.is_dir() else "no ordinary file"


def _digest(plain: Json) -> str:
    return hashlib.sha256(json.dumps(plain, allow_nan=False).encode()).hexdigest()


def _checked(line: bytes) -> dict[str, Any]:
    """Return the content of one line.

    Raises:
        ValueError: If it is no line of a journal, or has been altered.
    """
    plain = json.loads(line)
    if not isinstance(plain, dict) or plain.keys() != {"line", "sha256"} or not isinstance(plain["line"], dict):
        raise ValueError("a line is not one of a journal")
    if _digest(plain["line"]) != plain["sha256"]:
        raise ValueError("a line has been altered")
    return plain["line"]


def _read(
    path: Path, file: IO[bytes], identity: str
) -> tuple[float | None, dict[float, Outcome], dict[tuple[str, float], TokenScores]]:
    """Return the gradient's norm, points and nodes; a last line that was cut off is dropped from the file.

    Raises:
        InputError: If the file is not a journal, is damaged before its end, or belongs to another sweep.
    """
    whole, newline, rest = file.read().rpartition(b"\n")
    if not newline and START.startswith(rest[: len(START)]):
        return None, {}, {}
    lines = whole.splitlines()
    try:
        head = _checked(lines[0])
        title, known, norm = str(head["title"]), head["identity"], float(head["gradient_norm"])
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise InputError(
            f"{path} is not the journal of a sweep; give the name of a new file.", kind=OTHER_JOURNAL
        ) from error
    if title != TITLE:
        raise InputError(
            f"{path} was written by another version of funcprobe: it is titled '{title[:40]}', and this one writes "
            f"'{TITLE}'. Give another file, or delete it to begin anew.",
            kind=OTHER_JOURNAL,
        )
    if known != identity:
        raise InputError(
            f"{path} belongs to another sweep: parameters, rollouts, observables, objective, optimizer, its state or "
            "options differ. Give another file, or delete it to begin anew.",
            kind=OTHER_JOURNAL,
        )
    try:
        entries: list[Entry] = [decode(_checked(line), Entry, Inline()) for line in lines[1:]]
        points = {_lr(entry.point): entry.point for entry in entries if entry.point is not None}
    except (ValueError, RecursionError, TypeError, OverflowError) as error:  # which a DamagedError is too
        raise InputError(f"{path} is damaged ({error}); delete it to begin anew.", kind=OTHER_JOURNAL) from error
    if rest:
        os.truncate(file.fileno(), len(whole) + 1)
    nodes = (entry.node for entry in entries if entry.node is not None)
    return norm, points, {(node.kind, node.lr): node.slope for node in nodes}


def _lr(point: Outcome) -> float:
    """Return the learning rate of a point that was read.

    Raises:
        DamagedError: If it has none.
    """
    if point.lr is None:
        raise DamagedError("a point has no lr")
    return point.lr
