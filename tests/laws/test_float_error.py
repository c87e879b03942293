"""The same account of float error in reverse mode as in forward mode, and no conclusion from a number that it ate."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

import funcprobe as fp
from funcprobe.measurement.readings import Reading
from funcprobe.results.comparison_words import table_of
from funcprobe.results.sweep_numbers import remarks_of
from funcprobe.results.sweep_words import headline_of
from tests.cases import models
from tests.cases import routing as routing_cases
from tests.cases.probes import Case, E, U, Variant, updates

#: From where float32 eats ΔF to where it does not reach.
LRS = (1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)


@functools.cache
def case(name: str) -> Case:
    if name in ("qwen3_moe", "mixtral"):
        return Case(routing_cases.mixture(name))
    return Case({"gpt2": models.gpt2, "qwen2": models.qwen2}[name](torch.float32))


@functools.cache
def swept(name: str, mode: Any) -> fp.SweepResult:
    return case(name).sweep(LRS, mode=mode, order=1, bars=None)


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_the_error_that_reverse_mode_states_is_that_of_its_difference(name: str) -> None:
    reverse = swept(name, "reverse").readings()
    truth = case(name).sweep(LRS, method="path", order=1, bars=None).readings()
    ratios = []
    for lr, r, t in zip(LRS, reverse, truth, strict=True):
        assert r.method == "difference"
        assert r.float_error is not None
        assert t.method == "path"  # accurate to 1e-4, of θ + Δθ; a difference sees θ′ as stored
        row = case(name).probe(lr, mode="reverse").outcome.rounding
        assert row is not None
        ratios.append(abs(r.change - t.change - row) / r.float_error)
    # an estimate of a standard deviation, from a few sequences: neither blind to the error nor far above it
    assert max(ratios) < 6, ratios
    assert sorted(ratios)[len(ratios) // 2] > 0.02, ratios


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "qwen3_moe", "mixtral"])
def test_what_is_lost_says_so(name: str) -> None:
    low, high = (case(name).probe(lr, mode="reverse") for lr in (1e-10, 1e-4))
    assert low.main.is_lost
    assert math.isnan(low.nonlinearity)
    assert any("is lost in float error" in note and "load the model in float64" in note for note in low.notes)
    assert "(lost in float error)" in low.summary()
    assert "of ΔF)" not in low.summary()
    assert not high.main.is_lost
    assert high.nonlinearity < 1
    assert not any("lost" in note for note in high.notes)
    assert "lost" not in high.summary()
    assert "float error of ΔF" in high.summary()


def test_float64_loses_nothing_in_reverse_mode() -> None:
    result = Case("gpt2").probe(1e-8, mode="reverse")
    assert not result.main.is_lost
    assert result.main.float_error is not None
    assert result.main.float_error < 1e-4 * abs(result.change)


def test_an_observable_that_does_not_move_is_not_lost() -> None:
    assert not Reading("x", "", 1.0, 0.0, 0.0, float_error=1e-9).is_lost
    assert Reading("x", "", 1.0, 0.0, 1e-9, float_error=1e-9).is_lost


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_the_largest_learning_rate_is_that_of_forward_mode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = case(name).largest(max_nonlinearity=0.05, between=(1e-9, 1e-1))
    assert forward.notes == ()
    in_reverse(monkeypatch)
    reverse = case(name).largest(max_nonlinearity=0.05, between=(1e-9, 1e-1))
    assert reverse.lr == pytest.approx(forward.lr, rel=0.05)  # twice as coarse as either is
    assert reverse.limited_by is not None
    assert not reverse.point.readings["rao_blackwell/per_decision/token"].is_lost
    (note,) = reverse.notes
    assert note.startswith("ΔF is lost in float error up to lr ")
    assert "count as kept; the answer lies above" in note


def test_an_answer_where_nothing_can_be_judged_is_owned_up_to(monkeypatch: pytest.MonkeyPatch) -> None:
    in_reverse(monkeypatch)
    found = case("gpt2").largest(max_nonlinearity=0.05, between=(1e-11, 1e-10))
    assert (found.lr, found.limited_by) == (1e-10, None)
    assert "no more than the largest learning rate that does not visibly break a bound" in found.notes[0]


def test_a_bound_on_the_sample_is_judged_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    in_reverse(monkeypatch)
    assert case("gpt2").largest(min_ess=0.5, between=(1e-11, 1e-10)).notes == ()


def in_reverse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `largest_lr`, which takes no mode, meet a model without forward derivatives."""
    import funcprobe.measurement.first_order as module

    def refuse(*_: Any) -> Any:
        raise fp.errors.ForwardModeError("The module 'x' has no forward derivative; use mode=\"reverse\".")

    monkeypatch.setattr(module, "_forward", refuse)


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_a_sweep_concludes_nothing_from_what_is_lost(name: str) -> None:
    reverse = swept(name, "reverse")
    lost = [lr for lr, r in zip(LRS, reverse.readings(), strict=True) if r.is_lost]
    assert 0 < len(lost) < len(LRS) - 1
    assert reverse.slope().points == len(LRS) - len(lost)
    assert reverse.slope(up_to=1e-4).slope.value == pytest.approx(1, abs=0.1)
    assert reverse.scale_check().lr == pytest.approx(LRS[-1] / LRS[len(lost)])
    assert "in proportion to the learning rate" in headline_of(reverse)
    assert any(text.startswith("Subtracting two evaluations is off by more than 10 %") for text in remarks_of(reverse))
    assert reverse.summary().count("(lost)") == len(lost)
    assert not any(r.is_lost for r in swept(name, "forward").readings())


