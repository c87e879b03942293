"""One update in its three depths: they agree wherever they overlap, take one gradient, and say what they lack."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

import funcprobe as fp
from funcprobe import tree
from funcprobe.errors import FuncprobeWarning, InputError
from funcprobe.measurement.update import Update
from tests.cases import models
from tests.cases.probes import Case, E, U
from tests.cases.trees import assert_same

LR = 1e-4
OBSERVABLES = {"entropy": fp.entropy(), "reward": fp.expected_reward(), "kl": fp.kl()}


def depths(c: Case, lr: float | None = LR) -> dict[str, Update]:
    """Return one step three times: from a batch, from the gradient on it, and as Δθ with θ′ as it is stored."""
    whole = Update.from_step(c.step, c.params, c.state, U, lr)
    gradient, taken = whole.gradient().gradient, whole.take()
    return {
        "batch": whole,
        "gradient": Update.from_gradient(c.policy, c.optimizer, c.params, c.state, gradient, lr, max_grad_norm=1.0),
        "delta": Update.from_delta(c.policy, c.params, taken.delta, taken.params),
    }


@pytest.mark.parametrize("options", [{}, {"mode": "reverse"}, {"order": 2}, {"method": "path"}], ids=str)
@pytest.mark.parametrize("build", ["two lines", "gpt2", "qwen2, lora"])
def test_three_depths_of_one_step_are_probed_alike(build: str, options: dict[str, Any]) -> None:
    found = {n: fp.probe(u, E, OBSERVABLES, keep_delta=True, **options) for n, u in depths(Case(build)).items()}
    assert list(found) == [u.depth for u in depths(Case(build)).values()]
    for name in ("gradient", "delta"):  # bit for bit: the same arithmetic on the same trees
        assert found[name].readings == found["batch"].readings, name
        assert found[name].health == found["batch"].health
        assert found[name].family == found["batch"].family
        assert_same(found[name].delta, found["batch"].delta)
    assert found["gradient"].lr == LR
    assert found["delta"].lr is None
    assert found["delta"].batch is None
    assert found["delta"].outcome.info == {}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lifted"])
def test_other_verbs_agree_as_far_as_they_go(optimizer: str) -> None:
    made = {"sgd": fp.sgd(LR), "adamw": fp.adamw(LR), "lifted": fp.from_torch(torch.optim.RMSprop, lr=LR)}[optimizer]
    each = depths(Case("gpt2", made), lr=None)
    slopes = [fp.slope(update, E, OBSERVABLES) for update in each.values()]
    assert slopes[0] == slopes[1] == slopes[2]
    seconds = [fp.second_order(update, E) for update in each.values()]
    assert seconds[0] == seconds[1] == seconds[2]
    swept = [fp.sweep(each[name], E, [1e-5, 1e-4], OBSERVABLES) for name in ("batch", "gradient")]
    assert [p.readings for p in swept[0].points] == [p.readings for p in swept[1].points]
    bounds = [fp.largest_lr(each[name], E, max_nonlinearity=0.05, relative=0.5) for name in ("batch", "gradient")]
    assert bounds[0].lr == bounds[1].lr


def test_depths_are_compared_with_one_another() -> None:
    each = depths(Case("gpt2"))
    found = fp.compare(each, E, OBSERVABLES)
    for name, quantity in itertools.product(("gradient", "delta"), ("change", "first_order")):
        # the same scores and tangents: some processors' batched products round by an entry's place among the tangents
        size = abs(getattr(found.outcomes[name].main, quantity))
        assert abs(found.difference(name, quantity=quantity).value) <= 1e-11 * size


def test_a_gradient_is_still_clipped_where_a_bound_is_given() -> None:  # so that the law above can fail
    c = Case("gpt2")
    gradient, sgd = c.update(LR).gradient().gradient, fp.sgd(LR)
    norm, state = float(tree.norm(gradient)), sgd.init(c.params)  # type: ignore[arg-type]
    plain, halved = (
        Update.from_gradient(c.policy, sgd, c.params, state, gradient, max_grad_norm=bound)
        for bound in (None, norm / 2)
    )
    length = [float(tree.norm(update.take().delta)) for update in (plain, halved)]
    assert length[1] == pytest.approx(length[0] / 2, rel=1e-4)  # clipping divides by the norm plus 1e-6


def test_the_gradient_is_taken_once_when_it_is_needed() -> None:
    calls: list[str] = []
    c = Case("two lines").watched(calls)
    update = c.update(LR)
    assert calls == []
    fp.probe(update, E)
    after_one = calls.count("U")
    assert after_one >= 1
    fp.probe(update.at(10 * LR), E)
    fp.sweep(update, E, [LR, 10 * LR])
    fp.compare({"one": update, "two": update.at(2 * LR), "three": c.update(3 * LR)}, E)
    assert calls.count("U") == after_one  # the third was made apart, of the same objective, batch and θ
    calls.clear()
    fp.compare({"one": c.update(LR), "two": c.update(2 * LR)}, E)
    assert calls.count("U") == after_one  # of one objective on one batch at one θ


def test_what_varies_decides_what_is_shared() -> None:
    update = Case("two lines").update(LR)
    update.gradient()
    assert update.vary(lr=2 * LR).shares_gradient(update)
    assert update.vary(optimizer=fp.sgd(LR), opt_state=fp.sgd(LR).init(update.params)).shares_gradient(update)
    assert not update.vary(objective=fp.dapo()).shares_gradient(update)
    assert not update.vary(batch=U._replace(weight=2 * U.weight)).shares_gradient(update)
    assert update.vary(objective=fp.dapo()).step.objective == fp.dapo()  # type: ignore[union-attr]
    assert update.vary(lr=2 * LR).lr == 2 * LR


def test_nothing_that_is_passed_in_changes() -> None:
    c = Case("gpt2")
    before = {name: p.clone() for name, p in c.params.items()}
    for update in depths(c).values():
        fp.probe(update, E)
    assert_same(c.params, before)
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.update().lr = 1.0  # type: ignore[misc]


def test_warnings_of_the_gradient_are_in_every_result() -> None:
    policy, params = fp.from_module(models.gpt2(dropout=0.1))
    step = fp.make_step(policy, fp.grpo(), fp.sgd(LR))
    update = Update.from_step(step, params, step.optimizer.init(params), U)
    for _ in range(2):
        with pytest.warns(FuncprobeWarning, match="Dropout"):
            found = fp.probe(update, E)
        assert {note.kind for note in found.warnings} == {"training only"}


VERBS = {
    "sweep": (lambda update: fp.sweep(update, E, [LR]), "gradient", "A sweep"),
    "largest_lr": (lambda update: fp.largest_lr(update, E, min_ess=0.5), "gradient", "A largest learning rate"),
    "at": (lambda update: update.at(LR), "gradient", "Another learning rate"),
    "attribute": (lambda update: fp.attribute(update, E), "batch", "An attribution"),
    "predict": (lambda update: fp.predict(update), "batch", "A prediction"),
    "vary": (lambda update: update.vary(lr=LR), "batch", "A varied update"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_needs_more_says_so_in_a_sentence(verb: str) -> None:
    ask, least, words = VERBS[verb]
    order = ["delta", "gradient", "batch"]
    for name, update in depths(Case("two lines")).items():
        if order.index(name) < order.index(least):
            with pytest.raises(InputError, match=f"^{words} needs an update that knows .*Update.from_step"):
                ask(update)
        else:
            ask(update)


def test_what_does_not_fit_is_refused() -> None:
    c = Case("two lines")
    some = dict(list(c.params.items())[:1])
    with pytest.raises(InputError, match=r"step is a dict; expected a step, such as make_step"):
        Update.from_step({}, c.params, c.state, U)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        Update.from_delta(c.policy, c.params, some)
    with pytest.raises(InputError):
        Update.from_gradient(c.policy, c.optimizer, c.params, c.state, some)
    with pytest.raises(InputError, match="max_grad_norm"):
        Update.from_gradient(c.policy, c.optimizer, c.params, c.state, c.params, max_grad_norm=-1.0)
    with pytest.raises(InputError, match="another policy or another θ"):
        fp.compare({"one": c.update(), "two": Case("two lines").update()}, E)
    with pytest.raises(InputError, match="'one' is a Step, no update"):
        fp.compare({"one": c.step}, E)  # type: ignore[dict-item]
