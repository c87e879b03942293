"""Folders that real Trainer runs wrote, read back; and everything that is refused, with its message."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from funcprobe.checkpoints import Checkpoint, load_checkpoint
from funcprobe.errors import CheckpointError, FuncprobeWarning, InputError
from tests.checkpoints.conftest import Run, assert_same_state, gpt2, lora, qwen2, random_like, third_party

RATE = 1e-3


def loaded(run: Run, **options: Any) -> Checkpoint:
    return load_checkpoint(run.folder, run.base, lr=RATE, **options)


@pytest.mark.parametrize("which", ["full_qwen2", "full_gpt2", "adapter"])
def test_params_and_state_are_the_live_ones(runs: dict[str, Run], which: str) -> None:
    run = runs[which]
    found = loaded(run)
    live = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
    assert list(found.params) == list(live)
    assert all(torch.equal(found.params[n], p) for n, p in live.items())
    assert_same_state(found.opt_state, run.truth())
    assert found.tokenizer is None


@pytest.mark.parametrize("which", ["full_qwen2", "full_gpt2", "adapter"])
def test_one_pure_step_is_the_live_optimizers(runs: dict[str, Run], which: str) -> None:
    run = runs[which]
    found = loaded(run)
    gradient = random_like(found.params)
    model, optimizer = run.pair()
    for name, p in model.named_parameters():
        p.grad = gradient[name].clone() if name in gradient else None
    for group in optimizer.param_groups:
        group["lr"] = RATE
    optimizer.step()
    result = found.optimizer.apply(found.params, found.opt_state, gradient)
    after = {n: p for n, p in model.named_parameters() if n in gradient}
    assert all(torch.equal(result.params[n], p) for n, p in after.items())
    assert not any(torch.equal(result.params[n], found.params[n]) for n in after)
    assert_same_state(result.opt_state, {n: optimizer.state[p] for n, p in after.items()})


def test_the_default_trainer_optimizer_keeps_its_fused_flag(full_qwen2: Run, full_gpt2: Run) -> None:
    groups = loaded(full_qwen2).optimizer.groups
    assert [g.hyperparameters["fused"] for g in groups] == [True, True]
    assert [g.hyperparameters["weight_decay"] for g in groups] == [0.1, 0.0]
    assert not any(g.hyperparameters["fused"] for g in loaded(full_gpt2).optimizer.groups)


def test_tied_embeddings_are_one_name(full_qwen2: Run) -> None:
    names = list(loaded(full_qwen2).params)
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_only_the_adapter_is_trainable(adapter: Run) -> None:
    names = list(loaded(adapter).params)
    assert all("lora_" in n or "modules_to_save" in n for n in names)
    assert "base_model.model.lm_head.modules_to_save.default.weight" in names


@pytest.mark.parametrize("which", ["full_qwen2", "adapter"])
def test_logits_are_the_live_models(runs: dict[str, Run], which: str) -> None:
    run = runs[which]
    found = loaded(run)
    ids = torch.tensor([[1, 5, 2, 7]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        expected = run.pair()[0].eval()(input_ids=ids).logits[0]
        logits = found.policy.readout(found.params, found.policy.features(found.params, ids, mask)[0])
    # the same float32 operations in the same order, up to how the head's matrix product is blocked
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("named", ["../base", "base"])
def test_the_base_is_found_beside_the_adapter(
    adapter: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    shutil.copytree(adapter.base, tmp_path / "base")
    shutil.copytree(adapter.folder, tmp_path / "out")
    edit(tmp_path / "out" / "adapter_config.json", base_model_name_or_path=named)
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere" / "deep")
    found = load_checkpoint(tmp_path / "out")
    assert_same_state(found.opt_state, adapter.truth())


def test_a_relative_base_that_leads_to_two_models_is_refused(
    adapter: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("base", "work/base"):  # equal shapes: nothing else would notice the wrong one
        shutil.copytree(adapter.base, tmp_path / place)
    shutil.copytree(adapter.folder, tmp_path / "out")
    edit(tmp_path / "out" / "adapter_config.json", base_model_name_or_path="base")
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(CheckpointError, match=r"leads to several models: .*trained on as base_model"):
        load_checkpoint(tmp_path / "out")
    assert_same_state(load_checkpoint(tmp_path / "out", "base").opt_state, adapter.truth())  # as given: from here
    monkeypatch.chdir(tmp_path)  # the same folder by two ways is one model
    load_checkpoint(tmp_path / "out")


def test_a_module_as_base_is_left_as_it_is(adapter: Run) -> None:
    base = qwen2(tie_word_embeddings=False).train()
    before = {n: (p.clone(), p.requires_grad, p.data_ptr()) for n, p in base.named_parameters()}
    modules = [name for name, _ in base.named_modules()]
    found = load_checkpoint(adapter.folder, base)
    assert_same_state(found.opt_state, adapter.truth())
    assert [name for name, _ in base.named_modules()] == modules
    assert base.training
    assert base.config.use_cache
    for n, p in base.named_parameters():
        assert torch.equal(p, before[n][0]), n
        assert (p.requires_grad, p.data_ptr()) == before[n][1:], n


def test_loading_draws_nothing_from_the_global_generator(adapter: Run) -> None:
    before = torch.random.get_rng_state()
    loaded(adapter)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_weights_and_moments_share_the_dtype_asked_for(full_gpt2: Run, adapter: Run) -> None:
    for run in (full_gpt2, adapter):
        found = loaded(run, dtype="float64")
        assert {p.dtype for p in found.params.values()} == {torch.float64}
        assert {v.dtype for s in found.opt_state.values() for k, v in s.items() if k != "step"} == {torch.float64}
        result = found.optimizer.apply(found.params, found.opt_state, random_like(found.params))
        assert all(torch.isfinite(p).all() for p in result.params.values())


def test_optimizer_none_reads_none(full_gpt2: Run) -> None:
    found = load_checkpoint(full_gpt2.folder, optimizer=None)
    assert found.optimizer is None
    assert found.opt_state is None


def test_fresh_is_adamw_with_an_empty_state_and_a_warning(full_gpt2: Run) -> None:
    with pytest.warns(FuncprobeWarning, match="sign-like.*represents nothing of the run"):
        found = load_checkpoint(full_gpt2.folder, optimizer="fresh", lr=0.5)
    update = found.optimizer.apply(found.params, found.opt_state, random_like(found.params)).delta
    for name, gradient in random_like(found.params).items():
        # |Δθ| = lr |g| / (|g| + eps'), eps' = 1e-8: entries of a normal draw below 1e-5 would be off by 1e-3
        assert torch.allclose(update[name], -0.5 * gradient.sign(), rtol=1e-3), name


def test_saved_lr_zero_asks_for_one(full_qwen2: Run) -> None:
    with pytest.raises(CheckpointError, match=r"learning rate saved in optimizer\.pt is 0"):
        load_checkpoint(full_qwen2.folder)


def test_a_shared_tokenizer_is_read(full_gpt2: Run, tokenizer: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(full_gpt2.folder, tmp_path / "c")
    tokenizer.save_pretrained(folder)
    assert load_checkpoint(folder, optimizer=None).tokenizer("w3 w1")["input_ids"] == [3, 1]


def test_the_bases_tokenizer_serves_an_adapter_without_one(adapter: Run, tokenizer: Any, tmp_path: Path) -> None:
    base = shutil.copytree(adapter.base, tmp_path / "base")
    tokenizer.save_pretrained(base)
    assert load_checkpoint(adapter.folder, base, optimizer=None).tokenizer("w2")["input_ids"] == [2]


def test_shards_with_an_index_are_read(full_gpt2: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(full_gpt2.folder, tmp_path / "c")
    (folder / "model.safetensors").unlink()
    with third_party():
        full_gpt2.pair()[0].save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    found = load_checkpoint(folder)
    assert all(torch.equal(found.params[n], p) for n, p in full_gpt2.model.named_parameters())


def test_training_args_are_never_opened(full_gpt2: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(full_gpt2.folder, tmp_path / "c")
    for name in ("training_args.bin", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    load_checkpoint(folder)


# Bad input: every case starts from a folder that loads, and breaks one thing.


class Bomb:
    """Says so when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return pytest.fail, ("a pickle was loaded",)


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


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
            r"optimizer state as DeepSpeed shards \(global_step3\).*Supported",
        ),
        (shards("x_optim_states.pt"), "optimizer state as DeepSpeed shards"),
        (shards("optimizer_0/"), r"optimizer state as FSDP shards \(optimizer_0\).*Supported"),
        (shards("pytorch_model_fsdp_0/"), "optimizer state as FSDP shards"),
        (shards("__0_0.distcp"), "optimizer state as FSDP shards"),
        (deepspeed_weights, "the weights as DeepSpeed shards"),
        (pickled_weights, "weights as pytorch_model.bin, a pickle, which is never loaded; convert it to safetensors"),
        (no_weights, "holds no model.safetensors; the weights are missing"),
        (no_config, "neither config.json .* nor adapter_config.json"),
        (no_config_but_inner, "It holds checkpoint-7: give that folder"),
        (bad_config, "transformers cannot read the model"),
        (weights_lack_one, r"the file lacks transformer.h.0.ln_1.weight"),
        (weights_of_another_width, r"shapes differ: .*transformer.h.0.ln_1.weight"),
        (truncated_weights, "transformers cannot read the model"),
        (
            objects_in_optimizer,
            r"cannot be read as plain tensors and containers, and nothing else is unpickled: [\w., ]*\.$",
        ),
        (objects_in_a_torch_file, r"and nothing else is unpickled: it holds objects of pathlib\.\w+\.$"),
        (empty_optimizer, r"and nothing else is unpickled: it is damaged, or holds other objects\.$"),
        (words_for_an_optimizer, r"and nothing else is unpickled: it is damaged, or holds other objects\.$"),
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
        (bad_adapter_config, "adapter_config.json cannot be read"),
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


def test_a_leaf_that_never_stepped_starts_from_zero_with_a_warning(full_gpt2: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(full_gpt2.folder, tmp_path / "c")
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    del saved["state"][1]
    torch.save(saved, folder / "optimizer.pt")
    with pytest.warns(FuncprobeWarning, match=r"no state for 'transformer\.wpe\.weight'.*never received a gradient"):
        found = load_checkpoint(folder)
    assert found.opt_state["transformer.wpe.weight"] == {}
    assert_same_state(
        {n: s for n, s in found.opt_state.items() if s},
        {n: s for n, s in full_gpt2.truth().items() if "wpe" not in n},
    )
