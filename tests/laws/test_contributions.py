"""Contributions against per-sample gradients one at a time, hand-written optimizers and finite differences."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import funcprobe as fp
from funcprobe import tree
from funcprobe.objectives.variants import entropy_bonus
from funcprobe.types import Params
from tests.cases.attributions import Stepped, holed
from tests.cases.probes import E, U
from tests.cases.tables import LR, OBSERVABLES
from tests.oracles import attribution as oracle
from tests.oracles import losses

#: Objectives by name: what funcprobe is given, and the options of the loops in oracles/losses.py.
LOSSES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "reinforce": (fp.reinforce(), "reinforce", {}),
    "grpo": (fp.grpo(beta=0.3), "grpo", {"beta": 0.3}),
    "dapo": (fp.dapo(epsilon=0.1), "dapo", {"epsilon": 0.1, "epsilon_high": 0.28}),
    "gspo": (fp.gspo(epsilon=0.05, epsilon_high=0.1), "gspo", {"epsilon": 0.05, "epsilon_high": 0.1}),
    "entropy bonus": (entropy_bonus("grpo", entropy_coef=0.2), "grpo", {}),
}

#: Optimizers by name: funcprobe's, and the formula of the oracle for one leaf.
STEPS: dict[str, tuple[Any, Any]] = {
    "sgd": (
        fp.sgd(LR, momentum=0.9, dampening=0.3, weight_decay=0.1),
        lambda theta, g, state: oracle.sgd(theta, state, lr=LR, momentum=0.9, dampening=0.3, decay=0.1),
    ),
    "sgd, nesterov": (
        fp.sgd(LR, momentum=0.8, nesterov=True, weight_decay=0.05),
        lambda theta, g, state: oracle.sgd(theta, state, lr=LR, momentum=0.8, nesterov=True, decay=0.05),
    ),
    "adamw": (
        fp.adamw(LR, weight_decay=0.1),
        lambda theta, g, state: oracle.adam(theta, g, state, lr=LR, decay=0.1),
    ),
    "adam, coupled": (
        fp.adam(LR, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1),
        lambda theta, g, state: oracle.adam(
            theta, g, state, lr=LR, decay=0.1, coupled=True, beta1=0.8, beta2=0.99, eps=1e-6
        ),
    ),
}
BATCH = holed(U)

#: Two ways through one model in float64, with another order of every sum: some hundred roundings of 1e-16.
EXACT = 1e-11


class Held:
    """A case with everything that the oracle has to say of it."""

    def __init__(self, model: str, loss: str, optimizer: str, clip: float | None) -> None:
        made, self.loss_name, self.options = LOSSES[loss]
        pure, formula = STEPS[optimizer]
        self.case = Stepped(model, made, pure, clip, batch=BATCH)
        self.module = copy.deepcopy(self.case.module).eval()
        self.bonus = 0.2 if loss == "entropy bonus" else 0.0
        self.found = self.case.attribute()
        self.whole = self.gradient()
        self.k = oracle.clip(self.whole, clip)
        self.parts = {n: formula(p, self.k * self.whole[n], self.case.state[n]) for n, p in self.case.params.items()}
        functional = fp.anchored(fp.entropy(), self.case.policy, E, self.case.params)
        self.covector: Params = torch.func.grad(functional)(self.case.params)

    def gradient(self, alive: Tensor | None = None) -> Params:
        """Return the gradient of the whole loss, or of the terms of the scores that are alive."""
        u = self.case.batch
        rewards, groups, mask = (x.tolist() for x in (u.rewards, u.group_ids, u.completion_mask))
        advantage = losses.advantages(rewards, groups, "group")

        def loss(logp: Tensor, entropy: Tensor) -> Tensor:
            changes = (losses.entropy_bonus(entropy, self.bonus),) if self.bonus else ()
            return losses.loss(
                self.loss_name, logp, mask, advantage, u.old_logps, u.ref_logps, changes=changes, **self.options
            )

        return oracle.gradient(self.module, u, loss, alive)

    def share(self, row: int, token: int | None = None) -> float:
        """Return what a sequence or token of U contributes."""
        g = self.gradient(oracle.one_row(self.case.batch, row, token))
        return oracle.share(self.covector, self.parts, self.k, g)


@functools.cache
def held(model: str, loss: str, optimizer: str, clip: float | None) -> Held:
    return Held(model, loss, optimizer, clip)


CASES = [
    ("gpt2", "grpo", "adamw", 0.05),
    ("gpt2", "dapo", "sgd", None),
    ("two lines", "gspo", "adamw", None),
    ("two lines", "entropy bonus", "adam, coupled", 0.05),
    ("two lines", "reinforce", "sgd, nesterov", 0.05),
    ("padding row, tied", "grpo", "adamw", 0.05),
    ("padding row", "grpo", "sgd", None),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_update_sequences_and_tokens_are_gradients_taken_one_at_a_time(case: tuple[Any, ...]) -> None:
    h = held(*case)
    total, size = h.found.batch.total, h.found.batch.magnitude()
    for row in range(len(BATCH.ids)):
        assert abs(float(total[row].sum()) - h.share(row)) <= EXACT * size, row
    for row, token in ((1, 0), (4, 2), (7, 1), (int(total.abs().amax(1).argmax()), int(total.abs().amax(0).argmax()))):
        assert abs(float(total[row, token]) - h.share(row, token)) <= EXACT * size, (row, token)
    # the largest is no rounding, and so what is compared is not nothing
    assert float(total.abs().max()) > 0.01 * size
    assert h.found.probe.outcome.info["clip_coefficient"] == pytest.approx(h.k, rel=1e-10)
    assert (h.k < 0.9) == (case[3] is not None)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_momentum_and_weight_decay_are_those_of_the_state_by_hand(case: tuple[Any, ...]) -> None:
    h = held(*case)
    for part in h.found.leaves:
        c, by_hand = h.covector[part.name], h.parts[part.name]
        for found, offset in ((part.momentum, by_hand.momentum), (part.decay, by_hand.decay)):
            terms = c * offset
            assert abs(found - float(terms.sum())) <= EXACT * float(terms.abs().sum()), part.name
    for row, field in (("momentum", "momentum"), ("weight decay", "decay")):
        by_hand_total = sum(float((h.covector[n] * getattr(p, field)).sum()) for n, p in h.parts.items())
        assert h.found.ledger[row] == pytest.approx(by_hand_total, rel=1e-9)
        assert by_hand_total != 0.0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_leaves_are_the_five_lines_leaf_by_leaf(case: tuple[Any, ...]) -> None:
    h = held(*case)
    update = h.case.step(h.case.params, h.case.state, h.case.batch).delta
    assert [part.name for part in h.found.leaves] == list(h.case.params)
    for part in h.found.leaves:
        terms = h.covector[part.name] * update[part.name]
        assert abs(part.contribution - float(terms.sum())) <= EXACT * float(terms.abs().sum()), part.name
        by_hand = h.k * h.parts[part.name].scale * h.whole[part.name] * h.covector[part.name]
        assert abs(part.gradient - float(by_hand.sum())) <= EXACT * float(by_hand.abs().sum()), part.name
        assert part.norm == pytest.approx(float(update[part.name].norm()), rel=1e-12)
        assert part.size == update[part.name].numel()
        assert abs(part.rest) <= EXACT * float(terms.abs().sum()), part.name


@pytest.mark.parametrize("observable", ["rao_blackwell/per_decision/token", "surprisal/sequence/sequence", "collision"])
@pytest.mark.parametrize("model", ["two lines", "gpt2"])
def test_evaluation_tokens_are_cotangents_times_differences(model: str, observable: str) -> None:
    """Step rule: h = 0.1 of a step whose tangents are below 1, so O(h⁴) = 1e-6 of them to the fifth, over 120."""
    case, wanted, evaluation = Stepped(model), OBSERVABLES[observable], holed(E)
    lr = 1e-3
    found = case.attribute(wanted, evaluation=evaluation, lr=lr).evaluation
    update = case.step(case.params, case.state, case.batch, lr).delta

    def at(e: float) -> fp.TokenScores:
        return fp.score(case.policy, tree.axpy(e, update, case.params), evaluation, stats=wanted.stats)

    here = at(0.0)
    c = oracle.cotangents(wanted, here, evaluation)
    fields = {"logp": (c.logp, lambda s: s.logp), "entropy": (c.entropy, lambda s: s.entropy)}
    fields |= {name: (x, lambda s, name=name: s.extra[name]) for name, x in c.extra.items()}
    compared = {n for n, (x, _) in fields.items() if bool(x.any())}
    assert set(found.through) == compared
    for name in compared:
        cotangent, read = fields[name]
        expected = cotangent * oracle.richardson(lambda e, read=read: read(at(e)), 0.1)
        assert float((found.through[name] - expected).abs().max()) <= 1e-8 * float(expected.abs().max()), name
        assert float(expected.abs().max()) > 0.0
