"""Folders and files that appear whole or not at all, and of which nothing is lost that somebody else wrote."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from funcprobe.data import locks, ownership
from funcprobe.data.exchange import exchange, place, uninterrupted
from funcprobe.data.paths import path_of
from funcprobe.errors import InputError

#: Ends of the names that stand beside a target while it is made, and while it is replaced in two steps.
_PARTIAL, _REPLACED = ".partial", ".replaced"

Check = Callable[[Path], None]


def _nothing(path: Path) -> None:
    """Do nothing."""


@contextmanager
def fresh_directory(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    check: Check = ownership.check_replaceable,
    placed: Callable[[Path], None] = _nothing,
    marked: bool = True,
) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`, which takes its place when the block ends without an error.

    Whatever stood at `path` stays until then; a block that raises, or a killed process, leaves it as it was. With
    `overwrite` the two are exchanged in one operation, where the system has one; a process that is killed between two
    renames is tidied up after by the next one, which also removes the partial folders of dead processes. Where another
    process wrote `path` meanwhile, or somebody put a file into it, the new folder stays beside it under a name of its
    own.

    Args:
        path: The folder to make; a symbolic link is followed.
        overwrite: Whether an existing folder is replaced.
        check: Refuses an existing folder that may not be replaced; as `ownership.check_replaceable` does.
        placed: Called with the final path as soon as it stands there; Ctrl-C waits until it has returned.
        marked: Whether it carries our marker at the end, so that it may be replaced later.

    Raises:
        InputError: If `path` exists and `overwrite` is false, is a file, or may not be replaced.
    """
    target = Path(os.path.realpath(path_of(path)))
    _recover(target)
    check_absent(target, overwrite=overwrite, check=check)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, lock = _begun(target)
    try:
        with _naming(target):
            yield partial
            if not marked:
                (partial / ownership.MARKER).unlink()
            elif ownership.is_unfinished(partial):  # the block may have sealed it, to bring in what is not ours
                ownership.seal(partial)
        with uninterrupted():
            _put(partial, target, overwrite, check, placed)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def fresh_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield the name of a temporary file beside `path`, which takes its place when the block ends without an error.

    Raises:
        InputError: If `path` exists at the end and `overwrite` is false; what was written then stays beside it.
    """
    target = Path(os.path.realpath(path_of(path)))
    with locks.guarded(target.parent) as alone:
        if alone:
            _tidy(target, rf"\.[0-9a-f]{{32}}\{_PARTIAL}")
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}{_PARTIAL}")
        partial.touch()
        lock = _lock(partial)
    try:
        with _naming(target):
            yield partial
        if overwrite:
            partial.replace(target)
        elif not place(partial, target):
            beside = _beside(partial, target)
            raise InputError(f"{target} was written by another process meanwhile; what was made here is {beside}.")
    finally:
        partial.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)


def write_arrays(arrays: Mapping[str, Tensor], path: Path) -> None:
    """Write named arrays as safetensors, with the permissions of any other new file: the library's are private."""
    with _naming(path):
        save_file({name: x.contiguous() for name, x in arrays.items()}, path)
    path.chmod(0o666 & ~_umask())


def check_absent(
    path: str | os.PathLike[str], *, overwrite: bool = False, check: Check = ownership.check_replaceable
) -> None:
    """Check that a folder may be written at `path`; done early, it spares a long run that could not be saved.

    Raises:
        InputError: If `path` exists and `overwrite` is false, is a file, or may not be replaced.
    """
    target = path_of(path)
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; give a folder that does not exist yet.")
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists already and is not overwritten; choose another folder or force it.")
    if target.exists():
        check(target)


def _begun(target: Path) -> tuple[Path, int | None]:
    """Return a new partial folder and the lock that says that it is alive, having removed those of dead processes."""
    with locks.guarded(target.parent) as alone:
        if alone:
            _tidy(target, rf"\.[a-z0-9_]{{8}}(\{_PARTIAL}|\{_REPLACED})")
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_PARTIAL, dir=target.parent))
        partial.chmod(0o777 & ~_umask())
        ownership.begin(partial)
        return partial, _lock(partial / ownership.MARKER)


