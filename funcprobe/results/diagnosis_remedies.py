"""The last answer of a diagnosis: the variant that counteracts the change, and its price, by paired differences."""

from __future__ import annotations

import math

from funcprobe.estimators.uncertainty import Bar
from funcprobe.results import diagnosis_rules as rules
from funcprobe.results.comparison import Comparison
from funcprobe.results.findings import Answer, Findings
from funcprobe.results.words import with_error

_QUESTION = "What would change it, and at what price?"

#: The observable that prices are paid in.
REWARD = "reward"


def what_would_change_it(found: Findings) -> Answer:
    """Say which variant of the step counteracts the change, by paired differences, and its price in reward."""
    compared = found.comparison
    if compared is None or len(compared.outcomes) < 2:
        why = found.missing.get("comparison", "no variant applies to this update")
        return Answer(_QUESTION, rules.NOT_KNOWN, f"{why[:1].upper()}{why[1:]}.", _WITH_BATCH)
    gains, prices = differences_of(compared), differences_of(compared, REWARD)
    best = rules.remedy(compared.reading(compared.baseline).change, gains, prices)
    said = "; ".join(_told(name, bar, prices.get(name)) for name, bar in gains.items())
    unit = compared.reading(compared.baseline).unit
    sentence = f"More than the step as it is, {unit}: {said}."
    if best is None:
        return Answer(_QUESTION, "none can be told", sentence, _MORE)
    return Answer(_QUESTION, best, sentence, _advice(best, prices), gains[best])


def differences_of(compared: Comparison, observable: str | None = None) -> dict[str, Bar]:
    """Return by how much every variant changes an observable more than the baseline; empty where it is not measured.

    It is measured, or, where float errors of both changes hide it, by first order, in which nothing is subtracted.
    """
    if observable is not None and observable not in compared.observables:
        return {}
    variants = [name for name in compared.outcomes if name != compared.baseline]
    return {name: _difference(compared, name, observable) for name in variants}


def _difference(compared: Comparison, name: str, observable: str | None) -> Bar:
    measured = compared.difference(name, observable)
    if math.isfinite(measured.error):
        return measured
    predicted = compared.difference(name, observable, quantity="first_order")
    return predicted if math.isfinite(predicted.error) else measured


def _told(name: str, gain: Bar, price: Bar | None) -> str:
    if gain.value == gain.error == 0:
        return f"{name} changes nothing"
    paid = "" if price is None else f" (reward {with_error(price.value, price, digits=1)})"
    return f"{name} {with_error(gain.value, gain, digits=1)}{paid}"


def _advice(best: str, prices: dict[str, Bar]) -> str:
    if best not in prices:
        return f"{best}; E has no rewards, so that its price is not known."
    if rules.is_told(prices[best]) and prices[best].value < 0:
        return f"{best}, which counteracts the change at the least loss of reward per step."
    return f"{best}, which counteracts the change at no loss of reward that these rollouts tell."


_MORE = "more prompts in E, or variants of your own in compare: none of these is told from the step as it is."
_WITH_BATCH = "make the update from its batch: run.update(objective, U)."
