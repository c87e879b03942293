"""A live pair is read by identity and left bit for bit as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from funcprobe import engine
from funcprobe.checkpoints import from_training, load_checkpoint
from funcprobe.data.rollouts import rollouts_from_lists
from funcprobe.errors import CheckpointError
from tests.cases.snapshots import fingerprint
from tests.cases.third_party import third_party
from tests.cases.trainer_runs import Run, gpt2, lora, qwen2
from tests.cases.trees import assert_same, assert_same_state, random_like

IDS = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with third_party():
        model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()


def expected_step(model: nn.Module, optimizer: torch.optim.Optimizer, gradient: dict[str, torch.Tensor]) -> dict:
    """Step a copy of the pair, as torch does it."""
    model, optimizer = copy.deepcopy((model, optimizer))
    for name, p in model.named_parameters():
        p.grad = gradient[name].clone() if name in gradient else None
    optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters() if n in gradient}


@pytest.mark.parametrize("which", ["full_qwen2", "full_gpt2", "adapter"])
def test_the_live_pair_is_what_its_folder_says(runs: dict[str, Run], which: str) -> None:
    run = runs[which]
    live, saved = from_training(run.model, run.wrapped), load_checkpoint(run.folder, run.base, lr=1e-3)
    assert list(live.params) == list(saved.params)
    assert all(torch.equal(live.params[n], saved.params[n]) for n in saved.params)
    assert_same_state(live.opt_state, saved.opt_state)
    gradient = random_like(live.params)
    one = live.optimizer.apply(live.params, live.opt_state, gradient, lr=1e-3)
    two = saved.optimizer.apply(saved.params, saved.opt_state, gradient)
    assert all(torch.equal(one.params[n], two.params[n]) for n in saved.params)


OPTIMIZERS: list[Any] = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
    (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
    (torch.optim.NAdam, {"lr": 0.01}),
    (torch.optim.Adagrad, {"lr": 0.01}),
]


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 2])
def test_the_pure_step_is_the_one_that_would_follow(
    cls: type[torch.optim.Optimizer], options: dict[str, Any], steps: int
) -> None:
    model = gpt2().eval()  # no dropout: the steps before are only there to fill the state
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = cls([{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}], **options)
    for _ in range(steps):
        step(model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.003  # hyperparameters are the groups', never the defaults
    found = from_training(model, optimizer)
    gradient = random_like(found.params)
    result = found.optimizer.apply(found.params, found.opt_state, gradient)
    for name, value in expected_step(model, optimizer, gradient).items():
        assert torch.equal(result.params[name], value), name


def test_a_learning_rate_kept_in_a_tensor_is_read_as_a_number() -> None:
    model = gpt2().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01))
    step(model, optimizer)
    found = from_training(model, optimizer)
    assert found.optimizer.lr == float(torch.tensor(0.01))
    gradient = random_like(found.params)
    update = found.optimizer.apply(found.params, found.opt_state, gradient).params
    for name, value in expected_step(model, optimizer, gradient).items():
        # torch then multiplies a float32 rate into float32 corrections: a few roundings on |Δθ| <= .02 and |θ| <= 1.1
        assert torch.allclose(update[name], value, rtol=0, atol=4 * torch.finfo(torch.float32).eps), name


@pytest.mark.parametrize("make", [gpt2, qwen2, lambda: lora(qwen2(), lora_dropout=0.1)], ids=["gpt2", "qwen2", "lora"])
@pytest.mark.parametrize("steps", [0, 1])
def test_nothing_is_touched(make: Any, steps: int) -> None:
    model = make().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        step(model, optimizer)  # leaves .grad filled
    before = fingerprint(model, optimizer)
    found = from_training(model, optimizer)
    found.optimizer.apply(found.params, found.opt_state, random_like(found.params))
    assert_same(fingerprint(model, optimizer), before)
    assert bool(optimizer.state) == bool(steps), "looking a state up must not create it"


def test_the_pair_is_shared_not_copied() -> None:
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step(model, optimizer)
    found = from_training(model, optimizer)
    for name, p in model.named_parameters():
        assert found.params[name].data_ptr() == p.data_ptr()
        assert found.opt_state[name]["exp_avg"].data_ptr() == optimizer.state[p]["exp_avg"].data_ptr()
        assert not found.params[name].requires_grad


class Plain(nn.Module):
    """A model that runs on the meta device too, where values cannot be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


@pytest.mark.parametrize("fused", [False, True])
def test_with_another_device_everything_is_a_copy_there(fused: bool) -> None:
    model = Plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    model(IDS).sum().backward()
    optimizer.step()
    found = from_training(model, optimizer, device="meta")
    assert found.policy.device.type == "meta"
    assert all(p.device.type == "meta" for p in found.params.values())
    for entries in found.opt_state.values():
        assert {key: x.device.type for key, x in entries.items()} == {
            "step": "meta" if fused else "cpu",  # as torch's kernels want it
            "exp_avg": "meta",
            "exp_avg_sq": "meta",
        }
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert all(x.device.type == "cpu" for entries in optimizer.state.values() for x in entries.values())


