"""Checkpoints of every framework, recognised and read; what is not read is refused with its own tool's command."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import funcprobe as fp
from funcprobe.checkpoints import Checkpoint, load_checkpoint, load_optimizer
from funcprobe.errors import CheckpointError, FuncprobeWarning, Note
from tests.cases import models
from tests.cases.sharded_runs import FOLDERS
from tests.cases.trees import assert_same, assert_same_state, random_like


def loaded(sharded: Path, framework: str, **options: Any) -> Checkpoint:
    name, beside, _ = FOLDERS[framework]
    with pytest.warns(FuncprobeWarning, match=f"is a checkpoint of {framework}, whose shards are put together"):
        return load_checkpoint(sharded / name, sharded / "base" if beside else None, **options)


def in_one_piece(sharded: Path, framework: str) -> dict[str, Any]:
    return torch.load(sharded / FOLDERS[framework][2], weights_only=True)


def state_of(whole: dict[str, Any], found: Checkpoint) -> dict[str, Any]:
    return {name: whole["optimizer"]["state"][name] for name in found.params}


@pytest.mark.parametrize("framework", FOLDERS)
def test_weights_and_state_are_those_in_one_piece(sharded: Path, framework: str) -> None:
    found, whole = loaded(sharded, framework), in_one_piece(sharded, framework)
    assert "lm_head.weight" not in found.params, "the head is tied"
    assert_same(found.params, {name: whole["model"][name] for name in found.params})
    assert_same_state(found.opt_state, state_of(whole, found))
    assert found.tokenizer is not None


@pytest.mark.parametrize("framework", FOLDERS)
def test_the_update_is_the_one_from_the_state_in_one_piece(sharded: Path, framework: str, tmp_path: Path) -> None:
    found, whole = loaded(sharded, framework), in_one_piece(sharded, framework)
    torch.save(whole["optimizer"], tmp_path / "optimizer.pt")
    optimizer, state = load_optimizer(tmp_path / "optimizer.pt", found.params)
    gradient = random_like(found.params)
    expected, taken = (
        o.apply(found.params, s, gradient) for o, s in ((optimizer, state), (found.optimizer, found.opt_state))
    )
    assert_same(taken.params, expected.params)
    assert_same(taken.delta, expected.delta)
    decays = [group.hyperparameters["weight_decay"] for group in found.optimizer.groups]
    assert decays == ([0.1] if framework in ("verl", "SkyRL") else [0.1, 0.0])


@pytest.mark.parametrize("framework", ["prime-rl", "verl"])
def test_a_probe_with_the_state_left_on_disk_says_the_same(sharded: Path, framework: str) -> None:
    batch, evaluation = (models.rollouts(6, seed=seed) for seed in (0, 1))
    results = []
    for offload in (None, "cpu"):
        found = loaded(sharded, framework, offload=offload)
        assert isinstance(found.opt_state, dict) == (offload is None)
        results.append(fp.probe(found.update(fp.grpo(), batch), evaluation).readings)
    assert repr(results[0]) == repr(results[1])


def test_the_framework_is_said_in_a_note(sharded: Path) -> None:
    with pytest.warns(FuncprobeWarning) as warned:
        load_checkpoint(sharded / "global_step_2", optimizer=None)
    (note,) = (w.message.args[0] for w in warned)
    assert isinstance(note, Note)
    assert note.kind == "framework"


def test_a_state_by_names_beside_whole_weights_is_read(sharded: Path, tmp_path: Path) -> None:
    """accelerate's FSDP with FULL_STATE_DICT: `optimizer.bin`, and pickled weights beside safetensors."""
    folder = shutil.copytree(sharded / "full", tmp_path / "c")
    shutil.copytree(sharded / "base", folder, dirs_exist_ok=True)
    whole = in_one_piece(sharded, "prime-rl")
    save_file({n: t for n, t in whole["model"].items() if n != "lm_head.weight"}, folder / "model.safetensors")
    assert (folder / "optimizer.bin").is_file()
    assert (folder / "pytorch_model_fsdp.bin").is_file()
    found = load_checkpoint(folder)
    assert_same_state(found.opt_state, state_of(whole, found))
    assert [g.hyperparameters["weight_decay"] for g in found.optimizer.groups] == [0.1, 0.0]


def test_shards_of_a_state_beside_whole_weights_are_read(sharded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sharded / "base", tmp_path / "c")
    whole = in_one_piece(sharded, "prime-rl")
    save_file({n: t for n, t in whole["model"].items() if n != "lm_head.weight"}, folder / "model.safetensors")
    shutil.copytree(sharded / "accelerate" / "optimizer_0", folder / "optimizer_0")
    with pytest.warns(FuncprobeWarning, match="accelerate's FSDP"):
        found = load_checkpoint(folder)
    assert_same_state(found.opt_state, state_of(whole, found))


def made(*names: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()

    return write


MEGATRON = r"convert_checkpoints\.py export --hf-model MODEL --megatron-path FOLDER --hf-path OUTPUT; load that with"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            made("latest", "global_step9/zero_pp_rank_0_mp_rank_00_optim_states.pt"),
            r"the weights as DeepSpeed ZeRO shards \(global_step9\).*python zero_to_fp32\.py FOLDER OUTPUT --safe_ser",
        ),
        (made("zero_pp_rank_0_mp_rank_00_model_states.pt"), "the weights as DeepSpeed ZeRO shards"),
        (made("latest_checkpointed_iteration.txt", "iter_0000010/mp_rank_00/model_optim_rng.pt"), MEGATRON),
        (made("mp_rank_00/model_optim_rng.pt"), MEGATRON),
        (made(".metadata", "common.pt", "__0_0.distcp"), MEGATRON),  # Megatron's own use of torch's shards
        (
            made("latest_checkpointed_iteration.txt", "global_step_5/actor/x"),
            "It holds global_step_5: give that folder",
        ),
        (made("__0_0.distcp"), r"the weights as FSDP shards \(__0_0.distcp\) without the table of them, \.metadata"),
        (made("pytorch_model_fsdp_0_rank0.bin"), "the weights as FSDP shards"),
    ],
)
def test_a_framework_that_is_not_read_is_named(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    write(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


def test_shards_without_a_configuration_ask_for_one(sharded: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"weights and no config\.json; give the folder of the model that the run"
    ):
        load_checkpoint(sharded / "accelerate")
    with pytest.raises(CheckpointError, match=r"where no config\.json was found"):
        load_checkpoint(sharded / "accelerate", tmp_path)


def test_weights_of_a_step_without_its_optimizer(sharded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sharded / "accelerate", tmp_path / "c")
    shutil.rmtree(folder / "optimizer_0")
    with (
        pytest.warns(FuncprobeWarning),
        pytest.raises(CheckpointError, match=r"holds no optimizer\.pt, so Adam's moments"),
    ):
        load_checkpoint(folder, sharded / "base")
