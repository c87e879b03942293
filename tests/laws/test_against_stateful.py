"""compat and the literal stateful system on the same batches, in float64.

Numbers agree to 1e-9 of Σ|terms| (tests/benchmarks/test_stateful.py says what rounding leaves: about 1e-14), Δθ to the
rounding of float32, in which the buffer is kept: 2⁻²⁴ relative an entry, 6e-8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from funcprobe import tree
from tests.cases import models
from tests.cases import stateful as cases
from tests.cases.live_pairs import adamw, lora, sgd

LIMIT, FLOAT32 = 1e-9, 2.0**-24


@pytest.mark.parametrize("model", [models.gpt2, lora], ids=["gpt2", "lora"])
@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_equals_the_stateful_system(model: Callable[[], Any], optimizer: Callable[..., Any]) -> None:
    live = cases.pair(model, optimizer)
    found = cases.probe(live, {"report_per_token": True, "importance_microbatch_size": 2})
    for per, ending in (("sequence", ""), ("token", "_tok")):
        mine = cases.stateful(live, per)
        # in float64, along the stateful system's own Δθ: the buffer's float32 is not in the way
        along = cases.predicted(live, param_update_buf=mine.param_update)
        theirs = {name: found[name + ending] for name in ("H_orig", "H_upd", "deltaH_true")}
        theirs["deltaH1"] = along["deltaH1" + ending]
        for name, value in theirs.items():
            assert abs(value - getattr(mine, name)) <= LIMIT * mine.terms_scale[name], (per, name)
    buffer = found["param_update_buf_named"]
    assert list(buffer) == list(mine.param_update)
    for name, delta in mine.param_update.items():
        assert torch.allclose(buffer[name].double(), delta, rtol=2 * FLOAT32, atol=1e-12), name
    assert found["param_update_l2"] == pytest.approx(mine.param_update_l2, rel=2 * FLOAT32)
    assert found["learning_rate_used"] == mine.learning_rate_used == 1e-3


def test_the_buffer_predicts_as_the_step_in_float64_does() -> None:
    live = cases.pair(models.gpt2)
    mine = cases.stateful(live)
    along = cases.predicted(live, param_update_buf=cases.probe(live)["param_update_buf_named"])
    assert abs(along["deltaH1"] - mine.deltaH1) <= 2 * FLOAT32 * mine.terms_scale["deltaH1"]
    assert along["learning_rate"] == 1.0
    assert along["bars_dot"] == along["deltaH1"]


def test_every_prompt_has_its_own_longest_completion_in_the_loss() -> None:
    """`(1/B_U) Σ_b −Σ_{g,t} A m logp / (G L_max,b)`, by loops and autograd, against SGD's Δθ = −η g."""
    module = cases.table()
    packed = cases.packed(4, 3, 2, max_lengths=[3, 5, 7, 11])
    advantages = packed.batch["advantages"].flatten()
    weight = module.logits.weight.detach().clone().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for row, (prompt, completion) in enumerate(zip(packed.prompts, packed.completions, strict=True)):
        tokens = [*prompt, *completion]
        for t in range(len(prompt), len(tokens)):
            logp = torch.log_softmax(weight[tokens[t - 1]], -1)[tokens[t]]
            loss = loss - advantages[row] * logp / (4 * 3 * packed.batch["max_lengths"][row // 3])
    (gradient,) = torch.autograd.grad(loss, weight)
    found = cases.probe((module, torch.optim.SGD(module.parameters(), lr=0.5)), U=packed.batch)
    (update,) = found["param_update_buf_named"].values()
    assert torch.allclose(update.double(), -0.5 * gradient, rtol=2 * FLOAT32, atol=1e-12)


def test_rewards_stand_in_for_advantages_and_the_ratio_is_clipped() -> None:
    live = cases.pair(cases.table, sgd)
    batch = cases.update()
    rewards = batch["advantages"] + torch.arange(4.0, dtype=torch.float64)[:, None]  # A = r − mean_g r
    of_rewards = cases.probe(live, U={**batch, "advantages": None, "rewards": rewards})
    assert of_rewards["deltaH_true"] == pytest.approx(cases.probe(live)["deltaH_true"], rel=1e-12)

    old = torch.full(batch["sequences"].shape, -1.9, dtype=torch.float64)
    free, tight = (cases.probe(live, config={"clip_eps": e}, U={**batch, "old_logps": old}) for e in (1e9, 0.01))
    upper = cases.probe(live, config={"clip_eps": 0.01, "clip_+": 1e9}, U={**batch, "old_logps": old})
    norms = {round(r["param_update_l2"], 12) for r in (free, tight, upper)}
    assert len(norms) == 3


def test_the_norm_of_the_buffer_is_taken_in_float64() -> None:
    found = cases.probe(cases.pair())
    buffer = found["param_update_buf_named"]
    assert all(x.dtype == torch.float32 and x.device.type == "cpu" for x in buffer.values())
    assert found["param_update_l2"] == float(tree.norm(buffer))
