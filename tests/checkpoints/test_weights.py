"""Weights as wrappers, diverged runs and other tools leave them: read, or refused with the leaf's name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from funcprobe.checkpoints import load_checkpoint
from funcprobe.checkpoints.weights import plain_name
from funcprobe.errors import CheckpointError, FuncprobeWarning
from tests.cases.third_party import third_party
from tests.cases.trainer_runs import Run, gpt2, lora, qwen2
from tests.cases.trees import assert_same_state

IDS = torch.tensor([[1, 5, 2, 7]])


class Parallel(nn.Module):
    """What DDP's state_dict looks like, without a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)  # type: ignore[return-value]


def layers_checkpointed(model: Any) -> nn.Module:
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    return model


def layers_compiled(model: Any) -> nn.Module:
    model.model.layers[0] = torch.compile(model.model.layers[0])
    return model


def merged_by_peft(model: nn.Module) -> nn.Module:
    return lora(model)


WRAPPED: dict[str, tuple[Callable[[nn.Module], nn.Module], bool]] = {
    "torch.compile": (compiled, False),
    "data parallel": (Parallel, False),
    "data parallel of compiled": (lambda m: Parallel(compiled(m)), False),
    "activation checkpointing": (layers_checkpointed, False),
    "regional compile": (layers_compiled, False),
    "compiled, checkpointed": (lambda m: compiled(layers_checkpointed(m)), False),
    "peft's names, without an adapter": (merged_by_peft, True),
}


def save(folder: Path, wrapped: nn.Module, *, drop_adapter: bool = False) -> None:
    """Write a wrapped module's own parameters, as a loop that forgot to unwrap it does."""
    named = wrapped.named_parameters()  # the state_dict of a checkpoint wrapper would hide its own name
    tensors = {n: p.detach().clone() for n, p in named if not (drop_adapter and "lora_" in n)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("how", list(WRAPPED))
@pytest.mark.parametrize("tied", [True, False])
def test_the_names_of_wrappers_are_left_out(how: str, tied: bool, tmp_path: Path) -> None:
    wrap, drop = WRAPPED[how]
    plain = qwen2(tie_word_embeddings=tied)
    with third_party():
        plain.save_pretrained(tmp_path)
        save(tmp_path, wrap(qwen2(tie_word_embeddings=tied)), drop_adapter=drop)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.warns(FuncprobeWarning, match=r"saved inside a wrapper \('.*'\); its name is left out"):
        found = load_checkpoint(tmp_path, optimizer=None)
    assert list(found.params) == [n for n, _ in plain.named_parameters()]
    assert all(torch.equal(found.params[n], p) for n, p in plain.named_parameters())
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_plain_names_are_what_they_are() -> None:
    for model in (qwen2(), gpt2()):
        assert all(plain_name(n) == n for n in model.state_dict())
    assert plain_name("encoder.module.weight") == "encoder.module.weight"


def test_an_adapter_that_was_not_merged_is_not_left_out(tmp_path: Path) -> None:
    with third_party():
        qwen2().save_pretrained(tmp_path)
    save(tmp_path, lora(qwen2()))
    with (
        pytest.warns(FuncprobeWarning, match="saved inside a wrapper"),
        pytest.raises(CheckpointError, match=r"hold '.*lora_A.*', which a peft adapter adds"),
    ):
        load_checkpoint(tmp_path, optimizer=None)


def test_one_weight_under_two_names_is_refused(full_gpt2: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(full_gpt2.folder, tmp_path / "c")
    tensors = load_file(folder / "model.safetensors")
    both = tensors | {"module.transformer.wpe.weight": tensors["transformer.wpe.weight"] + 1}
    save_file(both, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"hold 'transformer\.wpe\.weight' twice"):
        load_checkpoint(folder)


def test_a_head_that_the_configuration_ties_is_not_dropped_in_silence(tmp_path: Path) -> None:
    model = qwen2(tie_word_embeddings=True)
    with third_party():
        model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] + torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(FuncprobeWarning, match="ties the head to the embedding, .* hold a head that differs"):
        found = load_checkpoint(tmp_path, optimizer=None)
    assert torch.equal(found.params["lm_head.weight"], head)
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    assert "lm_head.weight" not in load_checkpoint(tmp_path, optimizer=None).params  # equal, and no word about it


def test_a_missing_head_is_refused(tmp_path: Path) -> None:
    with third_party():
        qwen2(tie_word_embeddings=False).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the file lacks lm_head\.weight"):
        load_checkpoint(tmp_path, optimizer=None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("leaf", ["transformer.h.1.mlp.c_fc.weight", "transformer.ln_f.bias", "transformer.wte.weight"])
def test_a_weight_that_is_not_finite_is_named(full_gpt2: Run, tmp_path: Path, leaf: str, value: float) -> None:
    folder = shutil.copytree(full_gpt2.folder, tmp_path / "c")
    tensors = load_file(folder / "model.safetensors")
    tensors[leaf].view(-1)[1] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"not finite: '{leaf}' holds 1 of {tensors[leaf].numel()} entries"):
        load_checkpoint(folder)


def test_a_dtype_that_overflows_is_named(full_gpt2: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(full_gpt2.folder, tmp_path / "c")
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.0.ln_1.weight"][:] = 1e5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    load_checkpoint(folder)
    with pytest.raises(CheckpointError, match="the dtype is too narrow"):
        load_checkpoint(folder, dtype="float16")


def test_an_adapter_that_diverged_is_named(adapter: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter.folder, tmp_path / "c")
    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(n for n in tensors if "lora_B" in n)
    tensors[key][0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    live = key.replace("lora_B.", r"lora_B.default.")
    with pytest.raises(CheckpointError, match=f"not finite: '{live}'"):
        load_checkpoint(folder, adapter.base)


def test_accelerates_optimizer_file_is_the_trainers(full_gpt2: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(full_gpt2.folder, tmp_path / "c")
    (folder / "optimizer.pt").rename(folder / "optimizer.bin")
    assert_same_state(load_checkpoint(folder).opt_state, full_gpt2.truth())


def test_an_optimizer_bin_of_another_layout_is_refused(full_gpt2: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(full_gpt2.folder, tmp_path / "c")
    (folder / "optimizer.pt").unlink()
    torch.save({"optimizer": {"shard": torch.ones(2)}}, folder / "optimizer.bin")
    with pytest.raises(CheckpointError, match=r"optimizer\.bin holds \['optimizer'\]; expected a torch"):
        load_checkpoint(folder)


def test_the_dtype_key_of_older_transformers_is_read(full_gpt2: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(full_gpt2.folder, tmp_path / "c")
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    assert {p.dtype for p in load_checkpoint(folder).params.values()} == {torch.float32}


def test_an_index_that_names_an_absent_shard_is_refused(full_gpt2: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(full_gpt2.folder, tmp_path / "c")
    (folder / "model.safetensors").unlink()
    with third_party():
        full_gpt2.model.save_pretrained(folder, max_shard_size="2KB")
    sorted(folder.glob("model-*.safetensors"))[0].unlink()
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)
