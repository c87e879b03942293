"""Folders that cannot be read, or do not fit: everything that is refused, with its message."""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from funcprobe.checkpoints import load_checkpoint
from funcprobe.errors import CheckpointError, FuncprobeWarning, InputError
from tests.cases.folders import Bomb, edit
from tests.cases.trainer_runs import Run, gpt2, lora, qwen2


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def no_optimizer(folder: Path) -> None:
    (folder / "optimizer.pt").unlink()


def shards(*names: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "optimizer.pt").unlink()
        for name in names:
            (folder / name).mkdir() if name.endswith("/") else (folder / name).touch()

    return write


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def deepspeed_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "global_step3").mkdir()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_config_but_inner(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "checkpoint-7").mkdir()


def bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def weights_lack_one(folder: Path) -> None:
    rewrite(folder / "model.safetensors", lambda t: t.pop("transformer.h.0.ln_1.weight"))


def weights_of_another_width(folder: Path) -> None:
    rewrite(folder / "model.safetensors", lambda t: t.update({"transformer.h.0.ln_1.weight": torch.ones(9)}))


def truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def objects_in_optimizer(folder: Path) -> None:
    (folder / "optimizer.pt").write_bytes(pickle.dumps(Bomb()))


def objects_in_a_torch_file(folder: Path) -> None:
    torch.save({"state": Path("x"), "param_groups": []}, folder / "optimizer.pt")


def empty_optimizer(folder: Path) -> None:
    (folder / "optimizer.pt").write_bytes(b"")


def other_models_optimizer(folder: Path) -> None:
    p = torch.nn.Parameter(torch.ones(2))
    other = torch.optim.AdamW([p], lr=0.1)
    p.grad = torch.ones(2)
    other.step()
    torch.save(other.state_dict(), folder / "optimizer.pt")


def one_moment_of_another_shape(folder: Path) -> None:
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    saved["state"][0] |= {"exp_avg": torch.ones(9, 9), "exp_avg_sq": torch.ones(9, 9)}
    torch.save(saved, folder / "optimizer.pt")


def words_for_an_optimizer(folder: Path) -> None:
    (folder / "optimizer.pt").write_bytes(b"something else")


