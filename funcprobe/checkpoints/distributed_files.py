"""A torch.distributed.checkpoint folder, read by name: one tensor or one value at a time, and no process group."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funcprobe.checkpoints.distributed_metadata import Contents, Item, contents_of
from funcprobe.checkpoints.tensor_files import tensors_in
from funcprobe.errors import CheckpointError


class DistributedFiles:
    """The tensors and values of a folder, whatever number of processes wrote it.

    Raises:
        CheckpointError: If its table cannot be read, or does not fit the files beside it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contents: Contents = contents_of(folder)

    def path(self, key: str) -> tuple[str, ...]:
        """Return the nested names that a key was joined from, or the key alone where the table does not say."""
        return self.contents.paths.get(key, (key,))

    def described(self, key: str) -> Tensor:
        """Return a tensor of the shape and dtype of the one under a key, without numbers."""
        entry = self.contents.tensors[key]
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    def tensor(self, key: str) -> Tensor:
        """Return the tensor under a key, put together from its chunks.

        Raises:
            CheckpointError: If a chunk cannot be read, or is another than the table says.
        """
        entry = self.contents.tensors[key]
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        for offsets, sizes, item in entry.chunks:
            found = self._read(key, item)
            if not isinstance(found, Tensor) or (tuple(found.shape), found.dtype) != (sizes, entry.dtype):
                raise CheckpointError(
                    f"'{key}' in {item.file} is not the tensor of shape {sizes} and {entry.dtype} that the table of "
                    "the checkpoint says; the file is damaged."
                )
            box = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
            whole[box] = found
        return whole

    def value(self, key: str) -> Any:
        """Return the number, the text or the list under a key.

        Raises:
            CheckpointError: If it cannot be read, or is anything but plain data.
        """
        return self._read(key, self.contents.values[key])

    def _read(self, key: str, item: Item) -> Any:
        try:
            with item.file.open("rb") as stream:
                stream.seek(item.offset)
                content = stream.read(item.length)
        except OSError as error:
            raise CheckpointError(f"{item.file} cannot be read ({error.strerror}).") from None
        return tensors_in(io.BytesIO(content), f"'{key}' in {item.file}")
