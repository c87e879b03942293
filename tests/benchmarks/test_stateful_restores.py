"""The stateful baseline leaves module and optimizer bit for bit as it found them, and does no pass too many."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import benchmarks.stateful
from benchmarks.stateful import StatefulProbe
from benchmarks.stateful.updates import dot
from funcprobe.errors import InputError
from tests.cases import models
from tests.cases.live_pairs import adamw, batches, lora, sgd, trained


class Restless(torch.optim.SGD):
    """Changes its own groups and state as it steps, as schedule-free and lazily initialised optimizers do."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            group["lr"] *= 0.5
            group["calls"] = group.get("calls", 0) + 1
            for p in group["params"]:
                self.state[p].setdefault("seen", []).append(float(p.detach().sum()))
                self.state[p]["scratch"] = torch.ones_like(p)


class Failing(torch.optim.SGD):
    """Steps, and then something goes wrong."""

    def step(self, closure: Any = None) -> None:
        super().step()
        raise RuntimeError("out of memory")


class Drawing(models.TwoLines):
    """Draws random numbers in eval mode too."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 0 * torch.rand(())


def two_lines() -> nn.Module:
    return models.two_lines()


def drawing() -> nn.Module:
    with models.seeded(8):
        return Drawing().double()


def restless(module: nn.Module) -> torch.optim.Optimizer:
    return Restless([p for p in module.parameters() if p.requires_grad], lr=1e-2, momentum=0.9)


def tensor_lr(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=torch.tensor(1e-2))


def live_pair(
    make: Callable[[], nn.Module], optimizer: Callable[[nn.Module], torch.optim.Optimizer], steps: int
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a pair in the middle of training: mixed modes, gradients on some leaves."""
    module = make()
    pair = module, optimizer(module)
    trained(*pair, steps=steps)
    module.train()
    next(iter(module.children())).eval()
    for p in list(module.parameters())[::2]:
        p.grad = torch.full_like(p, 0.25)
    return pair


