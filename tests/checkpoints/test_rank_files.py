"""Rank files of verl and SkyRL: parts of DTensors put together without their processes, or refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from funcprobe.checkpoints.rank_files import rank_files, state_of_ranks, weights_of_ranks
from funcprobe.errors import CheckpointError
from tests.cases.sharded_runs import cut
from tests.cases.trees import assert_same

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def folder(sharded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sharded / "global_step_2" / "actor", tmp_path / "actor")


def rewrite(path: Path, change: Callable[[Any], object]) -> None:
    found = torch.load(path, weights_only=True)
    change(found)
    path.unlink()
    torch.save(found, path)


def test_every_tensor_is_the_gathered_one(sharded: Path) -> None:
    folder = sharded / "global_step_2" / "actor"
    whole = torch.load(sharded / "one_group.pt", weights_only=True)
    weights, state = weights_of_ranks(folder), state_of_ranks(folder)
    assert set(weights.stored) == set(whole["model"])
    for name, expected in whole["model"].items():
        assert_same(weights.read(name), expected)
        assert weights.stored[name] == (tuple(expected.shape), expected.dtype)
    leaves = [name for name in whole["model"] if name != "lm_head.weight"]
    assert state.described["param_groups"][0]["params"] == list(range(len(leaves)))
    for i, name in enumerate(leaves):
        assert_same(dict(state.entries(i)), whole["optimizer"]["state"][name])
        described = {key: tuple(value.shape) for key, value in state.described["state"][i].items()}
        assert described == {key: tuple(value.shape) for key, value in state.entries(i).items()}


def test_every_way_to_cut_along_one_dimension_is_read(sharded: Path) -> None:
    weights = weights_of_ranks(sharded / "meshes")
    for name in set(weights.stored) - {"both"}:
        assert_same(weights.read(name), cut())
    with pytest.raises(CheckpointError, match="is no tensor cut along one dimension over 2 processes"):
        weights.read("both")


def test_it_is_read_where_torch_has_not_met_a_dtensor(sharded: Path) -> None:
    """And nothing is said on standard error about processes that are not here."""
    program = (
        "import sys; from pathlib import Path; from funcprobe.checkpoints.rank_files import weights_of_ranks;"
        f"print(weights_of_ranks(Path(sys.argv[1])).read({EMBEDDING!r}).shape)"
    )
    command = [sys.executable, "-c", program, str(sharded / "global_step_2" / "actor")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "torch.Size([23, 8])\n", "")


@pytest.mark.parametrize("kind", ["model", "optim"])
def test_a_payload_in_a_rank_file_is_not_run(folder: Path, tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "marker"

    class Payload:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return os.system, (f"touch {marker}",)

    torch.save({"x": Payload()}, folder / f"{kind}_world_size_2_rank_1.pt")
    read = {"model": weights_of_ranks, "optim": state_of_ranks}[kind]
    with pytest.raises(
        CheckpointError, match=r"rank_1\.pt cannot be read as plain tensors .* objects of posix\.system"
    ):
        read(folder)
    assert not marker.exists()


def missing_rank(folder: Path) -> None:
    (folder / "model_world_size_2_rank_1.pt").unlink()


def two_worlds(folder: Path) -> None:
    shutil.copy(folder / "model_world_size_2_rank_1.pt", folder / "model_world_size_4_rank_2.pt")


def one_rank_twice(folder: Path) -> None:
    shutil.copy(folder / "model_world_size_2_rank_0.pt", folder / "model_world_size_2_rank_1.pt")


def no_names(folder: Path) -> None:
    torch.save([1], folder / "model_world_size_2_rank_0.pt")


def flat(folder: Path) -> None:
    for rank in range(2):
        torch.save({EMBEDDING: torch.arange(3.0) + rank}, folder / f"model_world_size_2_rank_{rank}.pt")


def other_shape(folder: Path) -> None:
    def change(found: dict[str, DTensor]) -> None:
        found[EMBEDDING]._local_tensor = found[EMBEDDING]._local_tensor[:1].clone()

    rewrite(folder / "model_world_size_2_rank_1.pt", change)


def lacks_a_name(folder: Path) -> None:
    rewrite(folder / "model_world_size_2_rank_1.pt", lambda found: found.pop(EMBEDDING))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing_rank, r"lacks 'model_world_size_2_rank_1\.pt', the part of one process"),
        (two_worlds, "holds files of runs with 2 and 4 processes"),
        (one_rank_twice, "is no tensor cut along one dimension over 2 processes"),
        (no_names, "holds no tensors by name"),
        (flat, r"is a piece of a flat parameter of FSDP 1.*train with strategy fsdp2"),
        (other_shape, "is no tensor cut along one dimension"),
        (lacks_a_name, "is no tensor cut along one dimension"),
    ],
)
def test_parts_that_make_up_nothing_are_refused(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        weights_of_ranks(folder).read(EMBEDDING)


def test_files_of_other_names_are_not_looked_at(folder: Path) -> None:
    (folder / "model_world_size_2_rank_x.pt").write_bytes(b"noise")
    (folder / "model_world_size_9_rank_0.pt.tmp").write_bytes(b"noise")
    assert [path.name for path in rank_files(folder, "model")] == [f"model_world_size_2_rank_{r}.pt" for r in range(2)]
    assert rank_files(folder, "critic") == []
