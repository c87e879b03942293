"""Runs whose weights and moments are low: the step of such a checkpoint is the run's, and what is ambiguous is said."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from funcprobe.checkpoints import load_checkpoint, save_checkpoint
from funcprobe.errors import CheckpointError, FuncprobeWarning
from funcprobe.optimizers.factories import adamw
from funcprobe.optimizers.stored import is_stored, stored
from tests.cases.third_party import third_party
from tests.cases.trainer_runs import Run, gpt2, lora, qwen2, train
from tests.cases.trees import assert_same_state, random_like

LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="module")
def low_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Trainer runs whose parameters are bfloat16 and float16 themselves, and one under LoRA."""
    place = tmp_path_factory.mktemp("low")
    constant = {"lr_scheduler_type": "constant", "adam_epsilon": 1e-4}  # 1e-8 is 0 in float16
    made = {name: train(qwen2().to(dtype), place / name, **constant) for name, dtype in LOW.items()}
    with third_party():
        qwen2(tie_word_embeddings=False).save_pretrained(place / "base")
    adapted = lora(qwen2(tie_word_embeddings=False), modules_to_save=["lm_head"]).to(torch.bfloat16)
    return made | {"lora": train(adapted, place / "lora", base=place / "base", **constant)}


@pytest.mark.parametrize("which", ["bfloat16", "float16", "lora"])
def test_a_low_run_takes_its_own_step(low_runs: dict[str, Run], which: str) -> None:
    run, dtype = low_runs[which], LOW.get(which, torch.bfloat16)
    found = load_checkpoint(run.folder, run.base)
    assert {p.dtype for p in found.params.values()} == {torch.float32}
    assert found.storage == dict.fromkeys(found.params, dtype)
    gradient = random_like(found.params)
    model, optimizer = run.pair()
    for name, p in model.named_parameters():
        p.grad = gradient[name].to(dtype) if name in gradient else None
    optimizer.step()
    result = found.optimizer.apply(found.params, found.opt_state, gradient)
    live = {n: p for n, p in model.named_parameters() if n in gradient}
    assert all(torch.equal(result.params[n], p.float()) for n, p in live.items())
    assert any(not torch.equal(result.params[n], found.params[n]) for n in live)
    theirs = {n: {k: v.float() for k, v in optimizer.state[p].items()} for n, p in live.items()}
    assert_same_state(result.opt_state, theirs)


@pytest.mark.parametrize("which", ["full_qwen2", "adapter"])
def test_a_float32_run_is_stored_as_it_is_computed(runs: dict[str, Run], which: str) -> None:
    run = runs[which]
    found = load_checkpoint(run.folder, run.base, lr=1e-3)
    assert found.storage == {}
    assert not is_stored(found.optimizer)


def test_shards_are_read_for_their_dtypes(low_runs: dict[str, Run], tmp_path: Path) -> None:
    folder = shutil.copytree(low_runs["bfloat16"].folder, tmp_path / "c")
    (folder / "model.safetensors").unlink()
    with third_party():
        low_runs["bfloat16"].model.save_pretrained(folder, max_shard_size="1KB")
    assert (folder / "model.safetensors.index.json").is_file()
    found = load_checkpoint(folder)
    assert found.storage == dict.fromkeys(found.params, torch.bfloat16)


def test_the_arithmetic_may_be_the_storage(low_runs: dict[str, Run]) -> None:
    found = load_checkpoint(low_runs["bfloat16"].folder, dtype="auto")
    assert {p.dtype for p in found.params.values()} == {torch.bfloat16}
    assert found.storage == {}


def test_storage_none_stores_what_is_computed(low_runs: dict[str, Run]) -> None:
    found = load_checkpoint(low_runs["bfloat16"].folder, storage=None)
    assert found.storage == {}
    assert not is_stored(found.optimizer)


def test_a_leaf_may_be_wide_among_low_ones(low_runs: dict[str, Run], tmp_path: Path) -> None:
    folder = shutil.copytree(low_runs["bfloat16"].folder, tmp_path / "c")
    wide = "model.norm.weight"
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, wide: tensors[wide].float() + 1e-6}, folder / "model.safetensors", metadata={"format": "pt"})
    found = load_checkpoint(folder, optimizer=None)
    assert set(found.params) - set(found.storage) == {wide}


def as_saved(run: Run, place: Path, weights: torch.dtype, moments: torch.dtype, off: float = 0.0) -> Path:
    """Copy a checkpoint with its weights and its moments cast, weights off by a little."""
    folder = shutil.copytree(run.folder, place)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: (t + off).to(weights) for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    for entries in saved["state"].values():
        entries |= {k: v.to(moments) for k, v in entries.items() if k != "step"}
    torch.save(saved, folder / "optimizer.pt")
    return folder


