"""∇F kept for other updates of one θ, and attribution that measures nothing."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch

import funcprobe as fp
from funcprobe.errors import InputError
from funcprobe.types import Params
from tests.cases.attributions import Stepped
from tests.cases.probes import E, U, prompted
from tests.cases.tables import FLOAT64
from tests.cases.trees import assert_same

#: Sums of the same products in another order, and in float32 products that are themselves rounded.
EXACT, NARROW = 1e-11, 1e-4


@functools.cache
def case(model: str = "gpt2") -> Stepped:
    return Stepped(model)


def update(stepped: Stepped, batch: fp.Rollouts | None = None) -> fp.Update:
    return fp.Update.from_step(stepped.step, stepped.params, stepped.state, batch or stepped.batch)


def close(a: torch.Tensor, b: torch.Tensor, limit: float) -> bool:
    return float((a - b).abs().max()) <= limit * float(b.abs().sum())


@pytest.mark.parametrize("model", ["gpt2", "two lines", "qwen2, lora, float32"])
@pytest.mark.parametrize("form", ["additive", "jacobian"])
def test_parts_without_a_measurement_are_those_with_one(model: str, form: str) -> None:
    measured = case(model).attribute(form=form)
    alone = case(model).attribute(form=form, measure=False)
    limit = EXACT if model in FLOAT64 else NARROW
    size = measured.batch.magnitude()
    assert abs(alone.first_order - measured.first_order) <= limit * size
    assert close(alone.batch.total, measured.batch.total, limit)
    for one, other in zip(alone.leaves, measured.leaves, strict=True):
        assert one.name == other.name
        assert abs(one.contribution - other.contribution) <= limit * size
    assert alone.batch.predictors.keys() == measured.batch.predictors.keys()
    assert alone.completeness.keys() == {"parameters", "batch tokens"}
    assert alone.completeness_error <= limit


def test_nothing_is_said_to_be_measured() -> None:
    alone = case().attribute(measure=False)
    reading = alone.reading
    assert not reading.is_measured
    assert math.isnan(reading.change)
    assert math.isnan(reading.nonlinearity)
    assert reading.bars == {}
    assert alone.probe.family == {}
    assert alone.probe.provenance.mode == "reverse"
    for said in (" ".join(result.summary().split()) for result in (alone, alone.probe)):
        assert "by first order. The change itself was not measured." in said
        assert "measured   ΔF" not in said
        assert "nan" not in said.split()
    assert {"batch", "parameters"} <= set(alone.to_datatree().children)
    assert "evaluation" not in alone.to_datatree().children
    with pytest.raises(InputError, match=r"Tokens of E are parts of a measurement; call attribute\(\.\.\.\) without"):
        alone.to_frame("tokens", of="evaluation")


def test_it_takes_a_backward_pass_on_either_side_and_a_pass_over_u() -> None:
    told: list[str] = []
    case().attribute(measure=False, progress=lambda what, done, total: told.append(what))
    assert told == ["gradient", "E, reverse mode", "U, forward mode"]


def test_a_kept_gradient_serves_another_batch_without_a_pass_over_e() -> None:
    stepped, told = case(), []
    kept = fp.covector(update(stepped), E)
    other = update(stepped, prompted(4, 3, seed=5, first=60))
    progress = lambda what, done, total: told.append(what)  # noqa: E731
    found = fp.attribute(other, E, measure=False, covector=kept, progress=progress)
    assert told == ["gradient", "U, forward mode"]
    anew = fp.attribute(other, E, measure=False)
    assert found.first_order == anew.first_order
    assert torch.equal(found.batch.total, anew.batch.total)
    measured = fp.attribute(other, E, covector=kept, bars=None)
    assert close(measured.batch.total, found.batch.total, EXACT)
    assert measured.reading.is_measured


def test_it_is_the_gradient_of_the_anchored_observable() -> None:
    stepped = case()
    kept = fp.covector(update(stepped), E, {"reward": fp.expected_reward()})
    expected: Params = torch.func.grad(fp.anchored(fp.expected_reward(), stepped.policy, E, stepped.params))(
        stepped.params
    )
    size = float(fp.tree.norm(expected))
    assert size > 0
    assert float(fp.tree.norm(fp.tree.sub(kept.gradient, expected))) <= 1e-12 * size
    assert kept.name == "reward"


def test_a_gradient_of_something_else_is_refused() -> None:
    stepped = case()
    kept, of = fp.covector(update(stepped), E), update(stepped)
    copied = fp.Update.from_step(stepped.step, dict(stepped.params), stepped.state, stepped.batch)
    with pytest.raises(InputError, match="another θ than the update's"):
        fp.attribute(copied, E, covector=kept)
    with pytest.raises(InputError, match="on other rollouts than this E"):
        fp.attribute(of, E._replace(ids=E.ids.clone()), covector=kept)
    with pytest.raises(InputError, match=r"∇F of 'rao_blackwell/.*', and '.*' is attributed"):
        fp.attribute(of, E, fp.expected_reward(), covector=kept)


def test_what_only_a_measurement_gives_is_refused() -> None:
    of = update(case())
    with pytest.raises(InputError, match="one observable is attributed and no other is looked at; found a, b"):
        fp.attribute(of, E, {"a": fp.entropy(), "b": fp.expected_reward()}, measure=False)
    with pytest.raises(InputError, match="Error bars are made of a measurement"):
        fp.attribute(of, E, measure=False, bars="jackknife")
    with pytest.raises(InputError, match="Error bars are made of a measurement"):
        fp.attribute(of, E, measure=False, bars_of=("layers",))
    with pytest.raises(InputError, match="∇F is taken in reverse mode; leave it out"):
        fp.attribute(of, E, measure=False, mode="forward")
    with pytest.raises(InputError, match="method can do nothing in an attribution with measure=False"):
        fp.attribute(of, E, measure=False, method="path")
    with pytest.raises(InputError, match="bars can do nothing in a covector"):
        fp.covector(of, E, bars=None)


def test_influence_needs_no_measurement() -> None:
    found = case().attribute(measure=False, influence="prompts").influence
    expected = case().attribute(influence="prompts").influence
    assert found is not None
    assert expected is not None
    assert close(found.matrix, expected.matrix, EXACT)


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    alone = case().attribute(measure=False)
    alone.save(tmp_path / "alone")
    again = fp.load(tmp_path / "alone")
    assert isinstance(again, fp.Attribution)
    assert again.summary() == alone.summary()
    assert again.evaluation is None
    assert_same(again.batch.through, alone.batch.through)


def test_a_step_of_an_update_is_not_looked_at() -> None:
    stepped = case()
    delta = fp.Update.from_delta(stepped.policy, stepped.params, stepped.params)
    one, other = fp.covector(delta, E), fp.covector(update(stepped, U), E)
    assert_same(one.gradient, other.gradient)
