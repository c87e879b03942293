"""The last answer of a diagnosis: paired differences, and their price in reward."""

from __future__ import annotations

import math

from funcprobe.results.diagnosis_remedies import REWARD, differences_of, what_would_change_it
from tests.cases.written_comparison import comparison
from tests.cases.written_diagnosis import LAWS, findings


def test_half_of_a_fall_is_a_remedy_with_its_price() -> None:
    found = findings()
    compared = found.comparison
    assert compared is not None
    answer = what_would_change_it(found)
    assert answer.verdict == "half the lr"
    assert answer.number == compared.difference("half the lr")
    assert "least loss of reward" in answer.advice
    price = compared.difference("half the lr", REWARD)
    assert f"(reward {price.value:+.1e} ± {price.error:.1e})" in answer.sentence


def test_without_rewards_the_price_is_not_known() -> None:
    laws = {name: law for name, law in LAWS.items() if name != REWARD}
    compared = comparison({"as it is": 1e-5, "half the lr": 5e-6}, laws=laws)
    assert differences_of(compared, REWARD) == {}
    assert "its price is not known" in what_would_change_it(findings(comparison=compared)).advice


def test_what_cannot_be_told_is_no_remedy() -> None:
    same = comparison({"as it is": 1e-5, "Clip-Cov": 1e-5}, laws=LAWS)
    answer = what_would_change_it(findings(comparison=same))
    assert answer.verdict == "none can be told"
    assert "Clip-Cov changes nothing" in answer.sentence
    unknown = what_would_change_it(findings(comparison=None, missing={"comparison": "the update has no learning rate"}))
    assert (unknown.verdict, unknown.sentence) == ("not known", "The update has no learning rate.")


def test_a_difference_that_float_errors_hide_is_told_by_first_order() -> None:
    # 0.01 % apart: ΔF differs by 2e-7, of which the float errors of both, 5e-8, are more than a tenth
    compared = comparison({"as it is": 1e-4, "bonus": 1.0001e-4}, laws=LAWS)
    assert math.isinf(compared.difference("bonus").error)
    assert differences_of(compared)["bonus"] == compared.difference("bonus", quantity="first_order")
