"""What-if: several steps on one E are each what a probe of it says, and their differences are paired by prompt."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import funcprobe as fp
from funcprobe.errors import InputError, NumericsError
from funcprobe.results.blocks import as_text
from funcprobe.results.comparison import Comparison
from tests.cases.comparing import compared, variants
from tests.cases.probes import Case, E, U, Variant, updates
from tests.cases.tables import observables

OBSERVABLES = observables("entropy", "reward", "kl")


def probed(case: Case, variant: Any, **options: Any) -> fp.ProbeResult:
    """Probe one variant on its own."""
    v = variant if isinstance(variant, Variant) else Variant(variant)
    state = case.state if v.opt_state is None else v.opt_state
    batch = U if v.batch is None else v.batch
    return fp.probe(
        fp.Update.from_step(v.step, case.params, state, batch, lr=v.lr),
        E,
        observables=OBSERVABLES,
        rounding=False,
        **options,
    )


@pytest.mark.parametrize("model", ["two lines", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"chunk": 3}, {"order": 2}, {"mode": "reverse"}, {"bars": None}])
def test_every_step_is_what_a_probe_of_it_says(model: str, options: dict[str, Any]) -> None:
    case = Case(model)
    steps = variants(case)
    if model != "two lines" and options:  # a step of each kind; all of them by the default way, and on the small model
        steps = {name: steps[name] for name in ("a third", "dapo", "sgd", "other prompts")}
    found = compared(case, steps, **options)
    own = {name: value for name, value in options.items() if name != "chunk"}
    for name, variant in steps.items():
        alone = probed(case, variant, **own)
        outcome = found.outcomes[name]
        assert (outcome.lr, outcome.delta_norm) == (alone.lr, alone.outcome.delta_norm), name
        for what, reading in alone.readings.items():
            same = found.reading(name, what)
            # one pass with several tangents, or one tangent: another order of summation in float64
            size = max(abs(reading.change), abs(reading.first_order), 1e-6)
            assert same.change == pytest.approx(reading.change, abs=1e-11 * size), (name, what)
            assert same.first_order == pytest.approx(reading.first_order, abs=1e-9 * size), (name, what)
            assert (same.second_order is None) == (reading.second_order is None)
            assert same.bars.keys() == reading.bars.keys()
            for quantity, bar in reading.bars.items():
                if quantity != "ratio" or reading.first_order:
                    assert same.bars[quantity].error == pytest.approx(bar.error, rel=1e-6, abs=1e-11), (
                        name,
                        what,
                        quantity,
                    )


def test_a_difference_is_paired_by_prompt() -> None:
    """Against the jackknife by hand: both steps probed again without each prompt in turn, and subtracted."""
    case = Case("gpt2")
    steps = {name: variants(case)[name] for name in ("grpo", "a third")}
    found = compared(case, steps, bars="jackknife")
    groups = E.group_ids.unique().tolist()

    def gap(evaluation: fp.Rollouts) -> float:
        changes = [
            fp.probe(fp.Update.from_step(case.step, case.params, case.state, U, lr=lr), evaluation, bars=None).change
            for lr in (case.optimizer.lr / 3, case.optimizer.lr)
        ]
        return changes[0] - changes[1]

    left_out = [gap(E._replace(weight=(E.group_ids != g).double())) for g in groups]
    mean = sum(left_out) / len(groups)
    error = math.sqrt((len(groups) - 1) / len(groups) * sum((x - mean) ** 2 for x in left_out))
    difference = found.difference("a third")
    assert difference.value == pytest.approx(gap(E), rel=1e-9)
    assert difference.error == pytest.approx(error, rel=1e-6)
    assert difference.low < difference.value < difference.high
    # a step of a third moves the same way, so most of the sampling error is common: independent errors would add
    alone = [found.reading(name).bars["change"].error for name in steps]
    assert difference.error < math.hypot(*alone)


def test_differences_change_sign_with_their_order_and_vanish_against_oneself() -> None:
    found = compared(Case("two lines"))
    for quantity in ("change", "first_order"):
        one = found.difference("dapo", "reward", against="sgd", quantity=quantity)
        other = found.difference("sgd", "reward", against="dapo", quantity=quantity)
        assert one.value == -other.value
        assert one.error == pytest.approx(other.error, rel=1e-12)
        assert found.difference("dapo", against="dapo", quantity=quantity)[:2] == (0.0, 0.0)
    assert found.baseline == "grpo"
    assert found.difference("dapo") == found.difference("dapo", "entropy", against="grpo")


def test_bootstrap_differences_are_paired_too() -> None:
    case = Case("two lines")
    steps = {"one": case.step, "the same": Variant(case.step, lr=case.optimizer.lr)}
    found = compared(case, steps, bars="bootstrap", seed=3)
    assert found.difference("the same").error == 0.0


def test_a_difference_without_bars_is_infinitely_wide() -> None:
    case = Case("two lines")
    steps = {name: variants(case)[name] for name in ("grpo", "dapo")}
    for found in (compared(case, steps, bars=None), compared(case, steps, mode="reverse")):
        assert found.difference("dapo", quantity="first_order").error == math.inf
    assert compared(case, steps, mode="reverse").difference("dapo").error < math.inf


@pytest.mark.parametrize(
    ("options", "on_e", "on_u"),
    [
        ({"chunk": 8}, 1 + 8, 2),
        ({"chunk": 3}, 3 + 8, 3),
        ({"chunk": 1}, 8 + 8, 5),
        ({"mode": "reverse", "observables": {"h": fp.entropy()}}, 1 + 8, 3),
    ],
)
def test_what_is_shared_is_taken_once(options: dict[str, Any], on_e: int, on_u: int) -> None:
    """Eight steps, five gradients: three of them differ in what comes after it. E: forward passes, or ∇F, then θ′.

    Of the five, that of another U needs a pass of its own; the four objectives on one U share one where they stand in
    a chunk.
    """
    calls: list[str] = []
    case = Case("gpt2").watched(calls)
    found = compared(case, variants(case), microbatch=None, bars=None, **options)
    assert len(found.outcomes) == 8
    assert calls.count("E") == on_e
    assert calls.count("U") == on_u


def test_what_an_optimizer_or_a_batch_gives_cause_to_say_is_said_of_its_step() -> None:
    case = Case("two lines")
    flat = U._replace(rewards=torch.zeros_like(U.rewards))  # type: ignore[arg-type]
    found = compared(case, {"grpo": case.step, "nothing to learn": Variant(case.step, batch=flat)})
    assert list(found.warnings) == ["nothing to learn"]
    assert "All advantages are zero" in found.warnings["nothing to learn"][0]
    assert "Warning (nothing to learn): All advantages" in found.summary()


def test_a_comparison_reads_as_a_table() -> None:
    found = compared(Case("two lines"))
    text = as_text(found.blocks(), 400)
    assert text.splitlines()[0].split() == ["update", "entropy", "ΔF", "δF₁", "reward", "ΔF", "kl", "ΔF"]
    assert "minus 'grpo'" in text
    assert f"{found.reading('dapo').change:+.3e} ± {found.reading('dapo').bars['change'].error:.1e}" in text
    assert "nats per token" in text
    frame = found.to_frame()
    assert set(frame["update"]) == set(found.outcomes)
    row = frame[(frame["update"] == "sgd") & (frame.observable == "kl") & (frame.quantity == "change")].iloc[0]
    assert row.value == found.reading("sgd", "kl").change
    assert row.difference == found.difference("sgd", "kl").value
    assert "entropy ΔF</th>" in found._repr_html_()


def test_a_comparison_is_saved_whole(tmp_path: Path) -> None:
    found = compared(Case("two lines"), order=2)
    again = Comparison.load(found.save(tmp_path / "what-if"))
    assert again.summary() == found.summary()
    assert again.to_dict() == found.to_dict()
    assert again.difference("sgd", "kl") == found.difference("sgd", "kl")
    with pytest.raises(InputError, match="exists already"):
        found.save(tmp_path / "what-if")


def test_without_rewards_on_e_there_is_no_reward_to_compare() -> None:
    case = Case("two lines")
    bare = E._replace(rewards=None)
    found = fp.compare(updates({"grpo": case.step}, case.params, case.state, U), bare)
    assert found.observables == ("entropy", "kl")


def test_bad_input_names_the_step() -> None:
    case = Case("two lines")
    sgd = dataclasses.replace(case.step, optimizer=fp.sgd(1e-2, momentum=0.9))
    with pytest.raises(
        InputError, match=r"Update 'sgd'.*written by another optimizer.*give update\.vary\(.*opt_state="
    ):
        compared(case, {"adamw": case.step, "sgd": sgd})
    with pytest.raises(InputError, match="no updates to compare"):
        compared(case, {})
    with pytest.raises(InputError, match=r"'lr' is a float, no update; expected what Update.from_step"):
        fp.compare({"lr": 1e-3}, E)  # type: ignore[dict-item]
    with pytest.raises(InputError, match="chunk is 0"):
        compared(case, chunk=0)
    broken = {n: {**s, "exp_avg": s["exp_avg"] * torch.nan} for n, s in case.state.items()}
    with pytest.raises(NumericsError, match="Update 'broken': The step Δθ is not finite"):
        compared(case, {"broken": Variant(case.step, opt_state=broken)})
    found = compared(case, {"grpo": case.step})
    with pytest.raises(InputError, match="no update 'dapo' with observable 'entropy'; the updates are grpo"):
        found.difference("dapo")
    with pytest.raises(InputError, match="Unknown quantity 'size'"):
        found.difference("grpo", quantity="size")  # type: ignore[arg-type]
