"""A row whose completion is masked out whole (truncated, say): none of it trains, and it counts wherever rows do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import funcprobe as fp
from funcprobe import objectives
from funcprobe.data.files import read_rollouts, write_rollouts
from funcprobe.data.rollouts import concatenate, rollouts_from_padded, split, take
from funcprobe.errors import InputError
from funcprobe.estimators.observables import entropy_family
from funcprobe.types import Params, Rollouts
from tests.cases import models
from tests.cases.rollout_lists import assert_same_rollouts
from tests.cases.tables import OBJECTIVES, PLAIN
from tests.oracles import losses

PROMPTS = [[1, 2], [1, 2], [1, 2], [1, 2], [3], [3]]
COMPLETIONS = [[4, 5], [6, 0, 1], [2, 3, 1], [1, 4], [2, 2, 5], []]
MASKS = [[1, 1], [1, 0, 1], [0, 0, 0], [1, 1], [1, 1, 1], []]
REWARDS = [1.0, 0.0, 0.0, 0.5, 1.0, 0.2]


def batch(**keywords: Any) -> Rollouts:
    given = {"temperature": 0.8, "rewards": REWARDS, "completion_masks": MASKS} | keywords
    return fp.rollouts_from_lists(PROMPTS, COMPLETIONS, **given)


def model() -> tuple[fp.Policy, Params, Any]:
    module = models.two_lines()
    return (*fp.from_module(module), module)


def log_probs(params: Params, rollouts: Rollouts, row: int, t: int) -> Tensor:
    """Return the log-probabilities that predict completion token t of a row."""
    before = int(rollouts.ids[row, int(rollouts.prompt_lengths[row]) + t - 1])
    logits = torch.tanh(params["embed.weight"][before]) @ params["head.weight"].T + params["head.bias"]
    return (logits / rollouts.temperature[row]).log_softmax(-1)


def logps(params: Params, rollouts: Rollouts) -> Tensor:
    rows = []
    for row in range(len(rollouts.ids)):
        for t in range(rollouts.completion_mask.shape[1]):
            on = bool(rollouts.completion_mask[row, t])
            token = int(rollouts.ids[row, int(rollouts.prompt_lengths[row]) + t]) if on else 0
            rows.append(log_probs(params, rollouts, row, t)[token] if on else torch.zeros((), dtype=torch.float64))
    return torch.stack(rows).view(rollouts.completion_mask.shape)


@pytest.mark.parametrize("microbatch", [None, 1])
@pytest.mark.parametrize("name", PLAIN)
def test_baselines_and_denominators_count_the_row(name: str, microbatch: int | None) -> None:
    policy, params, _ = model()
    scale = {"dr_grpo": "none", "rloo": "leave one out"}.get(name, "group")
    rollouts, groups = batch(), [0, 0, 0, 0, 1, 1]
    found, info = fp.make_step(policy, OBJECTIVES[name], fp.sgd(0.1), microbatch=microbatch).gradient(params, rollouts)
    advantage = (
        losses.leave_one_out(REWARDS, groups) if scale == "leave one out" else losses.advantages(REWARDS, groups, scale)
    )
    leaves = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
    options = {"cispo": {"epsilon_high": 5.0}, "dapo": {"epsilon_high": 0.28}}.get(name, {})
    loss = losses.loss(name, logps(leaves, rollouts), rollouts.completion_mask.tolist(), advantage, **options)
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    assert info["loss"] == pytest.approx(float(loss.detach()), rel=1e-12, abs=1e-14)
    torch.testing.assert_close({n: found[n] for n in expected}, expected, rtol=1e-11, atol=1e-13)


def test_observables_take_it_for_a_row_of_length_0() -> None:
    policy, params, _ = model()
    rollouts = batch(weight=[1.0, 2.0, 1.5, 1.0, 0.5, 3.0])
    after = {n: p + models.direction(params, 0.1)[n] for n, p in params.items()}
    anchor, scores = fp.score(policy, params, rollouts), fp.score(policy, after, rollouts)
    mask, a = rollouts.completion_mask, rollouts.weight
    d = torch.where(mask, logps(after, rollouts) - logps(params, rollouts), 0.0)
    h = torch.zeros(mask.shape, dtype=torch.float64)
    for row, t in mask.nonzero().tolist():
        q = log_probs(after, rollouts, row, t)
        h[row, t] = -(q.exp() * q).sum()
    w = a * d.sum(1).exp() / (a * d.sum(1).exp()).sum()
    length = tokens = 0.0
    entropy = 0.0
    for t in range(mask.shape[1]):
        prefix = a * d[:, :t].sum(1).exp()
        length += float((prefix / prefix.sum() * mask[:, t]).sum())
        entropy += float((prefix / prefix.sum() * h[:, t]).sum())
    tokens = length
    by_name = {o.name: float(o(scores, anchor, rollouts)) for o in entropy_family()}
    assert by_name["rao_blackwell/per_decision/token"] == pytest.approx(entropy / tokens, rel=1e-12)
    assert by_name["rao_blackwell/per_decision/sequence"] == pytest.approx(entropy, rel=1e-12)
    assert by_name["rao_blackwell/sequence/token"] == pytest.approx(
        float((w * h.sum(1)).sum() / (w * mask.sum(1)).sum()), rel=1e-12
    )
    assert float(fp.mean_length()(scores, anchor, rollouts)) == pytest.approx(length, rel=1e-12)
    reward = float((w * torch.tensor(REWARDS)).sum())
    assert float(fp.expected_reward()(scores, anchor, rollouts)) == pytest.approx(reward, rel=1e-7)


@pytest.mark.filterwarnings("ignore::funcprobe.errors.FuncprobeWarning")  # six rows are few, and E is U
def test_a_probe_and_its_attribution_run_over_it() -> None:
    policy, params, _ = model()
    step = fp.make_step(policy, fp.grpo(), fp.sgd(0.05))
    state = step.optimizer.init(params)
    report = fp.probe(fp.Update.from_step(step, params, state, batch()), batch())
    assert abs(report.change / report.first_order - 1) < 0.5
    one_by_one = fp.probe(fp.Update.from_step(step, params, state, batch()), batch(), microbatch=1)
    assert one_by_one.change == pytest.approx(report.change, rel=1e-10)
    found = fp.attribute(fp.Update.from_step(step, params, state, batch()), batch(), influence="sequences")
    assert found.completeness_error < 1e-9


@pytest.mark.parametrize("extension", ["parquet", "jsonl"])
def test_files_and_slices_keep_it(extension: str, tmp_path: Path) -> None:
    rollouts = batch(sampling_logps=[[-1.0] * len(c) for c in COMPLETIONS], advantages=[0.1 * i for i in range(6)])
    write_rollouts(tmp_path / f"a.{extension}", rollouts)
    assert_same_rollouts(read_rollouts(tmp_path / f"a.{extension}"), rollouts)
    assert_same_rollouts(concatenate([take(rollouts, [i]) for i in range(6)]), rollouts)
    assert sum(len(part.ids) for part in split(rollouts, 0.5, torch.Generator().manual_seed(0))) == 6
    alone = take(rollouts, [2, 5])
    assert int(alone.completion_mask.sum()) == 0


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("told", [True, False])
def test_padded_arrays_as_a_trainer_has_them(seen: bool, told: bool) -> None:
    """TRL empties the mask of a truncated completion, and attends to none of its tokens."""
    ids = [[9, 1, 2, 4, 5, 9], [9, 1, 2, 6, 0, 1], [9, 9, 3, 2, 2, 9], [9, 9, 3, 1, 1, 1]]
    masks = [[0, 0, 0, 1, 1, 0], [0] * 6, [0, 0, 0, 1, 1, 0], [0] * 6]
    attention = [[0, 1, 1, 1, 1, 0], [0, 1, 1, *[int(seen)] * 3], [0, 0, 1, 1, 1, 0], [0, 0, 1, *[int(seen)] * 3]]
    extra = {"prompt_lengths": [2, 2, 1, 1]} if told else {}
    found = rollouts_from_padded(ids, attention, masks, temperature=1.0, advantages=[0.5, -0.5, 2.0, -2.0], **extra)
    assert found.group_ids.tolist() == [0, 0, 1, 1]
    assert found.prompt_lengths.tolist() == [2, 2, 1, 1]
    assert found.completion_mask.sum(1).tolist() == [2, 0, 2, 0]
    assert found.advantages is not None
    assert found.advantages.tolist() == [0.5, -0.5, 2.0, -2.0]
    # the rows that are emptied still divide: N of a mean over sequences is 4
    weights = objectives.grpo().token_weights(found)
    assert float(weights.sum()) == 0.5


def test_a_batch_without_any_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Row 0 has no completion token: its completion mask is empty, and so is that"):
        batch(completion_masks=[[0] * len(c) for c in COMPLETIONS])
    with pytest.raises(InputError, match="Row 0 has no completion token"):
        fp.rollouts_from_lists([[1]] * 2, [[], []], temperature=1.0)
