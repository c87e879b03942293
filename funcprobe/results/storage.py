"""Results on disk: `result.json`, and `result.safetensors` where there are arrays; nothing is pickled.

    {"schema_version": 3, "kind": "sweep", "arrays": null, "points": [...], ...}

One format for every kind of result. "arrays" is the SHA-256 of the file of arrays, so that the two belong together.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from funcprobe.data.atomic import fresh_directory, write_arrays
from funcprobe.data.paths import path_of
from funcprobe.data.reading import json_of
from funcprobe.errors import InputError
from funcprobe.results import hub
from funcprobe.results.codec import Arrays, DamagedError, decode, encode
from funcprobe.types import Json

#: Raised when a field changes its meaning.
SCHEMA_VERSION = 3

Kind = Literal["probe", "sweep", "curve", "comparison", "attribution", "validation", "diagnosis", "ledger"]

NUMBERS, ARRAYS = FILES = "result.json", "result.safetensors"

#: Bytes of the numbers at most: those of an attribution of 300,000 tokens stand among the arrays.
LIMIT = 2**30

#: What stands in the file beside the fields of the result.
_HEAD = ("schema_version", "kind", "arrays")


class Kept(Protocol):
    """A result that says which kind it is."""

    @property
    def kind(self) -> Kind:
        """The kind of result that the folder's file names."""
        ...


R = TypeVar("R", bound=Kept)


class ArrayFile:
    """Tensors in a file of their own, by name."""

    def __init__(self, stored: Mapping[str, Tensor] | None = None) -> None:
        self.stored: dict[str, Tensor] = dict(stored or {})
        self._places: set[int] = set()

    def put(self, name: str, x: Tensor) -> str:
        """Keep a tensor under a name, or one like it where that is taken, and return the name."""
        x = x.detach().cpu().contiguous()
        place = x.untyped_storage().data_ptr()
        if place in self._places:
            x = x.clone()  # safetensors refuses memory that is shared
        self._places.add(place)
        while name in self.stored:
            name += "'"
        self.stored[name] = x
        return name

    def get(self, plain: Any) -> Tensor:
        """Return the tensor of that name.

        Raises:
            DamagedError: If there is none.
        """
        if not isinstance(plain, str) or plain not in self.stored:
            raise DamagedError(f"an array that is not in {ARRAYS}")
        return self.stored[plain]


def save(result: Kept, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the folder `path`, whole or not at all.

    Raises:
        InputError: If the folder exists and `overwrite` is false.
    """
    with fresh_directory(path, overwrite=overwrite) as folder:
        write_into(result, folder)
    return Path(path)


def write_into(result: Kept, folder: Path) -> None:
    """Write the files of a result into an existing folder."""
    arrays = ArrayFile()
    plain = plain_of(result, arrays)
    if arrays.stored:
        write_arrays(arrays.stored, folder / ARRAYS)
        plain["arrays"] = _digest(folder / ARRAYS)
    text = json.dumps(plain, indent=1, allow_nan=False, ensure_ascii=False)
    (folder / NUMBERS).write_text(text + "\n", encoding="utf-8")


def plain_of(result: Kept, arrays: Arrays) -> Json:
    """Return a result as JSON-safe values, its arrays put away."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": result.kind,
        "arrays": None,
        **encode(result, type(result), arrays),
    }


def load(cls: type[R], path: str | os.PathLike[str]) -> R:
    """Return the result of a class that stands in a folder.

    Raises:
        InputError: If there is none, it is damaged, of another kind, or of another schema version.
    """
    folder = folder_of(path)
    plain, kind = read(folder)
    if kind != cls.kind:
        raise InputError(
            f"{folder} holds a result of kind '{kind}', and one of kind '{cls.kind}' was asked for; funcprobe.load "
            "reads every kind."
        )
    return decoded(cls, plain, folder)


def folder_of(path: str | os.PathLike[str]) -> Path:
    """Return the folder that a path names, fetched where that is an address of the Hub.

    Raises:
        InputError: If it is no path, or the address cannot be read.
        MissingExtraError: If it is an address, and huggingface_hub is not installed.
    """
    if not (isinstance(path, str) and path.startswith(hub.SCHEME)):
        return path_of(path)
    folder = hub.fetched(hub.Address.of(path), FILES)
    if not (folder / NUMBERS).is_file():
        raise InputError(f"{path} holds no {NUMBERS}; expected a folder that push_to_hub wrote.")
    return folder


def read(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the plain values of the result in a folder, and its kind.

    Raises:
        InputError: If there is none, it is damaged, or it has another schema version.
    """
    file = folder / NUMBERS
    if not file.is_file():
        raise InputError(f"{folder} holds no {NUMBERS}; expected a folder that a result's save, or a command, wrote.")
    plain = json_of(file, LIMIT)
    version = plain.get(_HEAD[0]) if isinstance(plain, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(f"{file} has schema version {version!s:.60}; this funcprobe reads {SCHEMA_VERSION}.")
    return plain, f"{plain.get('kind')!s:.60}"


def decoded(cls: type[R], plain: Mapping[str, Any], folder: Path) -> R:
    """Return the result of these plain values, with the arrays beside them.

    Raises:
        InputError: If either file is damaged, or they are not of one result.
    """
    arrays = ArrayFile(_stored(folder, plain.get("arrays")))
    try:
        return decode({name: x for name, x in plain.items() if name not in _HEAD}, cls, arrays)
    except (DamagedError, InputError, RecursionError) as error:  # an InputError is one of the result's own
        raise InputError(f"{folder} holds no whole {cls.kind} ({error}); its files are damaged.") from error


def _stored(folder: Path, digest: str | None) -> dict[str, Tensor]:
    """Return the arrays beside a result that has some.

    Raises:
        InputError: If they are not there, or not the ones that were saved with it.
    """
    file = folder / ARRAYS
    if digest is None:
        return {}
    if not isinstance(digest, str):
        raise InputError(f"{folder / NUMBERS} holds {digest!r:.60} as arrays, expected a digest; the file is damaged.")
    if not file.is_file():
        raise InputError(f"{folder} holds no {ARRAYS}, and {NUMBERS} in it refers to one; the result is not whole.")
    if _digest(file) != digest:
        raise InputError(f"{file} is not the file that {NUMBERS} was saved with; it is damaged, or another result's.")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file} holds no arrays ({error}); it is damaged.") from error


def _digest(file: Path) -> str:
    with file.open("rb") as bytes_of_it:
        return hashlib.file_digest(bytes_of_it, "sha256").hexdigest()
