"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from funcprobe.errors import InputError


@contextmanager
def fresh_directory(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`, which takes its place when the block ends without an error.

    Whatever stood at `path` stays until then; a block that raises, or a killed process, leaves it as it was.

    Raises:
        InputError: If `path` exists and `overwrite` is false, or is a file.
    """
    target = Path(path).absolute()
    check_absent(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        partial.chmod(0o777 & ~_umask())
        yield partial
        if target.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".replaced", dir=target.parent))
            target.rename(replaced / target.name)
            partial.rename(target)
            shutil.rmtree(replaced)
        else:
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_arrays(arrays: Mapping[str, Tensor], path: Path) -> None:
    """Write named arrays as safetensors, with the permissions of any other new file: the library's are private."""
    save_file({name: x.contiguous() for name, x in arrays.items()}, path)
    path.chmod(0o666 & ~_umask())


def check_absent(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Check that a folder may be written at `path`; done early, it spares a long run that could not be saved.

    Raises:
        InputError: If `path` exists and `overwrite` is false, or is a file.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; give a folder that does not exist yet.")
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists already and is not overwritten; choose another folder or force it.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
