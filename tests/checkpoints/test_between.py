"""The update between two checkpoint folders, against the steps that a real run took between them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import funcprobe as fp
from funcprobe.errors import CheckpointError, InputError
from tests.cases.third_party import third_party
from tests.cases.trainer_runs import VOCABULARY, Run, gpt2, lora, qwen2, train
from tests.cases.trees import assert_same


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of three steps that saved every one of them."""
    return train(gpt2(), tmp_path_factory.mktemp("run"), save_steps=1, lr_scheduler_type="constant")


def folder(run: Run, step: int) -> Path:
    return run.folder.with_name(f"checkpoint-{step}")


def drawn(policy: fp.Policy, params: fp.types.Params) -> fp.Rollouts:
    prompts = [[1 + k, 2] for k in range(4)]
    return fp.sample(
        policy,
        params,
        prompts,
        group_size=2,
        max_new_tokens=5,
        temperature=1.0,
        eos_id=None,
        generator=torch.Generator().manual_seed(0),
    )


def test_it_is_what_the_run_did(run: Run) -> None:
    update = fp.between(folder(run, 1), folder(run, 2))
    before, after = (fp.load_checkpoint(folder(run, k), optimizer=None) for k in (1, 2))
    taken = update.take()
    assert update.depth == "delta"
    assert_same(update.params, before.params)
    assert_same(taken.params, after.params)
    for name, delta in taken.delta.items():
        exact = after.params[name].double() - before.params[name].double()
        assert torch.equal(delta, exact.float()), name
    found = fp.probe(update, drawn(update.policy, update.params), method="difference", rounding=True)
    assert found.lr is None
    assert found.outcome.rounding_ratio < 1e-6  # θ′ is θ + Δθ, but for the rounding of Δθ itself
    assert found.change != 0.0
    assert "lr" not in found.summary().splitlines()[0]


def test_two_ways_through_three_checkpoints_add_up(run: Run) -> None:
    whole, first, second = (fp.between(folder(run, a), folder(run, b)) for a, b in ((1, 3), (1, 2), (2, 3)))
    each = [update.take().delta for update in (whole, first, second)]
    for name in each[0]:
        off = (each[1][name].double() + each[2][name].double() - each[0][name].double()).abs().max()
        assert float(off) <= 1e-7 * float(each[0][name].abs().max() + 1e-3)  # of float32 numbers of that size


def test_adapters_over_one_base(adapter: Run, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(adapter.folder, moved)
    from safetensors.torch import load_file, save_file

    weights = load_file(moved / "adapter_model.safetensors")
    save_file({name: x + 1e-3 for name, x in weights.items()}, moved / "adapter_model.safetensors")
    update = fp.between(adapter.folder, moved, adapter.base)
    assert all(float((d - 1e-3).abs().max()) < 1e-6 for d in update.take().delta.values())


def test_what_are_no_two_checkpoints_of_one_run_is_refused(run: Run, adapter: Run, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        fp.between(folder(run, 1), tmp_path / "nowhere")
    with third_party():
        qwen2().save_pretrained(tmp_path / "qwen2")
    with pytest.raises(CheckpointError, match="different trainable leaves"):
        fp.between(folder(run, 1), tmp_path / "qwen2")
    # the same leaves in a model that reads them otherwise: no shape tells
    other = tmp_path / "other"
    shutil.copytree(folder(run, 2), other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "n_head": 1 if config["n_head"] != 1 else 2}))
    with pytest.raises(CheckpointError, match="differ in more than their trainable leaves"):
        fp.between(folder(run, 1), other)


def test_the_update_of_a_loaded_checkpoint_is_compared_with_the_step_that_it_would_take(run: Run) -> None:
    loaded = fp.load_checkpoint(folder(run, 1))
    way = fp.between(loaded, folder(run, 2))
    assert way.policy is loaded.policy
    assert way.params is loaded.params
    assert_same(way.take().delta, fp.between(folder(run, 1), folder(run, 2)).take().delta)
    evaluation = drawn(loaded.policy, loaded.params)._replace(rewards=torch.arange(8, dtype=torch.float64))
    own = loaded.update(fp.grpo(), evaluation)
    compared = fp.compare({"ours": own, "the run": way}, evaluation, method="difference")
    alone = fp.probe(way, evaluation, method="difference")
    assert compared.outcomes["the run"].delta_norm == alone.outcome.delta_norm > 0
    # another load of the same folder is another policy: its parameters could have moved since
    with pytest.raises(InputError, match=r"between\(run, folder\)"):
        fp.compare({"ours": own, "the run": fp.between(folder(run, 1), folder(run, 2))}, evaluation)
    with pytest.raises(CheckpointError, match=r"the loaded checkpoint and .* have different trainable leaves"):
        fp.between(fp.from_training(qwen2()), folder(run, 2))


def test_a_refusal_says_how_two_checkpoints_come_to_know_more(run: Run) -> None:
    way = fp.between(folder(run, 1), folder(run, 2))
    evaluation = drawn(way.policy, way.params)
    remedy = r"load_checkpoint\(folder\)\.update\(objective, U\)"
    for ask in (lambda: fp.attribute(way, evaluation), lambda: way.at(1e-3)):
        with pytest.raises(InputError, match=remedy):
            ask()
    batch = evaluation._replace(rewards=torch.arange(8, dtype=torch.float64))
    able = fp.load_checkpoint(folder(run, 1)).update(fp.grpo(), batch)  # the remedy, as it stands
    assert able.depth == "batch"
    assert able.at(1e-3).lr == 1e-3


def test_a_live_pair_gives_the_step_that_is_about_to_be_taken() -> None:
    model = gpt2().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(1))

    def backward() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    model.eval()
    for _ in range(2):
        backward()
        optimizer.step()
    backward()
    pair = fp.from_training(model, optimizer)
    update = pair.update_from_grad()
    assert update.depth == "gradient"
    found = update.take()
    optimizer.step()
    assert_same(found.params, {name: p.detach() for name, p in model.named_parameters()})


def test_a_live_pair_gives_the_step_on_a_batch() -> None:
    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    pair = fp.from_training(model, optimizer)
    batch = drawn(pair.policy, pair.params)._replace(rewards=torch.arange(8, dtype=torch.float64))
    update = pair.update(fp.grpo(), batch, max_grad_norm=1.0)
    step = fp.make_step(pair.policy, fp.grpo(), pair.optimizer, max_grad_norm=1.0)
    assert_same(update.take().delta, step(pair.params, pair.opt_state, batch).delta)
    with pytest.raises(InputError):
        pair.update_from_grad()  # nothing has a gradient yet
    with pytest.raises(CheckpointError, match="There is no optimizer to step with"):
        fp.from_training(model).update(fp.grpo(), batch)


def test_lora_has_a_live_pair_too() -> None:
    model = lora(qwen2())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(0, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(1))
    model.eval()
    model(input_ids=ids, labels=ids).loss.backward()
    update = fp.from_training(model, optimizer).update_from_grad(max_grad_norm=1.0)
    found = update.take()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    live = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert list(found.params) == list(live)
    for name, p in live.items():
        torch.testing.assert_close(found.params[name], p, rtol=1e-5, atol=1e-9)
