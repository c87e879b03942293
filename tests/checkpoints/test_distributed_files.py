"""Tensors of a sharded checkpoint, put together by name; what lies in its files is data alone."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from funcprobe.checkpoints.distributed_files import DistributedFiles
from funcprobe.errors import CheckpointError
from tests.cases.sharded_runs import cut
from tests.cases.trees import assert_same

KEY = "model.model.embed_tokens.weight"


@pytest.fixture
def folder(sharded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sharded / "accelerate" / "pytorch_model_fsdp_0", tmp_path / "c")


def test_every_tensor_is_the_gathered_one(sharded: Path) -> None:
    files = DistributedFiles(sharded / "accelerate" / "pytorch_model_fsdp_0")
    whole = torch.load(sharded / "two_groups.pt", weights_only=True)["model"]
    assert {files.path(key)[-1] for key in files.contents.tensors} == set(whole)
    for key, entry in files.contents.tensors.items():
        expected = whole[files.path(key)[-1]]
        assert_same(files.tensor(key), expected)
        assert (files.described(key).shape, files.described(key).dtype) == (expected.shape, expected.dtype)
        assert len(entry.chunks) == 2, "each process wrote a part"
    rows = sorted(chunk.sizes[0] for chunk in files.contents.tensors[KEY].chunks)
    assert rows == [11, 12], "of 23 rows, so that the parts differ in size"


def test_every_way_to_cut_is_read(sharded: Path) -> None:
    files = DistributedFiles(sharded / "meshes")
    assert len(files.contents.tensors) == 6
    for key in files.contents.tensors:
        assert_same(files.tensor(key), cut())


def test_values_are_plain(sharded: Path) -> None:
    files = DistributedFiles(sharded / "step_2" / "trainer")
    assert files.value("app.progress.step") == 2
    assert files.value("app.optimizers.param_groups.0.betas") == (0.9, 0.999)


def overwritten(folder: Path, content: bytes) -> None:
    """Write other bytes over the first chunk of a tensor, in the same place."""
    _, _, item = DistributedFiles(folder).contents.tensors[KEY].chunks[0]
    with item.file.open("r+b") as stream:
        stream.seek(item.offset)
        stream.write(content.ljust(item.length, b"\0")[: item.length])


def test_a_payload_in_an_item_is_not_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Payload:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return os.system, (f"touch {marker}",)

    overwritten(folder, pickle.dumps(Payload(), protocol=2))
    with pytest.raises(CheckpointError, match=rf"'{KEY}' in .*distcp cannot be read as plain tensors .*posix\.system"):
        DistributedFiles(folder).tensor(KEY)
    assert not marker.exists()


@pytest.mark.parametrize("content", [torch.zeros(3), torch.zeros(12, 8, dtype=torch.float64), [1, 2]])
def test_an_item_that_is_another_is_refused(folder: Path, tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other")
    _, _, item = DistributedFiles(folder).contents.tensors[KEY].chunks[0]
    files = DistributedFiles(folder)
    first, *rest = files.contents.tensors[KEY].chunks
    other = item._replace(file=tmp_path / "other", offset=0, length=(tmp_path / "other").stat().st_size)
    files.contents.tensors[KEY] = files.contents.tensors[KEY]._replace(chunks=(first._replace(item=other), *rest))
    with pytest.raises(CheckpointError, match=r"is not the tensor of shape .* that the table of the checkpoint says"):
        files.tensor(KEY)


def test_a_file_cut_short_is_refused(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"beyond the end of '__0_0\.distcp'; the file is damaged"):
        DistributedFiles(folder)


def test_noise_in_an_item_is_refused(folder: Path) -> None:
    overwritten(folder, b"\x80\x02noise")
    with pytest.raises(CheckpointError, match="it is damaged, or holds other objects"):
        DistributedFiles(folder).tensor(KEY)
