"""The file of a ledger while it is written: lines are appended and synced, by one process, and wait for a full disk."""

from __future__ import annotations

import json
import os
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO

from funcprobe.data.locks import held
from funcprobe.data.paths import path_of
from funcprobe.errors import FuncprobeWarning, InputError
from funcprobe.parallel.phases import phase
from funcprobe.parallel.world import world
from funcprobe.results.ledger_lines import FILE, Lines, Resumed, plain_of, read_file
from funcprobe.results.window import Lost, Mark, Window


class Log:
    """The open file of a ledger; no other run can open it as long as this one has it.

    Of several processes of one run the first writes, and all know the lines.

    Raises:
        InputError: If the folder holds something else, or another process is writing it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = path_of(folder)
        self.lines = Lines()
        self._file: IO[bytes] | None = None
        self._end: Callable[[], object] = _nothing
        self._waiting: list[bytes] = []
        self._told = False
        with phase("opening the ledger"):
            if world().is_first:
                self._open()
        self.lines = world().all_of(self.lines)[0]

    def _open(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is a file; a ledger is a folder, so give the name of one.")
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(self.folder)
        self._file = (self.folder / FILE).open("ab", buffering=0)
        self._end = weakref.finalize(self, _close, self._file, lock)
        self.lines, whole = read_file(self.folder / FILE)
        os.truncate(self._file.fileno(), whole)

    @property
    def is_written(self) -> bool:
        """Whether this process writes the files of the ledger."""
        return self._file is not None

    def add(self, line: Window | Lost | Mark | Resumed) -> None:
        """Add a line, on disk before this returns; where that cannot be, it waits for the next one."""
        self.lines = self.lines.with_(line)
        if self._file is None:
            return
        self._waiting.append(json.dumps(plain_of(line), allow_nan=False, ensure_ascii=False).encode() + b"\n")
        try:
            while self._waiting:
                self._append(self._file, self._waiting[0])
                del self._waiting[0]
        except OSError as error:
            self._complain(error)

    def close(self) -> int:
        """End the file, and return how many lines could not be written."""
        self._end()
        return len(self._waiting)

    @staticmethod
    def _append(file: IO[bytes], text: bytes) -> None:
        end = file.seek(0, os.SEEK_END)
        try:
            while text:
                text = text[file.write(text) :]  # a disk that fills up takes a part, and only then complains
            os.fsync(file.fileno())
        except OSError:
            os.truncate(file.fileno(), end)  # half a line would spoil the next
            raise

    def _complain(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            warnings.warn(
                f"{self.folder / FILE} cannot be written ({error.strerror}); training goes on, and the lines are kept "
                "in memory until they can be.",
                FuncprobeWarning,
                stacklevel=4,
            )


def _locked(folder: Path) -> int | None:
    """Lock the folder, and return the descriptor that holds it; None where its file system knows no locks.

    Raises:
        InputError: If another run has it.
    """
    try:
        lock = held(folder)
    except OSError:
        return None
    if lock is None:
        raise InputError(f"{folder} is being written by another run; give its ledger a folder of its own.")
    return lock


def _nothing() -> None:
    """Do nothing."""


def _close(file: IO[bytes], lock: int | None) -> None:
    file.close()
    if lock is not None:
        os.close(lock)
