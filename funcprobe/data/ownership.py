"""The marker of a folder that funcprobe wrote: which files are in it, and the SHA-256 of each.

    {"funcprobe": 1, "files": {"result.json": "9f86d0…", "summary.txt": "…"}}

A folder is replaced only if it carries one and holds nothing else than it says, unchanged: neither a folder of somebody
else nor a file that was edited or put there afterwards is ever lost. While the folder is made, "files" is null.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from funcprobe.errors import InputError

#: The name of the marker.
MARKER = ".funcprobe.json"

#: Raised when a field of the marker changes its meaning.
SCHEMA_VERSION = 1

#: A marker is no longer than this: a few hundred names with a digest each.
_LIMIT = 2**20


def begin(folder: Path) -> None:
    """Mark a folder as one that is being made."""
    _write(folder, None)


def seal(folder: Path) -> None:
    """Write down every file of a finished folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MARKER)
    _write(folder, {path.relative_to(folder).as_posix(): _digest(path) for path in files})


def is_unfinished(folder: Path) -> bool:
    """Return whether a folder was being made, and never finished."""
    found = _marker(folder)
    return found is not None and found["files"] is None


def is_sealed(folder: Path) -> bool:
    """Return whether a folder was finished."""
    found = _marker(folder)
    return found is not None and found["files"] is not None


def strays(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield everything in a sealed folder that is not as funcprobe left it, and why it is not."""
    listed: dict[str, str] = (_marker(folder) or {}).get("files") or {}
    ours = {parent.as_posix() for name in listed for parent in Path(name).parents}
    waiting = [folder]
    while waiting:
        for path in sorted(waiting.pop().iterdir()):
            name = path.relative_to(folder).as_posix()
            if path.is_dir() and not path.is_symlink() and name in ours:
                waiting.append(path)
            elif name not in listed or path.is_symlink() or not path.is_file():
                if name != MARKER:
                    yield path, "which funcprobe did not write"
            elif _digest(path) != listed[name]:
                yield path, "which has changed since funcprobe wrote it"


def check_replaceable(folder: Path) -> None:
    """Check that nothing is lost where a folder is replaced; an empty one has nothing to lose.

    Raises:
        InputError: If it is not one of ours, or holds anything that is not.
    """
    if not any(folder.iterdir()):
        return
    stray = next(strays(folder), None)
    if stray is None:
        return
    name, why = stray[0].relative_to(folder).as_posix(), stray[1]
    unmarked = "" if is_sealed(folder) else f", and no {MARKER}, the mark of a folder that it wrote"
    raise InputError(
        f"{folder} holds '{name}', {why}{unmarked}, so it is not replaced even with --force; choose another folder."
    )


def holds(folder: Path, name: str) -> bool:
    """Return whether a sealed folder was finished with a file of that name."""
    return name in ((_marker(folder) or {}).get("files") or {})


def _marker(folder: Path) -> dict[str, Any] | None:
    """Return the marker of a folder; None where there is none that can be believed."""
    path = folder / MARKER
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _LIMIT:
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("funcprobe") != SCHEMA_VERSION:
        return None
    files = found.get("files", ...)
    return found if files is None or isinstance(files, dict) else None


def _write(folder: Path, files: dict[str, str] | None) -> None:
    plain = {"funcprobe": SCHEMA_VERSION, "files": files}
    (folder / MARKER).write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
