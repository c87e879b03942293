from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from funcprobe import engine, tree
from funcprobe.data.rollouts import rollouts_from_lists
from funcprobe.errors import FuncprobeWarning, InputError, NumericsError
from funcprobe.objectives.by_name import objective
from funcprobe.objectives.losses import BASES, grpo
from funcprobe.optimizers.factories import adamw, from_torch, sgd
from funcprobe.policy.module import from_module
from funcprobe.training.step import Step, make_step
from funcprobe.types import Params, Rollouts, StepResult
from tests.cases.trees import assert_same, clone
from tests.oracles import losses

V, TEMPERATURE = 7, 0.7


class Tiny(nn.Module):
    """A causal model: every position sees the running mean of the embeddings up to it."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.embed, self.mix, self.head = nn.Embedding(V, 5), nn.Linear(5, 5), nn.Linear(5, V)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        count = torch.arange(1, ids.shape[1] + 1, dtype=x.dtype)[None, :, None]
        return self.head(torch.tanh(self.mix(x.cumsum(1) / count)))


PROMPTS = [[1, 2], [1, 2], [3], [3], [3, 3, 4], [3, 3, 4]]
COMPLETIONS = [[4, 5, 6], [2], [1, 1], [6, 5, 4, 3], [0, 2], [5]]
MASKS = [[1, 0, 1], [1], [1, 1], [1, 1, 0, 1], [0, 1], [1]]
REWARDS = [1.0, 0.0, 0.3, 2.0, -1.0, 0.5]


def rollouts(**fields: Any) -> Rollouts:
    fields = {"rewards": REWARDS, "temperature": TEMPERATURE, "completion_masks": MASKS, **fields}
    return rollouts_from_lists(PROMPTS, COMPLETIONS, **fields)


def built(name: str = "grpo", dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Step, Params]:
    policy, params = from_module(Tiny(dtype))
    made = {"max_grad_norm": None, "microbatch": None, "optimizer": adamw(0.01, weight_decay=0.1), **options}
    return make_step(policy, objective(name), made.pop("optimizer"), **made), clone(params)


def logps(module: nn.Module) -> Tensor:
    """The log-probability of every completion token, one sequence at a time and without padding."""
    width = max(len(c) for c in COMPLETIONS)
    rows = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        logits = module(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1]
        log_probs = torch.log_softmax(logits / TEMPERATURE, -1)
        row = log_probs[torch.arange(len(completion)), torch.tensor(completion)]
        rows.append(torch.cat([row, row.new_zeros(width - len(completion))]))
    return torch.stack(rows)


def plain_training(name: str, optimizer: type[torch.optim.Optimizer], bound: float | None, steps: int) -> nn.Module:
    """The loop that everybody writes: loss.backward(), clip_grad_norm_, optimizer.step()."""
    module, groups = Tiny(), [0, 0, 1, 1, 2, 2]
    instance = optimizer(module.parameters(), lr=0.01, weight_decay=0.1)
    mask = [[bool(m) for m in row] for row in MASKS]
    loss = objective(name)
    for _ in range(steps):
        advantage = (
            losses.leave_one_out(REWARDS, groups)
            if name == "rloo"
            else losses.advantages(REWARDS, groups, loss.scale_rewards)
        )
        value = losses.loss(name, logps(module), mask, advantage, epsilon_high=loss.epsilon_high, epsilon=loss.epsilon)
        instance.zero_grad()
        value.backward()
        if bound is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), bound)
        instance.step()
    return module


@pytest.mark.parametrize("name", list(BASES))
@pytest.mark.parametrize("bound", [None, 0.1, 1e6])
def test_a_step_is_what_the_plain_loop_does(name: str, bound: float | None) -> None:
    step, params = built(name, max_grad_norm=bound)
    state = step.optimizer.init(params)
    for _ in range(3):
        params, _, state, _, _ = step(params, state, rollouts())
    for leaf, p in plain_training(name, torch.optim.AdamW, bound, 3).named_parameters():
        # Adam divides by gradients as small as the rounding of their sums lets them be: 1e-16 / 1e-6 of lr 0.01.
        torch.testing.assert_close(params[leaf], p.detach(), rtol=1e-10, atol=1e-10, msg=lambda m, n=leaf: f"{n}: {m}")


@pytest.mark.parametrize("name", list(BASES))
def test_one_pass_and_two_passes_and_microbatches_give_one_gradient(name: str) -> None:
    fields: dict[str, Any] = {
        "old_logps": [[-1.5] * len(c) for c in COMPLETIONS],
        "ref_logps": [[-2.0] * len(c) for c in COMPLETIONS],
    }
    u = rollouts(**fields)
    step, params = built()
    loss = replace(objective(name), beta=0.2)
    whole, info = replace(step, objective=loss).gradient(params, u)
    assert float(tree.norm(whole)) > 1e-3
    for microbatch in (1, 4):
        cut, cut_info = replace(step, objective=loss, microbatch=microbatch).gradient(params, u)
        two = engine.gradient(loss, step.policy, params, loss.prepare(u), separable=False, microbatch=microbatch)
        for leaf in whole:
            # 13 tokens' contributions in another order: 1e-16 of terms below 10.
            torch.testing.assert_close(cut[leaf], whole[leaf], rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(two.gradient[leaf], whole[leaf], rtol=1e-12, atol=1e-14)
        assert cut_info == pytest.approx(info, rel=1e-12)


@pytest.mark.parametrize("make", [lambda: adamw(0.01), lambda: sgd(0.1, 0.9), lambda: from_torch(torch.optim.RMSprop)])
def test_calling_is_gradient_then_apply(make: Any) -> None:
    step, params = built(optimizer=make(), max_grad_norm=0.05)
    state = step.optimizer.init(params)
    both = step(params, state, rollouts(), lr=0.02)
    gradient, info = step.gradient(params, rollouts())
    halves = step.apply(params, state, gradient, 0.02, info)
    for mine, theirs in zip(both[:4], halves[:4], strict=True):
        assert_same(mine, theirs)
    assert both.info == halves.info
    assert isinstance(both, StepResult)
    assert set(both.info) == {
        "loss", "ratio_mean", "clip_fraction", "approx_kl", "entropy", "grad_norm", "clip_coefficient", "lr"
    }  # fmt: skip


def test_the_gradient_in_the_result_is_the_raw_one_and_the_step_is_clipped() -> None:
    step, params = built(optimizer=sgd(1.0), max_grad_norm=0.05)
    found = step(params, step.optimizer.init(params), rollouts())
    norm = float(tree.norm(found.gradient))
    assert norm > 0.05
    assert found.info["grad_norm"] == pytest.approx(norm, rel=1e-14)
    assert found.info["clip_coefficient"] == pytest.approx(0.05 / (norm + 1e-6), rel=1e-14)
    assert found.info["lr"] == 1.0
    torch.testing.assert_close(float(tree.norm(found.delta)), 0.05 * norm / (norm + 1e-6), rtol=1e-12, atol=0.0)
    loose = replace(step, max_grad_norm=1e9)(params, step.optimizer.init(params), rollouts())
    assert loose.info["clip_coefficient"] == 1.0
    assert_same(loose.gradient, found.gradient)


@pytest.mark.parametrize("name", list(BASES))
def test_a_step_is_pure(name: str) -> None:
    module = Tiny().train()
    policy, params = from_module(module)
    step = make_step(policy, objective(name), adamw(0.01), max_grad_norm=0.1, microbatch=2)
    state = step.optimizer.init(params)
    u = rollouts()
    before = clone({"params": params, "state": state, "module": dict(module.state_dict())})
    kept = {k: v.clone() for k, v in u._asdict().items() if v is not None}
    rng = torch.get_rng_state()
    found = step(params, state, u)
    now = {"params": params, "state": state, "module": dict(module.state_dict())}
    assert_same(now, before)
    assert_same({k: v for k, v in u._asdict().items() if v is not None}, kept)
    assert torch.equal(torch.get_rng_state(), rng)
    assert module.training
    assert all(p.grad is None and p.requires_grad for p in module.parameters())

    gradient = found.gradient
    result = step.apply(params, state, gradient)
    assert_same({"params": params, "state": state}, {"params": before["params"], "state": before["state"]})
    held = clone(dict(enumerate(result[:3])))
    for leaf in (*params.values(), *gradient.values(), *(x for entries in state.values() for x in entries.values())):
        leaf.fill_(3.0)  # later changes of the arguments do not show in the result
    assert_same(dict(enumerate(result[:3])), held)


def test_the_gradient_is_carried_and_not_copied() -> None:
    step, params = built(max_grad_norm=1e-3)
    state = step.optimizer.init(params)
    gradient = {name: torch.randn_like(p).requires_grad_() for name, p in params.items()}
    before = clone(gradient)
    result = step.apply(params, state, gradient)
    assert_same(gradient, before)
    for name, g in gradient.items():
        assert result.gradient[name].data_ptr() == g.data_ptr()
        assert not result.gradient[name].requires_grad


def test_leaves_that_require_grad_are_detached() -> None:
    step, params = built()
    live = {name: p.requires_grad_() for name, p in params.items()}
    found = step(live, step.optimizer.init(live), rollouts())
    assert not any(x.requires_grad for part in found[:2] for x in part.values())
    assert not any(g.requires_grad for g in found.gradient.values())
    assert all(p.grad is None for p in live.values())


def test_progress_counts_the_rows() -> None:
    step, params = built(microbatch=4)
    seen: list[tuple[str, int, int]] = []
    step.gradient(params, rollouts(), progress=lambda *args: seen.append(args))
    assert seen == [("gradient", 4, 6), ("gradient", 6, 6)]


def test_no_advantage_leaves_momentum_and_decay() -> None:
    step, params = built()
    state = step.optimizer.init(params)
    with pytest.warns(FuncprobeWarning, match="momentum and weight decay alone"):
        found = step(params, state, rollouts(rewards=[1.0] * 6))
    assert not any(bool(g.any()) for g in found.gradient.values())
    for leaf, update in found.delta.items():
        torch.testing.assert_close(update, -0.01 * 0.1 * params[leaf], rtol=1e-15, atol=0.0)


def test_numbers_that_are_not_finite_name_the_leaf() -> None:
    step, params = built(dtype=torch.float32)
    state = step.optimizer.init(params)
    good = {name: torch.ones_like(p) for name, p in params.items()}
    with pytest.raises(NumericsError, match=r"The gradient is not finite at 'mix\.bias' \(float32\); check"):
        step.apply(params, state, {**good, "mix.bias": torch.full((5,), torch.nan)})
    bad_state = {**state, "head.bias": {**state["head.bias"], "exp_avg": torch.full((V,), torch.inf)}}
    with pytest.raises(NumericsError, match=r"The step Δθ is not finite at 'head\.bias'"):
        step.apply(params, bad_state, good)
    huge = rollouts(advantages=[1e300, -1e300, 1e300, -1e300, 1e300, -1e300])  # beyond float32
    with pytest.raises(
        NumericsError, match=r"The gradient of the loss is not finite at 'embed\.weight' \(float32\) and \d more"
    ):
        step.gradient(params, huge)


def test_a_finite_update_that_overflows_the_stored_dtype_names_leaf_and_dtype() -> None:
    step, params = built(dtype=torch.float16, optimizer=sgd(1.0))
    params = {**params, "head.bias": torch.full_like(params["head.bias"], 65504.0)}  # the largest float16
    gradient = {name: torch.full_like(p, -1e3 if name == "head.bias" else 0.0) for name, p in params.items()}
    with pytest.raises(NumericsError, match=r"The stepped parameter is not finite at 'head\.bias' \(float16\)"):
        step.apply(params, step.optimizer.init(params), gradient)


@pytest.mark.parametrize("microbatch", [None, 2])
def test_the_gradient_reports_how_far_the_sampler_is(microbatch: int | None) -> None:
    step, params = built(microbatch=microbatch)
    scored = logps(Tiny()).detach()
    off = torch.linspace(-0.5, 0.3, scored.numel(), dtype=torch.float64).reshape(scored.shape)
    reported = [(scored - off)[row, : len(c)].tolist() for row, c in enumerate(COMPLETIONS)]
    u = rollouts(sampling_logps=reported)
    _, info = step.gradient(params, u)
    mine = off[u.completion_mask]
    # Thirteen log-probabilities of order one, each rounded a few times.
    assert info["sampler_gap"] == pytest.approx(float(mine.abs().mean()), rel=1e-12)
    assert info["sampler_ratio"] == pytest.approx(float(mine.exp().mean()), rel=1e-12)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
def test_a_clip_bound_out_of_range_is_refused_when_the_step_is_made(bound: float) -> None:
    policy, _ = from_module(Tiny())
    with pytest.raises(InputError, match="max_grad_norm is"):
        make_step(policy, grpo(), sgd(0.1), bound)


@pytest.mark.parametrize("lr", [-1.0, float("nan"), float("inf")])
def test_a_learning_rate_out_of_range_is_refused(lr: float) -> None:
    step, params = built()
    with pytest.raises(InputError, match="learning rate is"):
        step.apply(params, step.optimizer.init(params), params, lr)


def test_a_step_is_frozen() -> None:
    step, _ = built()
    with pytest.raises(FrozenInstanceError):
        step.microbatch = 3  # type: ignore[misc]