def bad_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_optimizer, r"holds no optimizer.pt.*Set optimizer: fresh and lr .in Python optimizer='fresh', lr=\.\.\.."),
        (
            shards("global_step3/", "zero_to_fp32.py"),
            r"optimizer state as DeepSpeed ZeRO shards \(global_step3\).*: python zero_to_fp32\.py FOLDER OUTPUT",
        ),
        (shards("x_optim_states.pt"), "optimizer state as DeepSpeed ZeRO shards"),
        (shards("optimizer_0/"), r"optimizer state as FSDP shards \(optimizer_0\) without the table"),
        (shards("pytorch_model_fsdp_0/"), "holds no optimizer.pt"),
        (shards("__0_0.distcp"), "optimizer state as FSDP shards"),
        (deepspeed_weights, "the weights as DeepSpeed ZeRO shards"),
        (pickled_weights, "weights as pytorch_model.bin, a pickle, which is never loaded; convert it to safetensors"),
        (no_weights, "holds no model.safetensors; the weights are missing"),
        (no_config, "neither config.json .* nor adapter_config.json"),
        (no_config_but_inner, "It holds checkpoint-7: give that folder"),
        (bad_config, "the checkpoint's configuration cannot be read"),
        (weights_lack_one, r"the file lacks transformer.h.0.ln_1.weight"),
        (weights_of_another_width, r"shapes differ: .*transformer.h.0.ln_1.weight"),
        (truncated_weights, "cannot be read as safetensors"),
        (
            objects_in_optimizer,
            r"cannot be read as plain tensors and containers, and nothing else is unpickled: [\w., ()]*\.$",
        ),
        (objects_in_a_torch_file, r"and nothing else is unpickled: it holds objects of pathlib\.\w+\.$"),
        (empty_optimizer, r"and nothing else is unpickled: it is damaged, or holds other objects \(EOFError\)\.$"),
        (words_for_an_optimizer, r"and nothing else is unpickled: it is damaged, or holds other objects \(.+\)\.$"),
        (other_models_optimizer, "numbers 1 parameters and the model has 28 trainable ones"),
        (one_moment_of_another_shape, "first parameter without a place is 'transformer.wte.weight'"),
        (bad_tokenizer, "tokenizer in .* cannot be read"),
    ],
)
def test_a_folder_that_cannot_be_read(
    full_gpt2: Run, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = shutil.copytree(full_gpt2.folder, tmp_path / "c")
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_shards_beside_whole_weights_do_not_matter_without_an_optimizer(full_gpt2: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(full_gpt2.folder, tmp_path / "c")
    shards("global_step3/")(folder)
    load_checkpoint(folder, optimizer=None)


def test_weights_that_the_model_does_not_take_are_reported(full_gpt2: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(full_gpt2.folder, tmp_path / "c")
    rewrite(folder / "model.safetensors", lambda t: t.update({"v_head.weight": torch.ones(1)}))
    with pytest.warns(FuncprobeWarning, match="more than the model takes .v_head.weight"):
        load_checkpoint(folder, optimizer=None)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "nowhere")


def test_a_file_in_place_of_a_folder(full_gpt2: Run) -> None:
    with pytest.raises(CheckpointError, match=r"config.json is a file; give the checkpoint folder"):
        load_checkpoint(full_gpt2.folder / "config.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "fresh"}, "optimizer 'fresh' has no learning rate of its own; set lr"),
        ({"optimizer": "adam"}, "optimizer is 'adam'; use 'auto', 'fresh' or None"),
        ({"lr": -1.0}, "learning rate"),
        ({"lr": float("nan")}, "learning rate"),
        ({"dtype": "float31"}, "dtype is 'float31'; use 'float32'"),
        ({"dtype": "int64"}, "dtype is 'int64'; use 'float32'"),
        ({"base_model": "base"}, "holds a full model; base_model is for adapter folders"),
    ],
)
def test_an_argument_that_cannot_be_meant(full_gpt2: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_checkpoint(full_gpt2.folder, **options)


def lacks_one(folder: Path) -> None:
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    rewrite(folder / "adapter_model.safetensors", lambda t: t.pop(key))


def has_one_more(folder: Path) -> None:
    key = "base_model.model.model.layers.9.self_attn.v_proj.lora_B.weight"
    rewrite(folder / "adapter_model.safetensors", lambda t: t.update({key: torch.ones(4, 2)}))


def other_targets(folder: Path) -> None:
    edit(folder / "adapter_config.json", target_modules=["c_attn"])


def other_rank(folder: Path) -> None:
    edit(folder / "adapter_config.json", r=3)


def no_base_named(folder: Path) -> None:
    edit(folder / "adapter_config.json", base_model_name_or_path=None)


def absent_base(folder: Path) -> None:
    edit(folder / "adapter_config.json", base_model_name_or_path="somebody/absent-model")


def bad_adapter_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def pickled_adapter(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lacks_one, r"does not fit the base model: the file lacks base_model.*layers.1.self_attn.v_proj.lora_B.weight"),
        (has_one_more, r"does not fit the base model: the base has no place for base_model.*layers.9"),
        (other_targets, "does not fit the base model"),
        (other_rank, "does not fit the base model: size mismatch for base_model"),
        (no_base_named, "names no base model; give its folder as base_model"),
        (absent_base, "'somebody/absent-model' of the adapter .* was found neither as a folder"),
        (bad_adapter_config, "the adapter's configuration cannot be read"),
        (pickled_adapter, "weights as adapter_model.bin, a pickle, which is never loaded"),
    ],
)
def test_an_adapter_that_does_not_fit(
    adapter: Run, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = shutil.copytree(adapter.folder, tmp_path / "c")
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_an_adapter_on_another_base(adapter: Run) -> None:
    with pytest.raises(CheckpointError, match="does not fit the base model: size mismatch for base_model"):
        load_checkpoint(adapter.folder, qwen2(tie_word_embeddings=False, hidden_size=12))
    with pytest.raises(CheckpointError, match="does not fit the base model: No modules were targeted"):
        load_checkpoint(adapter.folder, gpt2())


def test_embeddings_saved_beside_an_adapter_are_no_misfit(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora(qwen2(tie_word_embeddings=False)).save_pretrained(tmp_path / "c", save_embedding_layers=True)
    assert any("embed_tokens" in key for key in load_file(tmp_path / "c" / "adapter_model.safetensors"))
    found = load_checkpoint(tmp_path / "c", qwen2(tie_word_embeddings=False), optimizer=None)
    assert all("lora_" in name for name in found.params)
