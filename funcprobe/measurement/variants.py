"""The handful of variants of an update that are tried against a change of entropy, and why one does not apply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from funcprobe.errors import collected_notes
from funcprobe.measurement.drawn import Ratios
from funcprobe.measurement.update import Update
from funcprobe.objectives.policy_gradient import PolicyGradient
from funcprobe.objectives.variants import clip_cov, drop_negatives, entropy_bonus
from funcprobe.types import Objective

#: The update itself among its variants.
AS_IT_IS = "as it is"

#: The upper clip range of clip-higher (DAPO, arXiv 2503.14476).
CLIP_HIGHER = 0.28


class Variants(NamedTuple):
    """Updates by name, the update itself first, and why others were left out."""

    updates: dict[str, Update]
    left_out: dict[str, str]


def variants_of(update: Update, ratios: Ratios | None, lr: float | None) -> Variants:
    """Return the update with its variants: half the learning rate, and changes of its objective where they can act.

    `ratios` are those of U, without which every ratio is 1; `lr` is the learning rate that the step takes.
    """
    found = Variants({AS_IT_IS: update}, {})
    if update.rule is None or not lr:
        found.left_out["half the lr"] = "the update has no learning rate"
        return found
    found.updates["half the lr"] = update.at(lr / 2)
    objective = None if update.step is None else update.step.objective
    for name, (make, why_not) in _CHANGES.items():
        why = _why_not(update, objective) or why_not(update, ratios)
        if why is not None:
            found.left_out[name] = why
            continue
        assert isinstance(objective, PolicyGradient)
        found.updates[name] = update.vary(objective=make(objective))
    return found


def _why_not(update: Update, objective: Objective | None) -> str | None:
    if update.batch is None:
        return "the update knows no tokens of U"
    return None if isinstance(objective, PolicyGradient) else "the objective is one of your own"


def _never(update: Update, ratios: Ratios | None) -> None:
    """Find nothing against a variant."""


def _clipped_by_nothing(update: Update, ratios: Ratios | None) -> str | None:
    objective = _objective(update)
    if objective.surrogate != "clip":
        return f"{objective.name} does not clip"
    high = _high(objective)
    if high >= CLIP_HIGHER:
        return f"epsilon_high is {high:g} already"
    if ratios is None:
        return "every ratio is 1, where clipping does nothing"
    if objective.ratio == "token" and ratios.largest <= 1 + high:
        return f"no ratio is above {1 + high:g}, where clipping begins"
    return None


def _without_negatives(update: Update, ratios: Ratios | None) -> str | None:
    assert update.batch is not None
    with collected_notes("objective"):  # they were told when the gradient was taken
        advantages = _objective(update).prepare(update.batch).advantages
    negative = advantages is not None and bool((advantages < 0).any())
    return None if negative else "no advantage is below 0"


def _higher(objective: PolicyGradient) -> PolicyGradient:
    return replace(objective, name=f"clip_higher({objective.name})", epsilon_high=CLIP_HIGHER)


def _high(objective: PolicyGradient) -> float:
    return objective.epsilon if objective.epsilon_high is None else objective.epsilon_high


def _objective(update: Update) -> PolicyGradient:
    assert update.step is not None
    assert isinstance(update.step.objective, PolicyGradient)
    return update.step.objective


#: A change of the objective, and why it does not apply.
_Change = tuple[Callable[[PolicyGradient], PolicyGradient], Callable[[Update, Ratios | None], str | None]]

_CHANGES: dict[str, _Change] = {
    "entropy bonus": (entropy_bonus, _never),
    "clip-higher": (_higher, _clipped_by_nothing),
    "Clip-Cov": (clip_cov, _never),
    "drop negatives": (drop_negatives, _without_negatives),
}
