"""Answers of a diagnosis: the verdict by rule, the numbers that it was read from, and one thing to try."""

from __future__ import annotations

import math
from typing import Any

import pytest

from funcprobe.estimators.uncertainty import Bar
from funcprobe.results.diagnosis_answers import answers_of
from funcprobe.results.findings import Answer, LargestStep
from tests.cases.written_attribution import attribution
from tests.cases.written_diagnosis import INFO, diagnosis, drawn, findings
from tests.cases.written_probe import result


def bars(change: float, half: float) -> dict[str, Bar]:
    return {"change": Bar(change, half / 2, change - half, change + half)}


def moved(change: float, half: float, **more: Any) -> Answer:
    return answers_of(findings(attribution=None, alone=result(change=change, bars=bars(change, half), **more)))[0]


def test_a_change_that_is_not_told_names_the_prompts_that_would_tell_it() -> None:
    answer = moved(-1e-3, 2e-3)  # 32 prompts, four times as many would halve the interval
    assert answer.verdict == "cannot tell"
    assert answer.advice == "cannot tell from these rollouts: 96 more prompts would (128 in all)."
    assert answer.number == bars(-1e-3, 2e-3)["change"]
    assert "ΔF -1.00e-03 ± 1.0e-03 nats per token" in answer.sentence
    assert moved(-1e-3, 5e-4).verdict == "falls"
    assert moved(1e-3, 5e-4).verdict == "rises"
    assert "no number of prompts can be named" in moved(-1e-3, math.inf).advice
    lost = moved(-1e-3, 5e-4, float_error=5e-4)
    assert (lost.verdict, lost.advice[:27]) == ("cannot tell", "measure with method: path; ")


def test_the_largest_rows_stand_there_with_their_bars_and_shares() -> None:
    answer = diagnosis().answer("which prompts")
    assert "± 1.0e-07" in answer.sentence  # layers have bars here, prompts and tokens none
    assert answer.sentence.count("%)") == 3
    assert "token “" in answer.sentence
    assert "prompt " in answer.sentence.lower()


def test_the_step_is_held_against_other_learning_rates() -> None:
    answer = diagnosis().answer("too large")
    assert "|δF₂| = |δF₁| at lr 6.3e-3" in answer.sentence  # 22.6/3590, the law of the written sweep
    assert "Largest lr not too large: 5e-4." in answer.sentence
    found = diagnosis(largest=LargestStep(1e-9, None), ess=0.2).answer("too large")
    assert (found.verdict, found.advice) == ("too large", "lr 1e-9, the largest at which the step is not too large.")
    assert "1e-9 or more" in found.sentence
    without = diagnosis(curve=None, largest=None, missing={"curve": "the update has no learning rate"})
    assert "not known, the update has no learning rate" in without.answer("too large").sentence


@pytest.mark.parametrize(
    ("info", "holes", "verdict", "advice"),
    [
        ({}, 0, "does nothing", "clip-higher"),
        ({"clip_fraction": 0.2}, 0, "acts", "clip-higher"),
        ({"clip_coefficient": 0.1}, 0, "acts", "a larger max_grad_norm"),
        ({"top_entropy_quantile_fraction": 0.2}, 0, "acts", "clip-higher"),
        ({}, 10, "acts", "clip-higher"),
    ],
)
def test_clips_and_masks_are_counted(info: dict[str, float], holes: int, verdict: str, advice: str) -> None:
    found = findings(attribution=attribution(info={**INFO, **info}), drawn={"E": drawn(), "U": drawn(holes=holes)})
    answer = answers_of(found)[4]
    assert answer.verdict == verdict
    assert answer.advice.startswith(advice)


def test_clipping_at_ratios_of_1_is_left_alone_and_a_loss_that_says_nothing_is_not_known() -> None:
    assert "every ratio is 1" in diagnosis(ratios=None).answer("clipping").advice
    silent = findings(attribution=attribution(info={"loss": 0.5}))
    assert answers_of(silent)[4].verdict == "not known"


@pytest.mark.parametrize(
    ("changes", "verdict", "word"),
    [
        ({}, "fresh", "no change"),
        ({"drawn": {"E": drawn(), "U": drawn(gap=0.5)}}, "another policy", "score rollouts with"),
        ({"drawn": {"E": drawn(), "U": drawn(truncated=True)}}, "another policy", "sample with top_p 1"),
        ({"drawn": {"E": drawn(temperatures=(0.7, 0.7)), "U": drawn()}}, "another policy", "at one temperature"),
        ({"drawn": {"E": drawn(), "U": drawn()}, "ratios": None}, "not known", "store sampling_logps"),
    ],
)
def test_the_origin_of_the_batches_is_told(changes: dict[str, Any], verdict: str, word: str) -> None:
    answer = diagnosis(**changes).answer("stale")
    assert answer.verdict == verdict
    assert word in answer.advice


def test_rows_of_several_steps_are_said() -> None:
    mixed = diagnosis(drawn={"E": drawn(), "U": drawn(steps=(2, 9), temperatures=(0.8, 1.0))})
    assert "U: sampler not recorded, temperatures 0.8 to 1, of steps 2 to 9" in mixed.answer("stale").sentence


def test_a_step_that_is_lost_in_storage_has_both_changes() -> None:
    both = {"exact": -0.014, "stored": 0.002, "of_delta": True}
    found = findings(attribution=None, alone=result(rounding_ratio=0.8, change=-0.014, **both))
    answer = answers_of(found)[6]
    assert answer.verdict == "lost"
    assert "ΔF exact -1.40e-02, as stored +2.00e-03" in answer.sentence
    assert diagnosis().answer("storage").verdict == "kept"
