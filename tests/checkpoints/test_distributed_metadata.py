"""The table of a sharded checkpoint: read as data, held against its folder, and refused for anything else."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import metadata as torchs
from torch.distributed.checkpoint.filesystem import _StorageInfo

from funcprobe.checkpoints.distributed_metadata import Chunk, Item, _tile, contents_of
from funcprobe.errors import CheckpointError
from tests.cases.third_party import third_party

KEY = "model.w"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of torch's own writer: one tensor of one process, and a number."""
    with third_party():
        dcp.save({"model": {"w": torch.arange(6.0).view(2, 3)}, "step": 3}, checkpoint_id=tmp_path / "c", no_dist=True)
    return tmp_path / "c"


def table(folder: Path) -> torchs.Metadata:
    return pickle.loads((folder / ".metadata").read_bytes())


def write(folder: Path, content: object) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(content))


def test_a_table_is_read_as_torch_reads_it(sharded: Path) -> None:
    for place in (sharded / "accelerate" / "optimizer_0", sharded / "step_2" / "trainer", sharded / "step-2"):
        expected, found = table(place), contents_of(place)
        assert {*found.tensors, *found.values} == set(expected.state_dict_metadata)
        for key, entry in found.tensors.items():
            theirs = expected.state_dict_metadata[key]
            assert (entry.shape, entry.dtype) == (tuple(theirs.size), theirs.properties.dtype)
            whole = {(tuple(c.offsets), tuple(c.sizes)) for c in theirs.chunks}
            assert {(c.offsets, c.sizes) for c in entry.chunks} == whole
        assert found.paths == {key: tuple(map(str, path)) for key, path in expected.planner_data.items()}
        info = {(i.fqn, i.offset): (s.relative_path, s.offset, s.length) for i, s in expected.storage_data.items()}
        items = [item for entry in found.tensors.values() for _, _, item in entry.chunks] + list(found.values.values())
        assert sorted((i.file.name, i.offset, i.length) for i in items) == sorted(info.values())


