"""A journal of finished points, so that a sweep that was killed goes on from where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from funcprobe.analysis.sweep_result import SweepPoint
from funcprobe.errors import InputError
from funcprobe.types import Rollouts

#: What the first line of a journal says it is.
TITLE = "funcprobe sweep, journal 1"

#: Entries of a leaf that a fingerprint reads, evenly spread.
SAMPLED_ENTRIES = 4096


class Journal:
    """Finished points in a file of JSON lines, the first of which says what they belong to. Without a path, nothing.

    Raises:
        InputError: If the file is not such a journal, or that of another sweep.
    """

    def __init__(self, path: str | os.PathLike[str] | None, identity: str) -> None:
        self.path = None if path is None else Path(path)
        self.points: dict[float, SweepPoint] = {}
        if self.path is None:
            return
        if self.path.is_file():
            self.points = _read(self.path, identity)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._append(json.dumps({"title": TITLE, "identity": identity}))

    def add(self, point: SweepPoint) -> None:
        """Keep a finished point, on disk before this returns."""
        self.points[point.lr] = point
        if self.path is not None:
            self._append(json.dumps(point.to_dict(), allow_nan=False))

    def _append(self, line: str) -> None:
        assert self.path is not None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def _read(path: Path, identity: str) -> dict[float, SweepPoint]:
    """Return the finished points; a last line that was cut off is dropped from the file.

    Raises:
        InputError: If the file is not a journal, is damaged before its end, or belongs to another sweep.
    """
    whole, _, rest = path.read_text(encoding="utf-8").rpartition("\n")
    lines = whole.splitlines()
    try:
        head = json.loads(lines[0])
        known = (head["title"], head["identity"])
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not the journal of a sweep; give the name of a new file.") from error
    if known != (TITLE, identity):
        raise InputError(
            f"{path} belongs to another sweep: parameters, rollouts, observables or options differ. Give another file, "
            "or delete it to begin anew."
        )
    if rest:
        path.write_text(whole + "\n", encoding="utf-8")
    try:
        points = [SweepPoint.from_dict(json.loads(line)) for line in lines[1:]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it to begin anew.") from error
    return {point.lr: point for point in points}


def fingerprint(trees: Iterable[Mapping[str, Tensor]], batches: Iterable[Rollouts], options: Iterable[object]) -> str:
    """Return a digest of trees (an even sample of each leaf's bytes), rollouts (all of them) and options."""
    digest = hashlib.sha256()
    for tree in trees:
        for name, leaf in tree.items():
            flat = leaf.detach().reshape(-1)
            digest.update(f"{name} {tuple(leaf.shape)} {leaf.dtype}".encode())
            digest.update(_bytes(flat[:: max(1, len(flat) // SAMPLED_ENTRIES)]))
    for batch in batches:
        for field, values in zip(batch._fields, batch, strict=True):
            digest.update(field.encode() if values is None else field.encode() + _bytes(values))
    for option in options:
        digest.update(repr(option).encode())
    return digest.hexdigest()


def _bytes(values: Tensor) -> bytes:
    flat = values.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
