"""What a window remembers of its steps: θ where it opened, the parts of every Δθ, and whether the step was ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from funcprobe import tree
from funcprobe.live.steps import PARTS, Steps, split_of
from tests.cases.ledgers import Loop


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_the_parts_of_all_steps_sum_to_the_way(optimizer: str) -> None:
    loop = Loop(optimizer)
    steps = Steps.since(loop.params, 5)
    assert steps.last == 4
    for number in range(5, 8):
        steps.take(loop.backward(loop.draw()), number)
        loop.optimizer.step()
        steps.check(loop.params)
    assert (steps.first, steps.last, steps.mismatch) == (5, 7, 0.0)
    assert steps.lr == loop.optimizer.param_groups[0]["lr"]
    way = tree.sub(loop.params, steps.before)
    assert steps.sums is not None
    whole = {name: sum(steps.sums[what][name] for what in PARTS) for name in way}
    # three float64 steps, the parts of which are summed in float64
    assert float(tree.norm(tree.sub(whole, way)) / tree.norm(way)) < 1e-13
    for what in PARTS:
        moved = float(tree.norm(steps.sums[what]))
        assert (moved > 0) == (what != "weight decay" or optimizer == "AdamW")
    leaves = steps.leaves(loop.params, loop.params)
    split = split_of(leaves, known=True)
    assert sum(split.values()) == pytest.approx(float(tree.dot(loop.params, way)), rel=1e-12)
    assert abs(split["rounding and rest"]) < 1e-12 * max(map(abs, split.values()))
    assert list(split_of(leaves, known=False)) == ["steps"]


def test_nothing_is_shared_with_the_trainer() -> None:
    loop = Loop()
    first = {name: p.clone() for name, p in loop.params.items()}
    steps = Steps.since(loop.params, 0)
    batch = loop.draw()
    update = loop.backward(batch)
    of_batch = loop.pair.again(loop.optimizer).update(loop.objective, batch)
    steps.take(update, 0)
    steps.keep(of_batch, update.gradient().gradient, 0)
    for _ in range(2):
        loop.optimizer.step()
    for name, p in loop.module.named_parameters():
        assert p.grad is not None
        p.grad.zero_()
        assert torch.equal(steps.before[name], first[name])
        assert torch.equal(steps.kept[0].update.params[name], first[name])
        g = steps.kept[0].gradient[name]
        assert g is not None
        assert bool(g.any())
    assert float(tree.norm(tree.sub(loop.params, first))) > 0


def test_a_step_that_is_not_ours_is_seen() -> None:
    loop = Loop()
    steps = Steps.since(loop.params, 0)
    for number in range(4):  # a leaf a step: all of them have had their turn
        steps.take(loop.backward(loop.draw()), number)
        loop.optimizer.step()
        with torch.no_grad():
            for p in loop.module.parameters():
                p.mul_(1.001)  # such as an average of weights that a callback writes back
        steps.check(loop.params)
    assert steps.mismatch > 1e-3


def test_parts_may_be_left_unknown() -> None:
    loop = Loop()
    steps = Steps.since(loop.params, 0)
    steps.take(loop.backward(loop.draw()), 0, split=False)
    assert steps.sums is None
    assert steps.expected is None
    assert steps.lr == loop.optimizer.param_groups[0]["lr"]


def test_a_step_without_parts_is_only_a_whole(tmp_path: Path) -> None:
    loop = Loop("RMSprop")
    steps = Steps.since(loop.params, 0)
    steps.take(loop.backward(loop.draw()), 0)
    loop.optimizer.step()
    steps.check(loop.params)
    assert steps.sums is None
    assert steps.mismatch == 0
    assert steps.grad_norm is not None
