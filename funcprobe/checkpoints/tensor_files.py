"""Files of torch.save as data: tensors and plain containers, and nothing else is unpickled."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from funcprobe.checkpoints.numpy_numbers import numpy_numbers
from funcprobe.data.reading import check_ordinary
from funcprobe.errors import CheckpointError, InputError
from funcprobe.policy.running import first_sentence

#: Whatever unpickling and torch's own reader raise on a file that is damaged, or made to harm.
UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    AttributeError,
    TypeError,
    RecursionError,
    MemoryError,
    OverflowError,
)


def tensors_of(path: Path, *, mapped: bool = False) -> Any:
    """Return the content of a file that torch.save wrote; `mapped` leaves its tensors in the file.

    Raises:
        CheckpointError: If it is no ordinary file, is damaged, or holds anything but tensors and plain containers.
    """
    try:
        check_ordinary(path)
    except InputError as error:
        raise CheckpointError(str(error)) from None
    # files older than torch 1.6 are no zip archives, and cannot be mapped
    return tensors_in(path, str(path), mapped=mapped and zipfile.is_zipfile(path))


def tensors_in(source: Path | IO[bytes], what: str, *, mapped: bool = False) -> Any:
    """Return the content of a file, or of an open stream, that torch.save wrote.

    Raises:
        CheckpointError: If it is damaged, or holds anything but tensors and plain containers.
    """
    try:
        with warnings.catch_warnings(), numpy_numbers():  # what torch says of foreign pickles beside refusing them
            warnings.simplefilter("ignore")
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except UNREADABLE as error:
        # torch's own message is coloured, and advises to load the file without this guard
        raise CheckpointError(
            f"{what} cannot be read as plain tensors and containers, and nothing else is unpickled: {_reason(error)}."
        ) from None


def _reason(error: BaseException) -> str:
    """Return the fault of the file, in torch's own words where these are about the file."""
    if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it holds objects of {named[1]}"
    inner = re.search(r"WeightsUnpickler error:\s*([^\n]+)", str(error))
    told = inner[1].strip() if inner else first_sentence(error)
    return f"it is damaged, or holds other objects ({told[:120]})"