def test_a_sweep_of_nothing_but_float_error_says_that() -> None:
    found = case("gpt2").sweep([1e-11, 1e-10], mode="reverse")
    assert all(r.is_lost for r in found.readings())
    assert headline_of(found).startswith(
        "At every learning rate the change of the entropy is lost in float error; how "
    )


def test_a_comparison_bars_no_difference_that_is_lost() -> None:
    c = case("gpt2")
    steps = {
        "base": Variant(c.step, lr=1e-4),
        "one": Variant(c.step, lr=1e-10),
        "two": Variant(c.step, lr=2e-10),
    }
    found = fp.compare(updates(steps, c.params, c.state, U), E, mode="reverse", observables={"entropy": fp.entropy()})
    assert math.isinf(found.difference("two", against="one").error)
    assert math.isfinite(found.difference("one").error)  # the base step is far above what was lost
    assert [row.cells[1].endswith("(lost)") for row in table_of(found.outcomes).rows] == [False, True, True]
    assert "nothing follows from it" in found.summary()


@pytest.mark.parametrize("lr", [1e-2, 1e-4, 1e-6])
def test_under_autocast_a_path_tells_what_a_subtraction_cannot(lr: float) -> None:
    """The leaves are float32 and so are the nodes; each derivative is as accurate as bfloat16, and nothing cancels."""

    found = {}
    for name, module in {
        "float32": models.qwen2(),
        "autocast": models.in_accelerates_bfloat16(models.qwen2()),
    }.items():
        policy, params = fp.from_module(module)
        step = fp.make_step(policy, fp.grpo(), fp.sgd(lr))
        rollouts = models.rollouts(12, seed=1), models.rollouts(12, seed=2)
        update = fp.Update.from_step(step, params, step.optimizer.init(params), rollouts[1])
        found[name] = fp.probe(update, rollouts[0], bars=None)
    wide, low = found["float32"], found["autocast"]
    assert low.main.method == "path"
    assert not low.main.is_lost
    assert low.main.float_error is not None
    # two bfloat16 roundings of 4e-3 in the gradient that made the step, and one in each derivative along it
    assert low.change == pytest.approx(wide.change, rel=0.05)
    assert low.main.subtraction is not None
    if lr < 1e-5:  # scores of bfloat16 do not see so small a step: their difference is noise, or nothing at all
        assert abs(low.main.subtraction - wide.change) >= abs(wide.change)
