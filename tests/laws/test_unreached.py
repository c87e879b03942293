"""A step that leaves a leaf alone: what is told of it, and that its parts are still all of it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import funcprobe as fp
from funcprobe import tree
from funcprobe.compat import ProbeComponents
from tests.cases import models, stateful
from tests.cases.tables import TORCH_CLASSES

#: U reaches the experts 0 and 1 alone; E all three of them, so that the gradient of F is not 0 at the third.
U, E = models.reaching([0, 1, 3, 4, 6, 7]), models.reaching(list(range(9)), n=9, seed=1)
ALONE = "experts.2.weight"
NOTE = f"1 of 5 leaves have no gradient on U and are left alone, as torch.optim does: {ALONE}"

every = pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop"])  # in closed form, with momentum, lifted


class Warm:
    """A live pair after a step that reached every expert, and the step on U that follows."""

    def __init__(self, name: str, clip: float | None = 0.1) -> None:
        cls, options = TORCH_CLASSES[name]
        self.model = models.experts()
        self.live = cls(self.model.parameters(), lr=1e-2, **options)
        self.model(torch.arange(9)[None]).logsumexp(-1).sum().backward()
        self.live.step()
        self.live.zero_grad()
        c = fp.from_training(self.model, self.live)
        self.policy, self.params, self.state = c.policy, c.params, c.opt_state
        assert c.optimizer is not None
        self.step = fp.make_step(c.policy, fp.reinforce(), c.optimizer, clip)

    @property
    def of(self) -> tuple[fp.Update, fp.Rollouts]:
        """The arguments that every verb takes."""
        return self.on(U), E

    def on(self, batch: fp.Rollouts, step: Any = None) -> fp.Update:
        """The update that a step on some batch makes."""
        return fp.Update.from_step(step or self.step, self.params, self.state, batch)

    def trained(self) -> dict[str, torch.Tensor]:
        """The parameters after the step as a training loop takes it, on a copy of the pair."""
        model, live = copy.deepcopy((self.model, self.live))
        for name, p in model.named_parameters():
            g = self.step.gradient(self.params, U)[0][name]
            p.grad = None if g is None else g.clone()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        live.step()
        return {n: p.detach() for n, p in model.named_parameters()}


@every
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_a_probe_says_so_and_measures_the_step_of_training(name: str, mode: Any) -> None:
    warm = Warm(name)
    found = fp.probe(*warm.of, mode=mode, keep_delta=True, method="difference")
    assert NOTE in found.notes
    assert found.outcome.info["leaves_without_gradient"] == 1
    assert found.delta is not None
    assert not bool(found.delta[ALONE].any())
    moved, after = warm.step(warm.params, warm.state, U).params, warm.trained()
    # the loop clips by a norm that torch sums in another order: 1e-15 of a step of 1e-2
    assert all(torch.allclose(moved[n], after[n], rtol=0, atol=1e-14) for n in after)
    assert torch.equal(moved[ALONE], warm.params[ALONE])


@every
def test_without_such_a_leaf_nothing_is_said(name: str) -> None:
    warm = Warm(name)
    found = fp.probe(warm.on(models.reaching(list(range(9)), seed=2)), E)
    assert "leaves_without_gradient" not in found.info
    assert not any("no gradient" in note for note in found.notes)


@every
@pytest.mark.parametrize("form", ["auto", "jacobian"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_parts_are_complete_and_the_leaf_has_none(name: str, form: Any, clip: float | None) -> None:
    found = fp.attribute(*Warm(name, clip).of, form=form, influence="sequences", bars=None)
    assert NOTE in found.probe.notes
    assert found.completeness_error <= 1e-9  # as promised in float64
    part = next(part for part in found.leaves if part.name == ALONE)
    assert (part.contribution, part.gradient, part.momentum, part.decay, part.norm) == (0.0, 0.0, 0.0, 0.0, 0.0)
    if found.form == "additive":
        assert abs(found.ledger["momentum"]) > 0
        assert math.fsum(found.ledger.values()) == pytest.approx(found.first_order, rel=1e-9)
    assert found.influence is not None
    columns = found.batch.through
    by_sequence = sum(through.sum(1) for through in columns.values())
    torch.testing.assert_close(found.influence.of_batch(), by_sequence, rtol=1e-9, atol=1e-15)


def test_rows_have_bars_that_stand_on_their_own_values() -> None:
    found = fp.attribute(*Warm("AdamW").of, bars_of=["ledger", "parameters", "prompts"])
    assert found.bars["parameters"][ALONE].value == 0.0
    for row, bar in found.bars["ledger"].items():
        assert bar.value == pytest.approx(found.ledger[row], rel=1e-9, abs=1e-15)
    total = math.fsum(bar.value for bar in found.bars["prompts"].values())
    assert total == pytest.approx(found.ledger["gradient on U"], rel=1e-9)


@every
def test_a_sweep_and_a_comparison_say_so_too(name: str, tmp_path: Path) -> None:
    warm = Warm(name)
    journal = tmp_path / "sweep.jsonl"
    swept = fp.sweep(*warm.of, [1e-5, 1e-4], journal=journal)
    assert NOTE in swept.notes
    assert swept.info["leaves_without_gradient"] == 1
    again = fp.sweep(*warm.of, [1e-5, 1e-4, 1e-3], journal=journal)
    assert [p.readings for p in again.points[:2]] == [p.readings for p in swept.points]
    other = fp.make_step(warm.policy, fp.grpo(), warm.step.optimizer)
    compared = fp.compare({"one": warm.on(U), "other": warm.on(U, other)}, E)
    assert all(any(note == NOTE for note in outcome.notes) for outcome in compared.outcomes.values())
    best = fp.largest_lr(*warm.of, max_abs_delta=10.0, between=(1e-6, 1e-5))
    assert best.lr == 1e-5


@pytest.mark.parametrize("own", [False, True])
def test_the_stateful_names_pass_it_over(own: bool) -> None:
    warm = Warm("AdamW")
    packed = stateful.packed(2, 2, seed=3).batch
    ids = torch.where(packed["sequences"] % 3 == 2, 1, packed["sequences"])
    seen: dict[str, torch.Tensor] = {}

    def itself(gradient: Any) -> Any:
        seen.update(gradient)
        return gradient

    found = ProbeComponents(warm.model, {}).compute_delta_h1_from_batches(
        E_batch=packed,
        U_batch={**packed, "sequences": ids},
        mb_size_prompts=2,
        weighting_mode="dr_grpo",
        adam_preconditioner=itself if own else None,
        optimizer=warm.live,
    )
    assert math.isfinite(found["deltaH1"])
    if own:
        assert not bool(seen[ALONE].any())
        assert float(tree.norm(seen)) > 0
