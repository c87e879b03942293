"""Gradients by single and by two passes are one, whatever is cut, shared or left out."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe import engine, tree
from funcprobe.data.rollouts import take
from funcprobe.policy import scoring
from funcprobe.types import Rollouts, TokenScores
from tests.cases import models, tables
from tests.cases.engines import entropy_of, off_policy, setting


@pytest.mark.parametrize("name", tables.PLAIN)
@pytest.mark.parametrize("microbatch", [1, 4, None, fp.TokenBudget(20)], ids=str)
def test_single_pass_is_two_phase(name: str, microbatch: int | fp.TokenBudget | None) -> None:
    policy, params, _, rollouts = setting("gpt2")
    objective = tables.OBJECTIVES[name]
    prepared = objective.prepare(off_policy(rollouts))
    assert objective.separable
    one, two = (
        engine.gradient(objective, policy, params, prepared, separable=s, microbatch=microbatch) for s in (True, False)
    )
    scale = float(tree.norm(two.gradient))
    assert scale > 0
    assert float(tree.norm(tree.sub(one.gradient, two.gradient))) <= 1e-13 * scale  # only the order of float64 sums
    assert math.isclose(float(one.value), float(two.value), rel_tol=1e-13)


def test_an_objective_that_is_not_separable_needs_two_phases() -> None:
    """The law above can fail: for a function that couples rows, slices give something else."""
    policy, params, _, rollouts = setting("gpt2")
    coupled = functools.partial(entropy_of, fp.entropy())
    one, two = (engine.gradient(coupled, policy, params, rollouts, separable=s, microbatch=2) for s in (True, False))
    assert float(tree.norm(tree.sub(one.gradient, two.gradient))) > 1e-3 * float(tree.norm(two.gradient))


@pytest.mark.parametrize("build", tables.KINDS)
def test_chunks_and_rematerialisation_change_nothing(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, params, v, rollouts = setting(build)
    f = functools.partial(entropy_of, fp.entropy())
    whole = engine.gradient(f, policy, params, rollouts)
    along = engine.directional(policy, params, v, rollouts)
    monkeypatch.setattr(scoring, "LOGITS_BUDGET", 3 * policy.vocab_size)  # three tokens at a time
    chunked = engine.gradient(f, policy, params, rollouts)
    # Qwen2's norms sum in float32 in another order
    relative = 1e-6 if "qwen2" in build else 1e-13
    gap = float(tree.norm(tree.sub(whole.gradient, chunked.gradient)))
    assert gap <= relative * float(tree.norm(whole.gradient))
    torch.testing.assert_close(engine.directional(policy, params, v, rollouts), along, rtol=1e-6, atol=1e-12)


def test_an_entropy_that_only_some_slices_need_is_pulled_back_in_those() -> None:
    policy, params, _, rollouts = setting("gpt2")
    late = torch.where(torch.arange(len(rollouts.ids)) == 0, 1.0, 0.0).double()

    def f(scores: TokenScores, rollouts: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        return scores.logp.sum() + (rollouts.weight[:, None] * scores.entropy).sum(), {}

    weighted = rollouts._replace(weight=late)
    for first in (weighted, take(weighted, torch.arange(len(late) - 1, -1, -1))):
        one_by_one = engine.gradient(f, policy, params, first, separable=True, microbatch=1)
        whole = engine.gradient(f, policy, params, first, separable=True)
        assert float(tree.norm(tree.sub(one_by_one.gradient, whole.gradient))) <= 1e-13 * float(
            tree.norm(whole.gradient)
        )
        without = engine.gradient(lambda s, r: (s.logp.sum(), {}), policy, params, first, separable=True, microbatch=1)
        assert float(tree.norm(tree.sub(whole.gradient, without.gradient))) > 1e-3 * float(tree.norm(whole.gradient))


def test_gradients_that_share_storage_do_not_add_up_twice() -> None:
    class Twins(nn.Module):
        """Two biases that autograd hands one and the same gradient tensor."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.randn(7, dtype=torch.float64)) for _ in range(2))

        def forward(self, ids: Tensor) -> Tensor:
            return (self.a + self.b).expand(*ids.shape, 7)

    with models.seeded(0):
        policy, params = fp.from_module(Twins())
    rollouts = models.rollouts()
    f = functools.partial(entropy_of, fp.entropy())
    cut = engine.gradient(f, policy, params, rollouts, microbatch=2).gradient
    whole = engine.gradient(f, policy, params, rollouts).gradient
    torch.testing.assert_close(cut, whole, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(cut["a"], cut["b"], rtol=0, atol=0)
