"""Validation: rankings on rollouts of their own, true re-steps, and refusals before any pass."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import funcprobe as fp
from funcprobe.attribution.rankings import METHODS
from funcprobe.data.rollouts import members, take
from funcprobe.errors import InputError
from tests.cases.probes import Case, E, U

FEW: dict[str, Any] = {"shares": (0.1, 0.3), "random": 2, "subsets": 4}


def test_the_effect_is_that_of_the_true_step_without_the_tokens_ranked_first() -> None:
    case = Case(optimizer=fp.sgd(1e-2))
    case.step = dataclasses.replace(case.step, max_grad_norm=None)
    fit = take(E, torch.arange(4))
    apart = take(E, torch.arange(4, 10))
    found = fp.validate(case.update(), apart, fit=fit, methods=["additive"], **FEW)
    assert found.base == pytest.approx(fp.probe(case.update(), apart, method="difference").main.change, rel=1e-9)
    total = fp.attribute(case.update(), fit).batch.total
    number = next(d.number for d in found.drops if d.share == 0.3)
    ranked = torch.where(U.completion_mask, total, torch.inf).flatten().argsort()[:number]
    drop = torch.zeros(total.numel(), dtype=torch.bool).index_fill(0, ranked, True).view_as(total)

    class Lighter:
        """The loss without the weights of those tokens."""

        name, separable, stats = "lighter", True, {}

        def prepare(self, rollouts: fp.Rollouts) -> fp.Rollouts:
            prepared = case.step.objective.prepare(rollouts)
            return prepared._replace(token_weights=prepared.token_weights * ~drop)

        def __call__(self, scores: Any, rollouts: fp.Rollouts) -> Any:
            return case.step.objective(scores, rollouts)

    lighter = fp.probe(case.update().vary(objective=Lighter()), apart, method="difference").main.change
    assert found.effect("additive", "lowest", 0.3) == pytest.approx(lighter - found.base, rel=1e-6)


def test_without_fit_every_second_prompt_ranks_and_the_others_measure() -> None:
    case = Case()
    found = fp.validate(case.update(), E, units="prompts", methods=["discriminant", "sgd"], **FEW)
    prompts = [rows for _, rows in members(E, "prompts")]
    assert (found.fit.prompts, found.evaluation.prompts) == (3, 2)
    others = take(E, torch.cat(prompts[1::2]).sort().values)
    assert found.base == pytest.approx(fp.probe(case.update(), others, method="difference").main.change, rel=1e-9)
    assert found.methods == ("discriminant", "sgd")
    assert not found.warnings
    again = fp.validate(case.update(), E, units="prompts", methods=["discriminant", "sgd"], **FEW)
    assert again.rows() == found.rows()


def test_every_method_is_tried_and_the_same_prompts_are_cautioned_against() -> None:
    with pytest.warns(fp.errors.FuncprobeWarning, match="fit and E share prompts"):
        found = fp.validate(Case().update(), E, fit=E, **FEW)
    assert found.methods == tuple(METHODS)
    assert [w.kind for w in found.warnings] == ["overlap"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": ()}, "shares is"),
        ({"shares": (0.0,)}, "expected numbers between 0 and 1"),
        ({"units": "rows"}, "Unknown units 'rows'"),
        ({"random": 0}, "random is 0; expected a whole number of at least 1"),
        ({"subsets": -1}, "subsets is -1"),
        ({"methods": ["luck"]}, "Unknown methods 'luck'"),
        ({"fit": 3}, "fit is an int; expected Rollouts"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fp.validate(Case().update(), E, **options)


def test_an_update_without_a_batch_and_one_prompt_are_refused() -> None:
    case = Case()
    delta = case.update().take().delta
    with pytest.raises(InputError, match="A validation needs an update that knows the tokens of U"):
        fp.validate(fp.Update.from_delta(case.policy, case.params, delta), E)
    with pytest.raises(InputError, match=r"give fit="):
        fp.validate(case.update(), take(E, torch.arange(2)))
