"""The table of contents of a torch.distributed.checkpoint folder, `.metadata`, read without running anything.

It is a pickle. The classes that torch's own writer puts into one are known by name, each is replaced by a record that
keeps its fields and does nothing, and any other name is refused. The records are made anew for every file, so that no
file can change the reading of another. From them comes plain data: for every tensor its shape, its dtype and the bytes
of its chunks, all held against the folder before anything is read.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from funcprobe.checkpoints.tensor_files import UNREADABLE
from funcprobe.data.reading import MIB, bytes_of
from funcprobe.errors import CheckpointError, InputError

Shape = tuple[int, ...]

#: The table's name in its folder, and its size in bytes at most.
TABLE, _LIMIT = ".metadata", 512 * MIB

#: What stands in a table, by module; dtypes are known beside.
_RECORDS: Mapping[str, tuple[str, ...]] = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
}

#: Names for which a type of Python's own does: a size is a tuple, a layout the text that names it.
_PLAIN: Mapping[tuple[str, str], type] = {
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    ("collections", "OrderedDict"): dict,
}

#: The name of a file beside the table: no folder, and torch's suffix.
_FILE = re.compile(r"[^/\\\x00]+\.distcp")


class Item(NamedTuple):
    """The bytes of a file that hold one chunk of a tensor, or one value."""

    file: Path
    offset: int
    length: int


class Chunk(NamedTuple):
    """A box of a tensor."""

    offsets: Shape
    sizes: Shape
    item: Item


class Entry(NamedTuple):
    """A tensor and the chunks that it consists of."""

    shape: Shape
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


class Contents(NamedTuple):
    """The tensors and values of a folder, by the keys of its table."""

    tensors: Mapping[str, Entry]
    values: Mapping[str, Item]  #: numbers, names and lists of them
    paths: Mapping[str, tuple[str, ...]]  #: the nested names that a key was joined from, as far as the table says


class _Record:
    """An object in a table: its arguments and its fields, and no behaviour."""

    def __init__(self, *arguments: object) -> None:
        self.arguments, self.state = arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    """An unpickler that knows the names of a table and no others."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        names = ((module, name) for module, every in _RECORDS.items() for name in every)
        self._known: dict[tuple[str, str], Any] = {key: type(key[1], (_Record,), {}) for key in names}
        self._known |= _PLAIN

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name of a table.

        Raises:
            UnpicklingError: If it is none.
        """
        found = self._known.get((module, name))
        if found is None and module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, and only torch's own table entries are known")
        return found


def contents_of(folder: Path) -> Contents:
    """Return the tensors and values of a torch.distributed.checkpoint folder, by its table.

    Raises:
        CheckpointError: If the table is missing, is damaged, names anything but the parts of one, or does not fit the
            files beside it.
    """
    table = folder / TABLE
    try:
        record = _Reader(io.BytesIO(bytes_of(table, _LIMIT))).load()
    except InputError as error:
        raise CheckpointError(f"the table of the sharded checkpoint cannot be read: {error}") from None
    except (*UNREADABLE, ImportError) as error:
        raise CheckpointError(f"{table} is not read, and nothing in it was run: {_reason(error)}.") from None
    try:
        return _contents(folder, record)
    except _Damaged as error:
        raise CheckpointError(f"{table} is not read: {error}.") from None
    except UNREADABLE:
        raise CheckpointError(f"{table} is not read: it is no table of torch.distributed.checkpoint.") from None


class _Damaged(Exception):
    """A table that does not hold together; the message says where."""


def _reason(error: BaseException) -> str:
    text = str(error)
    return text if text.startswith("it names ") else "it is damaged, or no table of torch.distributed.checkpoint"


def _contents(folder: Path, record: Any) -> Contents:
    kinds, places = _field(record, "state_dict_metadata"), _field(record, "storage_data")
    items: dict[tuple[str, Shape | None], Item] = {}
    sizes: dict[Path, int] = {}
    for index, info in places.items():
        offset = index.state.get("offset")
        key = (_text(index.state["fqn"]), None if offset is None else _shape(offset))
        items[key] = _item(folder, info, key[0], sizes)
    tensors, values = {}, {}
    for key, kind in kinds.items():
        if type(kind).__name__ == "TensorStorageMetadata":
            tensors[_text(key)] = _entry(key, kind, items)
        elif (key, None) in items:
            values[_text(key)] = items[key, None]
    return Contents(tensors, values, dict(_paths(record.state.get("planner_data"))))


def _item(folder: Path, info: Any, key: str, sizes: dict[Path, int]) -> Item:
    """Return the bytes that an entry of the table names, which are those of a file beside it.

    Raises:
        _Damaged: If they are not, or are kept in another form than they were saved in.
    """
    name, offset, length = (info.state[field] for field in ("relative_path", "offset", "length"))
    if not isinstance(name, str) or not _FILE.fullmatch(name):
        raise _Damaged(f"'{key}' is said to lie in {name!r:.80}, and only .distcp files beside the table are read")
    if through := info.state.get("transform_descriptors"):
        raise _Damaged(f"'{key}' was saved through transform_descriptors ({through!r:.60}); save without them")
    file = folder / name
    if file not in sizes:
        if not file.is_file():
            raise _Damaged(f"'{key}' is said to lie in '{name}', which is missing; copy the whole folder")
        sizes[file] = file.stat().st_size
    if not (_is_count(offset) and _is_count(length) and offset + length <= sizes[file]):
        raise _Damaged(f"'{key}' is said to lie beyond the end of '{name}'; the file is damaged, or not all there")
    return Item(file, offset, length)


def _entry(key: str, kind: Any, items: Mapping[tuple[str, Shape | None], Item]) -> Entry:
    shape, dtype = _shape(kind.state["size"]), kind.state["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise _Damaged(f"'{key}' has no dtype")
    chunks = []
    for chunk in kind.state["chunks"]:
        offsets, sizes = _shape(chunk.state["offsets"]), _shape(chunk.state["sizes"])
        if math.prod(sizes):  # a process without a part of a leaf has an empty one
            chunks.append(Chunk(offsets, sizes, items[key, offsets]))
    if not _tile(shape, chunks):
        raise _Damaged(f"the chunks of '{key}' do not make up its shape {shape}; the checkpoint is not all there")
    if math.prod(shape) * dtype.itemsize > sum(chunk.item.length for chunk in chunks):
        raise _Damaged(f"'{key}' is said to have shape {shape}, which its bytes do not hold")
    return Entry(shape, dtype, tuple(chunks))


def _tile(shape: Shape, chunks: Sequence[Chunk]) -> bool:
    """Return whether boxes are a grid over a shape: along every dimension intervals that follow each other."""
    if any(len(chunk.offsets) != len(shape) or len(chunk.sizes) != len(shape) for chunk in chunks):
        return False
    grid = [sorted({(chunk.offsets[d], chunk.sizes[d]) for chunk in chunks}) for d in range(len(shape))]
    for size, intervals in zip(shape, grid, strict=True):
        starts = [start for start, _ in intervals] + [size]
        if starts[0] != 0 or any(s + n != after for (s, n), after in zip(intervals, starts[1:], strict=True)):
            return math.prod(shape) == 0
    whole = {chunk.offsets for chunk in chunks}
    return len(whole) == len(chunks) == (math.prod(map(len, grid)) if math.prod(shape) else 0)


def _paths(planner_data: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    if isinstance(planner_data, dict):
        for key, path in planner_data.items():
            if isinstance(path, tuple) and all(isinstance(part, str | int) for part in path):
                yield _text(key), tuple(map(str, path))


def _field(record: Any, name: str) -> Mapping[Any, Any]:
    found = record.state[name]
    if not isinstance(found, dict):
        raise _Damaged(f"its {name} is a {type(found).__name__}")
    return found


def _shape(size: Any) -> Shape:
    if not isinstance(size, tuple) or not all(map(_is_count, size)):
        raise _Damaged(f"{size!r:.60} is no shape")
    return size


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**60


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _Damaged(f"{value!r:.60} is no name")
    return value