def test_low_weights_with_wide_moments_are_a_copy_of_wide_weights(full_gpt2: Run, tmp_path: Path) -> None:
    folder = as_saved(full_gpt2, tmp_path / "c", torch.bfloat16, torch.float32)
    with pytest.warns(FuncprobeWarning, match="saved in bfloat16 and the optimizer's moments in float32.*set storage"):
        found = load_checkpoint(folder)
    assert found.storage == {}
    asked = load_checkpoint(folder, storage="bfloat16")
    assert asked.storage == dict.fromkeys(asked.params, torch.bfloat16)


def test_wide_weights_with_low_moments_are_low_where_the_weights_are(
    low_runs: dict[str, Run], full_gpt2: Run, tmp_path: Path
) -> None:
    low = as_saved(low_runs["bfloat16"], tmp_path / "low", torch.float32, torch.bfloat16)
    with pytest.warns(FuncprobeWarning, match="the weights are numbers of bfloat16 all the same"):
        found = load_checkpoint(low)
    assert found.storage == dict.fromkeys(found.params, torch.bfloat16)
    # off by far less than bfloat16 resolves, so that no leaf of ones and zeros is a number of it by accident
    wide = as_saved(full_gpt2, tmp_path / "wide", torch.float32, torch.bfloat16, off=1e-5)
    with pytest.warns(FuncprobeWarning, match="the weights are no numbers of bfloat16"):
        found = load_checkpoint(wide)
    assert found.storage == {}


def test_weights_are_rounded_to_a_storage_that_does_not_hold_them(full_gpt2: Run) -> None:
    with pytest.warns(FuncprobeWarning, match="no numbers of the storage dtype .bfloat16.*they are rounded to it"):
        found = load_checkpoint(full_gpt2.folder, storage=torch.bfloat16)
    assert all(torch.equal(p, p.bfloat16().float()) for p in found.params.values())
    assert all(torch.equal(s["exp_avg"], s["exp_avg"].bfloat16().float()) for s in found.opt_state.values())


@pytest.mark.parametrize("which", ["bfloat16", "lora"])
def test_a_stored_step_is_saved_as_its_run_saves_it(low_runs: dict[str, Run], which: str, tmp_path: Path) -> None:
    run = low_runs[which]
    found = load_checkpoint(run.folder, run.base)
    model, _ = run.pair()
    with third_party():
        folder = save_checkpoint(tmp_path / "c", model, found.params, found.optimizer, found.opt_state)
    name = "model.safetensors" if run.base is None else "adapter_model.safetensors"
    ours, theirs = (load_file(f / name) for f in (folder, run.folder))
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    again = load_checkpoint(folder, run.base)
    assert again.storage == found.storage
    assert all(torch.equal(again.params[n], p) for n, p in found.params.items())
    assert_same_state(again.opt_state, found.opt_state)


def test_an_optimizer_of_ones_own_is_stored_by_the_checkpoints_storage(low_runs: dict[str, Run]) -> None:
    found = load_checkpoint(low_runs["bfloat16"].folder, optimizer=None)
    optimizer = stored(adamw(1e-6), found.storage)
    taken = optimizer.apply(found.params, optimizer.init(found.params), random_like(found.params))
    assert all(torch.equal(taken.params[n], taken.params[n].bfloat16().float()) for n in found.params)


def test_fresh_is_stored_too(low_runs: dict[str, Run]) -> None:
    with pytest.warns(FuncprobeWarning, match="optimizer='fresh'"):
        found = load_checkpoint(low_runs["float16"].folder, optimizer="fresh", lr=1e-5)
    assert is_stored(found.optimizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": "bf"}, "storage is 'bf'; use 'auto', 'bfloat16'"),
        ({"storage": "int8"}, "storage is 'int8'; use 'auto'"),
        (
            {"dtype": "bfloat16", "storage": "float32"},
            "storage is float32, and .* is computed in bfloat16.*dtype='float32'",
        ),
        ({"dtype": "bfloat16", "storage": "float16"}, "storage is float16, and .* is computed in bfloat16"),
    ],
)
def test_a_storage_that_cannot_be_meant(full_gpt2: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(full_gpt2.folder, **options)


def test_merged_experts_have_the_dtype_of_those_in_the_file(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_moe",
        **{"vocab_size": 24, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "head_dim": 4},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 2, "num_experts_per_tok": 1},
        moe_intermediate_size=4,
    )
    with third_party():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "c")
    found = load_checkpoint(tmp_path / "c", optimizer=None)
    assert any(name not in load_file(tmp_path / "c" / "model.safetensors") for name in found.params)
    assert found.storage == dict.fromkeys(found.params, torch.bfloat16)


def test_gpt2_alike(tmp_path: Path) -> None:
    """A file whose keys lack the model's own prefix, as the hub's GPT-2 has it."""
    with third_party():
        gpt2().to(torch.bfloat16).save_pretrained(tmp_path / "c")
    file = tmp_path / "c" / "model.safetensors"
    save_file({n.removeprefix("transformer."): t for n, t in load_file(file).items()}, file, {"format": "pt"})
    found = load_checkpoint(tmp_path / "c", optimizer=None)
    assert found.storage == dict.fromkeys(found.params, torch.bfloat16)