class Payload:
    """Leaves a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch '{self.marker}'",)


PLACES: dict[str, Callable[[Any], object]] = {
    "the whole": lambda bomb: bomb,
    "an entry": lambda bomb: torchs.Metadata({KEY: bomb}),
    "the planner's data": lambda bomb: torchs.Metadata({}, planner_data=bomb, storage_data={}),
    "a key": lambda bomb: torchs.Metadata({}, storage_data={torchs.MetadataIndex(bomb): 1}),
    "an extension": lambda bomb: torchs.Metadata({}, storage_data={1: _StorageInfo("x.distcp", 0, 1, [bomb])}),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_payload_is_named_and_not_run(folder: Path, tmp_path: Path, place: str) -> None:
    marker = tmp_path / "marker"
    write(folder, PLACES[place](Payload(marker)))
    with pytest.raises(CheckpointError, match=r"nothing in it was run: it names \w+\.system, and only"):
        contents_of(folder)
    assert not marker.exists()


_RECORDS = b"torch.distributed.checkpoint.metadata"

#: Pickles that name a known record, and try to change it or to get at more through it.
CHANGING = {
    "an attribute of a class": b"c" + _RECORDS + b"\nMetadata\n(N}X\x01\x00\x00\x00aX\x01\x00\x00\x00btb.",
    "a name with dots": b"\x80\x04\x8c\x25" + _RECORDS + b"\x8c\x17Metadata.__init__.__globals__\x93.",
    "a function of a module": b"ctorch\nload\n.",
    "a built-in": b"cbuiltins\neval\n(X\x03\x00\x00\x001+1tR.",
    "an instruction that is none": b"\xff.",
    "no pickle": b"hello",
    "nothing": b"",
}


@pytest.mark.parametrize("content", CHANGING)
def test_a_table_that_would_do_something_is_refused(folder: Path, content: str) -> None:
    (folder / ".metadata").write_bytes(CHANGING[content])
    with pytest.raises(CheckpointError, match=r"\.metadata is not read"):
        contents_of(folder)
    shutil.rmtree(folder)
    assert not hasattr(torchs.Metadata, "a"), "torch's own class was changed"


def edited(**fields: object) -> Callable[[torchs.Metadata], None]:
    """Change the place of the one chunk of the tensor."""

    def change(found: torchs.Metadata) -> None:
        info = next(info for index, info in found.storage_data.items() if index.fqn == KEY)
        for name, value in fields.items():
            setattr(info, name, value)

    return change


def shaped(
    size: tuple[int, ...], *chunks: tuple[tuple[int, ...], tuple[int, ...]]
) -> Callable[[torchs.Metadata], None]:
    """Change the shape of the tensor, and what its chunks are said to be."""

    def change(found: torchs.Metadata) -> None:
        index, info = next((i, s) for i, s in found.storage_data.items() if i.fqn == KEY)
        entry = found.state_dict_metadata[KEY]
        entry.size = torch.Size(size)
        entry.chunks = [torchs.ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in chunks]
        found.storage_data |= {torchs.MetadataIndex(KEY, o): info for o, _ in chunks}
        assert index.fqn == KEY

    return change


WRONG: dict[str, tuple[Callable[[torchs.Metadata], None], str]] = {
    "a path out of the folder": (edited(relative_path="../x.distcp"), "only .distcp files beside the table are read"),
    "an absolute path": (edited(relative_path="/etc/passwd"), "only .distcp files beside the table are read"),
    "a path that is a number": (edited(relative_path=3), "only .distcp files beside the table are read"),
    "another file": (edited(relative_path="model.safetensors"), "only .distcp files beside the table are read"),
    "a file that is missing": (edited(relative_path="__9_0.distcp"), "which is missing; copy the whole folder"),
    "an offset beyond the file": (edited(offset=10**6), "beyond the end of"),
    "an offset below 0": (edited(offset=-1), "beyond the end of"),
    "a length beyond the file": (edited(length=10**9), "beyond the end of"),
    "transforms": (
        edited(transform_descriptors=["zstd"]),
        r"through transform_descriptors \(\['zstd'\]\); save without",
    ),
    "a huge shape": (shaped((2**40,), ((0,), (2**40,))), "which its bytes do not hold"),
    "a gap": (shaped((4, 3), ((0, 0), (2, 3)), ((3, 0), (1, 3))), r"do not make up its shape \(4, 3\)"),
    "an overlap": (shaped((4, 3), ((0, 0), (3, 3)), ((2, 0), (2, 3))), "do not make up its shape"),
    "a chunk of another rank": (shaped((6,), ((0, 0), (2, 3))), "do not make up its shape"),
    "a negative shape": (shaped((2, 3), ((0, -1), (2, 4))), "is no shape"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_table_that_does_not_fit_its_folder_is_refused(folder: Path, wrong: str) -> None:
    change, message = WRONG[wrong]
    found = table(folder)
    change(found)
    write(folder, found)
    with pytest.raises(CheckpointError, match=message):
        contents_of(folder)


@pytest.mark.parametrize(
    "content", [3, [1], {"state_dict_metadata": {}}, torchs.Metadata({}), torchs.Metadata([], 3, 3)]
)
def test_a_pickle_that_is_no_table_is_refused(folder: Path, content: object) -> None:
    write(folder, content)
    with pytest.raises(CheckpointError, match="is not read: it"):
        contents_of(folder)


def test_no_table_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"table of the sharded checkpoint cannot be read: .*there is no such file"
    ):
        contents_of(tmp_path)


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=0, max_size=3), st.data())
def test_a_grid_of_boxes_makes_up_a_shape_and_no_part_of_one_does(cuts: list[list[int]], data: st.DataObject) -> None:
    shape = tuple(map(sum, cuts))
    item = Item(Path("x"), 0, 0)
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for sizes in cuts:
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        boxes = [((*o, start), (*s, n)) for o, s in boxes for start, n in zip(starts, sizes, strict=True)]
    chunks = data.draw(st.permutations([Chunk(o, s, item) for o, s in boxes]))
    assert _tile(shape, chunks)
    assert not _tile(shape, chunks[:-1])
    assert not _tile(shape, [*chunks, chunks[0]])
