"""A step without some tokens is the step on the loss in which they have no weight."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

import funcprobe as fp
from funcprobe import engine
from funcprobe.attribution.counterfactual import Resteps, correlation, rank_correlation, without
from funcprobe.attribution.step_parts import StepParts
from funcprobe.engine.clock import Clock
from funcprobe.engine.passes import Passes
from tests.cases.probes import Case, E


def parts_of(case: Case) -> StepParts:
    update = case.update()
    return StepParts.of(update, update.move()[0], None, "additive")


@pytest.mark.parametrize("seed", [0, 1])
def test_the_gradient_without_tokens_is_that_of_a_loss_without_their_weights(seed: int) -> None:
    parts = parts_of(Case())
    mask = parts.prepared.completion_mask
    drop = (torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.3) & mask
    assert parts.prepared.token_weights is not None
    lighter = parts.prepared._replace(token_weights=parts.prepared.token_weights * ~drop)
    oracle = engine.gradient(parts.step.objective, parts.step.policy, parts.params, lighter, as_training=True)
    for name, g in without(parts, drop).items():
        assert g is not None
        # float64 sums of the same terms in another order
        torch.testing.assert_close(g, oracle.gradient[name], rtol=1e-9, atol=1e-12)
    assert without(parts, torch.zeros_like(mask)) is parts.gradient


def test_the_whole_step_changes_what_a_probe_says_and_no_tokens_at_all_leave_momentum() -> None:
    case = Case()
    observable = fp.entropy()
    passes = Passes.over(case.policy, E, {"entropy": observable}, None, None, Clock())
    resteps = Resteps.of(parts_of(case), passes, observable)
    probed = fp.probe(case.update(), E, method="difference", mode="reverse")
    assert resteps.change() == pytest.approx(probed.main.change, rel=1e-9)
    nothing = case.update(batch=case.update().batch._replace(advantages=torch.zeros(12, dtype=torch.float64)))  # type: ignore[union-attr]
    with pytest.warns(fp.errors.FuncprobeWarning, match="All advantages are zero"):
        still = fp.probe(nothing, E, method="difference", mode="reverse").main.change
    assert resteps.change(resteps.parts.prepared.completion_mask) == pytest.approx(still, rel=1e-6)


def test_correlations_are_those_of_scipy() -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randint(4, (20,), generator=g).double()  # with ties
    y = x + torch.randn(20, generator=g, dtype=torch.float64)
    assert correlation(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert correlation(torch.ones(3), torch.arange(3.0)) != correlation(torch.ones(3), torch.arange(3.0))  # nan