def photograph(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a deep copy of everything that a probe could change, with the identity of every tensor."""
    flags = {name: (p.requires_grad, p.grad) for name, p in module.named_parameters()}
    return {
        "parameters": {name: seen(p) for name, p in module.named_parameters()},
        "gradients": {name: (flag, seen(gradient)) for name, (flag, gradient) in flags.items()},
        "modes": {name: part.training for name, part in module.named_modules()},
        "hooks": {name: len(part._forward_pre_hooks) for name, part in module.named_modules()},
        "state": [
            (id(p), {key: seen(value) for key, value in entries.items()}) for p, entries in optimizer.state.items()
        ],
        "groups": [{key: seen(value) for key, value in group.items()} for group in optimizer.param_groups],
        "generator": torch.get_rng_state().tolist(),
    }


def seen(value: Any) -> Any:
    """Return identity and bits of tensors, alone or in a list, and anything else as it is."""
    if isinstance(value, (list, tuple)):
        return [seen(v) for v in value]
    if isinstance(value, Tensor):
        return id(value), value.data_ptr(), value.detach().clone().numpy().tobytes()
    return value


PAIRS = {
    "adamw": (two_lines, adamw, 3),
    "sgd": (two_lines, sgd, 3),
    "state made by the step": (two_lines, adamw, 0),
    "momentum made by the step": (two_lines, sgd, 0),
    "lora with dropout": (lora, adamw, 2),
    "restless": (two_lines, restless, 2),
    "restless, from its first step": (two_lines, restless, 0),
    "learning rate in a tensor": (two_lines, tensor_lr, 2),
    "drawing": (drawing, sgd, 1),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("lr", [None, 3e-2])
def test_everything_is_restored(pair: str, lr: float | None) -> None:
    module, optimizer = live_pair(*PAIRS[pair])
    probe, before = StatefulProbe(module, optimizer, microbatch=4, max_grad_norm=1.0), photograph(module, optimizer)
    first = probe.run(*batches(), lr=lr)
    assert first.param_update_l2 > 0
    assert photograph(module, optimizer) == before
    again = probe.run(*batches(), lr=lr)
    assert (again.H_upd, again.deltaH1, again.param_update_l2) == (first.H_upd, first.deltaH1, first.param_update_l2)
    assert photograph(module, optimizer) == before


def test_a_failure_half_way_leaves_nothing_behind() -> None:
    module, optimizer = live_pair(two_lines, lambda m: Failing(m.parameters(), lr=1e-2, momentum=0.9), 0)
    before = photograph(module, optimizer)
    with pytest.raises(RuntimeError, match="out of memory"):
        StatefulProbe(module, optimizer, microbatch=4).run(*batches(), lr=0.5)
    assert photograph(module, optimizer) == before


def test_a_state_that_some_leaves_have_stays_with_those() -> None:
    module = models.two_lines()
    optimizer = adamw(module)
    trained(module, optimizer)
    del optimizer.state[module.embed.weight]
    before = photograph(module, optimizer)
    StatefulProbe(module, optimizer).run(*batches())
    assert photograph(module, optimizer) == before


def test_frozen_leaves_are_neither_kept_nor_reported() -> None:
    module = lora()
    found = StatefulProbe(module, adamw(module)).run(*batches())
    assert list(found.param_update) == [name for name, p in module.named_parameters() if p.requires_grad]
    assert len(found.param_update) < len(list(module.parameters()))


def test_the_caller_keeps_the_gradient_tensors_out_of_the_sum() -> None:
    """A gradient left over from training must not enter the step, nor the step's gradient δH₁."""
    module = models.two_lines()
    optimizer = sgd(module)
    clean = StatefulProbe(module, optimizer, microbatch=4).run(*batches())
    for p in module.parameters():
        p.grad = torch.full_like(p, 10.0)
    found = StatefulProbe(module, optimizer, microbatch=4).run(*batches())
    assert (found.deltaH_true, found.deltaH1) == (clean.deltaH_true, clean.deltaH1)


@pytest.mark.parametrize("microbatch", [3, None])
def test_passes_are_as_few_as_the_design_allows(microbatch: int | None) -> None:
    """One pass with a graph over U and over E, and without a graph E at θ and E at θ′: the scores at θ are shared."""
    module = models.two_lines()
    calls: list[tuple[bool, bool, int]] = []
    module.register_forward_hook(lambda m, args, out: calls.append((out.requires_grad, m.training, len(args[0]))))
    evaluation, update = batches()
    StatefulProbe(module, sgd(module), microbatch=microbatch).run(evaluation, update)
    with_graph, without = (sum(rows for graph, _, rows in calls if graph is wanted) for wanted in (True, False))
    assert (with_graph, without) == (len(update.ids) + len(evaluation.ids), 2 * len(evaluation.ids))
    assert not any(training for _, training, _ in calls)


def test_logits_are_made_for_completion_tokens_alone() -> None:
    module = models.gpt2()
    rows: list[torch.Size] = []
    module.lm_head.register_forward_hook(lambda m, args, out: rows.append(out.shape))
    evaluation, update = batches()
    StatefulProbe(module, sgd(module), microbatch=3).run(evaluation, update)
    tokens = 3 * int(evaluation.completion_mask.sum()) + int(update.completion_mask.sum())
    assert sum(shape[0] for shape in rows) == tokens
    assert {len(shape) for shape in rows} == {2}


def test_the_buffer_is_wide_enough() -> None:
    """bfloat16 leaves have a float32 buffer, whose entries are the exact differences of two bfloat16 numbers."""
    module = models.two_lines(torch.bfloat16)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    found = StatefulProbe(module, optimizer).run(*batches())
    before = {name: p.detach().double() for name, p in module.named_parameters()}
    for name, d in found.param_update.items():
        assert d.dtype == torch.float32
        after = (before[name] + d.double()).to(torch.bfloat16).double()
        assert torch.equal(after - before[name], d.double()), name


def test_timing_covers_every_phase() -> None:
    module = models.two_lines()
    timing = StatefulProbe(module, sgd(module)).run(*batches()).timing
    phases = {"snapshot", "H_orig", "step", "H_upd", "restore", "deltaH1"}
    assert set(timing) == phases | {"total"}
    assert 0 < sum(timing[phase] for phase in phases) <= timing["total"]


def test_nothing_but_the_container_is_shared_with_the_package() -> None:
    allowed = {"funcprobe.types", "funcprobe.errors", "funcprobe.data.rollouts"}
    for file in Path(benchmarks.stateful.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("funcprobe") for alias in node.names), file
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.startswith("funcprobe"):
                assert node.module in allowed, file


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "ppo"}, "objective is 'ppo'; expected one of dr_grpo, grpo, reinforce"),
        ({"weighting": "token"}, "weighting is 'token'"),
        ({"per": "prompt"}, "per is 'prompt'"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, str], message: str) -> None:
    module = models.two_lines()
    with pytest.raises(InputError, match=message):
        StatefulProbe(module, sgd(module), **options)


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"misses the trainable parameter 'embed.weight'"):
        StatefulProbe(models.two_lines(), sgd(models.two_lines()))


def test_a_learning_rate_of_zero_is_no_silent_zero() -> None:
    module = models.two_lines()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    with pytest.raises(InputError, match="learning rate is 0 in every group"):
        StatefulProbe(module, optimizer).run(*batches())
    assert StatefulProbe(module, optimizer).run(*batches(), lr=1e-3).param_update_l2 > 0
    for wrong in (-1e-3, float("nan")):
        with pytest.raises(InputError, match="must be finite and not negative"):
            StatefulProbe(module, optimizer).run(*batches(), lr=wrong)


def test_a_batch_without_a_signal_is_refused() -> None:
    module = models.two_lines()
    evaluation, update = batches()
    probe = StatefulProbe(module, sgd(module), objective="grpo")
    with pytest.raises(InputError, match="neither rewards nor advantages"):
        probe.run(evaluation, update._replace(rewards=None))
    with pytest.raises(InputError, match="has one rollout and no standard deviation"):
        probe.run(evaluation, update._replace(group_ids=torch.arange(len(update.ids))))
    with pytest.raises(InputError, match="nothing to step on"):
        probe.run(evaluation, update._replace(weight=torch.zeros_like(update.weight)))


def test_a_buffer_that_matches_in_part_is_refused() -> None:
    module = models.two_lines()
    with pytest.raises(InputError, match=r"differ in \['embed.weight', 'module.embed.weight'\]"):
        dot(module, {f"module.{n}" if "embed" in n else n: p for n, p in module.named_parameters()})
