"""Folders that real Trainer runs wrote, read back: the live parameters, states and logits."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from funcprobe.checkpoints import Checkpoint, load_checkpoint
from funcprobe.errors import CheckpointError, FuncprobeWarning
from funcprobe.training.rule import Rule
from tests.cases.folders import Bomb, edit
from tests.cases.third_party import third_party
from tests.cases.trainer_runs import Run, qwen2
from tests.cases.trees import assert_same, assert_same_state, random_like

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


@pytest.mark.parametrize("which", ["full_qwen2", "adapter"])
def test_moments_stay_in_the_file_where_that_is_asked_for(runs: dict[str, Run], which: str) -> None:
    kept, mapped = (loaded(runs[which], offload=where) for where in (None, "cpu"))
    moments = [state[key] for state in mapped.opt_state.values() for key in ("exp_avg", "exp_avg_sq")]
    places = [
        line.split()[0].split("-")
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "optimizer.pt" in line
    ]
    assert all(any(int(a, 16) <= m.data_ptr() < int(b, 16) for a, b in places) for m in moments)
    gradient = random_like(kept.params)
    expected = Rule(kept.optimizer).apply(kept.params, kept.opt_state, gradient)
    found = Rule(mapped.optimizer).lazily(mapped.params, mapped.opt_state, gradient)
    assert_same(dict(found.after), expected.params)
    assert_same(dict(found.delta), expected.delta)


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