def _put(partial: Path, target: Path, overwrite: bool, check: Check, placed: Callable[[Path], None]) -> None:
    """Move a finished folder to its place.

    Raises:
        InputError: If something stands there by now that may not be replaced; the folder then stands beside it.
    """
    if place(partial, target):
        return placed(target)
    try:
        check_absent(target, overwrite=overwrite, check=check)
    except InputError as error:
        beside = _beside(partial, target)
        placed(beside)
        raise InputError(f"{str(error).partition(';')[0].rstrip('.')}; the new results lie in {beside}.") from None
    if not exchange(partial, target):
        _replace_in_two_steps(partial, target)
    placed(target)


def _replace_in_two_steps(partial: Path, target: Path) -> None:
    replaced = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_REPLACED, dir=target.parent))
    target.rename(replaced / target.name)
    partial.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)


def put_aside(path: Path) -> Path:
    """Rename a file or folder to the first free name like its own, and return that."""
    return _beside(path, path)


def _beside(partial: Path, target: Path) -> Path:
    """Return the first free name like that of the target, under which a finished folder or file stands now.

    Raises:
        InputError: If there is none.
    """
    for number in range(2, 10_000):
        free = target.with_name(f"{target.stem}-{number}{target.suffix}")
        if place(partial, free):
            return free
    raise InputError(f"{target} and 9,998 names like it are taken; tidy up {target.parent}.")


def _recover(target: Path) -> None:
    """End a replacement in two steps that was killed between them: the new folder is placed, or the old put back."""
    if os.path.lexists(target) or not target.parent.is_dir():
        return
    for replaced in _like(target, rf"\.[a-z0-9_]{{8}}\{_REPLACED}"):
        finished = [p for p in _like(target, rf"\.[a-z0-9_]{{8}}\{_PARTIAL}") if ownership.is_sealed(p)]
        if any(_is_held(p / ownership.MARKER) for p in finished):
            return  # a living process is between the two
        for candidate in (*finished, replaced / target.name):
            if candidate.is_dir() and place(candidate, target):
                return


def _is_held(marker: Path) -> bool:
    lock = _lock(marker)
    if lock is not None:
        os.close(lock)
    return lock is None


def _tidy(target: Path, ending: str) -> None:
    """Remove the remains of dead processes beside a target: no process holds them, and they carry our marker."""
    for path in _like(target, ending):
        if path.suffix == _REPLACED:
            _remove_replaced(path, target)
            continue
        with contextlib.suppress(OSError):  # without a marker, or without locks, it is left alone
            lock = locks.held(path if path.is_file() else path / ownership.MARKER)
            if lock is not None:
                os.close(lock)
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_file():
        path.unlink()
    elif ownership.is_unfinished(path) or ownership.is_sealed(path):
        shutil.rmtree(path, ignore_errors=True)


def _remove_replaced(path: Path, target: Path) -> None:
    """Remove the old folder of a killed replacement, once the new one stands in its place."""
    old = path / target.name
    if ownership.is_sealed(target) and (not old.exists() or ownership.is_sealed(old)):
        shutil.rmtree(path, ignore_errors=True)


def _like(target: Path, ending: str) -> list[Path]:
    """Return the hidden neighbours of a target whose names are its own with such an ending."""
    found = target.parent.glob(f".{glob.escape(target.name)}.*")
    return sorted(p for p in found if re.fullmatch(ending, p.name[len(target.name) + 1 :]) and not p.is_symlink())


@contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Let an error of writing name the path: a full disk, a limit on the size of files.

    Raises:
        OSError: The same error, with the path.
        SafetensorError: If it is none of the system's.
    """
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(target)) from error
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(target)) from error


def _lock(path: Path) -> int | None:
    try:
        return locks.held(path)
    except OSError:
        return None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