def test_with_the_device_it_is_on_the_pair_is_shared() -> None:
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step(model, optimizer)
    found = from_training(model, optimizer, device="cpu")
    for name, p in model.named_parameters():
        assert found.params[name].data_ptr() == p.data_ptr()
        assert found.opt_state[name]["exp_avg"].data_ptr() == optimizer.state[p]["exp_avg"].data_ptr()


def checkpointing(model: nn.Module) -> nn.Module:
    with third_party():
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model.train()


@pytest.mark.parametrize("make", [gpt2, qwen2, lambda: lora(qwen2())], ids=["gpt2", "qwen2", "lora"])
def test_a_model_that_trains_with_gradient_checkpointing_is_differentiated(make: Any) -> None:
    plain, model = make(), checkpointing(make())
    u = rollouts_from_lists([[1, 2], [3]], [[3, 4], [2, 1, 5]], temperature=1.0)

    def gradient(module: nn.Module) -> dict[str, torch.Tensor]:
        found = from_training(module)
        return engine.gradient(lambda scores, u: (scores.logp.sum(), {}), found.policy, found.params, u).gradient

    hooks = [(name, list(m._forward_hooks.values())) for name, m in model.named_modules()]
    assert any(held for _, held in hooks), "enable_input_require_grads hangs its hook on the embeddings"
    found, expected = gradient(model), gradient(plain.eval())
    assert any(bool(g.any()) for g in expected.values())
    assert_same(found, expected)
    assert [(name, list(m._forward_hooks.values())) for name, m in model.named_modules()] == hooks
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_without_an_optimizer() -> None:
    found = from_training(gpt2())
    assert found.optimizer is None
    assert found.opt_state is None
    assert found.tokenizer is None


def test_ddp_and_accelerate_are_looked_through(tmp_path: Any) -> None:
    from accelerate.optimizer import AcceleratedOptimizer

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        model = gpt2()
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
        step(model, optimizer)
        found = from_training(wrapped, AcceleratedOptimizer(optimizer))
    finally:
        torch.distributed.destroy_process_group()
    assert list(found.params) == [name for name, _ in model.named_parameters()]
    assert_same_state(found.opt_state, {n: optimizer.state[p] for n, p in model.named_parameters()})


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's import
def test_a_compiled_wrapper_is_looked_through() -> None:
    model = gpt2()
    assert list(from_training(torch.compile(model)).params) == [name for name, _ in model.named_parameters()]


def test_leaves_frozen_after_the_optimizer_was_built_are_left_out() -> None:
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.transformer.wte.weight.requires_grad_(False)
    found = from_training(model, optimizer)
    assert "transformer.wte.weight" not in found.params
    assert list(found.opt_state) == list(found.params)
    gradient = random_like(found.params)
    result = found.optimizer.apply(found.params, found.opt_state, gradient)
    for name, value in expected_step(model, optimizer, gradient).items():
        assert torch.equal(result.params[name], value), name


def test_an_optimizer_that_misses_leaves() -> None:
    model = gpt2()
    optimizer = torch.optim.AdamW(list(model.parameters())[1:], lr=0.01)
    with pytest.raises(CheckpointError, match=r"misses 1 trainable parameters of the model: 'transformer.wte.weight'"):
        from_training(model, optimizer)


def test_an_optimizer_of_another_model() -> None:
    model = gpt2()
    stray = nn.Parameter(torch.ones(3, 5))
    optimizer = torch.optim.AdamW([*model.parameters(), stray], lr=0.01)
    with pytest.raises(CheckpointError, match=r"holds 1 tensors that are not parameters of the model .shapes \(3, 5\)"):
        from_training(model, optimizer)


def test_quantised_state_is_refused_by_name() -> None:
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for p in model.parameters():
        optimizer.state[p] = {"step": 1, "state1": torch.zeros_like(p), "qmap1": torch.zeros(256)}
    with pytest.raises(CheckpointError, match="AdamW is an 8-bit bitsandbytes optimizer"):
        from_training(model, optimizer)


@pytest.mark.parametrize("package", ["bitsandbytes", "apex", "deepspeed", "torchao"])
def test_foreign_packages_are_refused_before_their_first_step(package: str) -> None:
    cls = type("PagedAdamW", (torch.optim.AdamW,), {"__module__": f"{package}.optim"})
    model = gpt2()
    with pytest.raises(CheckpointError, match=f"PagedAdamW is one of {package}"):
        from_training(model, cls(model.parameters(), lr=0.01))


def test_something_that_is_no_optimizer() -> None:
    with pytest.raises(CheckpointError, match=r"The optimizer is a dict; expected a torch\.optim\.Optimizer"):
        from_training(gpt2(), {})  # type: ignore[arg-type]


def test_an_fsdp_model_is_refused() -> None:
    model = gpt2()
    sharded = type("FullyShardedDataParallel", (nn.Module,), {})()
    sharded.module = model
    with pytest.raises(CheckpointError, match="sharded by FSDP"):
        from_training(sharded)
