"""A journal of derivatives and finished points, so that a sweep that was killed goes on from where it was."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from funcprobe import tree
from funcprobe.errors import InputError
from funcprobe.measurement.outcome import Outcome
from funcprobe.optimizers.unreached import reached
from funcprobe.results.codec import DamagedError, Inline, decode, encode
from funcprobe.results.curve import lr_of
from funcprobe.types import Gradients, TokenScores

#: What the first line of a journal says it is.
TITLE = "funcprobe sweep, journal 4"

#: How that line begins: a file that holds no more than a piece of it was cut off before there was anything to keep.
START = json.dumps({"title": TITLE}).removesuffix("}").encode()

#: Gradients of U that differ by less, relative to their norm, are those of one model: kernels and dtypes round.
SAME_MODEL = 0.01


class Node(NamedTuple):
    """The derivative of the scores of E with respect to the learning rate, at one of them."""

    lr: float
    tangents: TokenScores  #: [B, T]


class Entry(NamedTuple):
    """One line: the tangents of a node, or a finished point."""

    node: Node | None = None
    point: Outcome | None = None


class Journal:
    """Derivatives along a curve and finished points, as lines of JSON; the first line names their measurement.

    Without a path, nothing is kept on disk.

    Raises:
        InputError: If the file is not such a journal, or that of another sweep.
    """

    def __init__(self, path: str | os.PathLike[str] | None, identity: str) -> None:
        self.path = None if path is None else Path(path)
        self.identity = identity
        self.points: dict[float, Outcome] = {}
        self.nodes: dict[float, TokenScores] = {}  #: ds/dη over E by the learning rate η
        self._norm: float | None = None
        if self.path is not None and self.path.exists():
            self._norm, self.points, self.nodes = _read(self.path, identity)

    def begin(self, gradient: Gradients) -> None:
        """Write the first line; or hold the one there is to the gradient on U, in which frozen weights show.

        Raises:
            InputError: If the gradient is of another size.
        """
        if self.path is None:
            return
        norm = float(tree.norm(reached(gradient)))
        if self._norm is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)  # a first line that was cut off
            self._append(json.dumps({"title": TITLE, "identity": self.identity, "gradient_norm": norm}))
        elif not math.isclose(norm, self._norm, rel_tol=SAME_MODEL):
            raise InputError(
                f"{self.path} belongs to a sweep of another model: its gradient on the batch has norm "
                f"{self._norm:.6g}, and this one {norm:.6g}, though parameters and options agree. Give another file, "
                "or delete it to begin anew."
            )

    def add(self, point: Outcome) -> None:
        """Keep a finished point, on disk before this returns."""
        self.points[lr_of(point)] = point
        self._keep(Entry(point=point))

    def node(self, lr: float, compute: Callable[[], TokenScores]) -> TokenScores:
        """Return ds/dη at the node of a learning rate η as it was kept, or computed now, and kept."""
        if lr not in self.nodes:
            self.nodes[lr] = compute()
            self._keep(Entry(node=Node(lr, self.nodes[lr])))
        return self.nodes[lr]

    def _keep(self, entry: Entry) -> None:
        if self.path is not None:
            self._append(json.dumps(encode(entry, Entry, Inline()), allow_nan=False))

    def _append(self, line: str) -> None:
        assert self.path is not None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def _read(path: Path, identity: str) -> tuple[float | None, dict[float, Outcome], dict[float, TokenScores]]:
    """Return the gradient's norm, points and nodes; a last line that was cut off is dropped from the file.

    Raises:
        InputError: If the file is not a journal, is damaged before its end, or belongs to another sweep.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; a journal is a file, so give the name of one.")
    whole, newline, rest = path.read_bytes().rpartition(b"\n")
    if not newline and START.startswith(rest[: len(START)]):
        return None, {}, {}
    lines = whole.splitlines()
    try:
        head = json.loads(lines[0])
        known, norm = (head["title"], head["identity"]), float(head["gradient_norm"])
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not the journal of a sweep; give the name of a new file.") from error
    if known != (TITLE, identity):
        raise InputError(
            f"{path} belongs to another sweep: parameters, rollouts, observables, objective, optimizer, its state or "
            "options differ. Give another file, or delete it to begin anew."
        )
    try:
        entries: list[Entry] = [decode(json.loads(line), Entry, Inline()) for line in lines[1:]]
        points = {_lr(entry.point): entry.point for entry in entries if entry.point is not None}
    except (ValueError, RecursionError) as error:  # which a DamagedError is too
        raise InputError(f"{path} is damaged ({error}); delete it to begin anew.") from error
    if rest:
        os.truncate(path, len(whole) + 1)
    return norm, points, {entry.node.lr: entry.node.tangents for entry in entries if entry.node is not None}


def _lr(point: Outcome) -> float:
    """Return the learning rate of a point that was read.

    Raises:
        DamagedError: If it has none.
    """
    if point.lr is None:
        raise DamagedError("a point has no lr")
    return point.lr
