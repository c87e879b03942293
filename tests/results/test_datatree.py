"""A tree holds a result's own numbers, each with its unit; xarray and ArviZ take it as it is."""

from __future__ import annotations

import math
import sys
from typing import Any

import arviz_base
import arviz_stats
import numpy as np
import pytest
import torch
import xarray

import funcprobe as fp
from funcprobe.errors import MissingExtraError
from funcprobe.estimators.uncertainty import bar
from tests.cases.probes import Case, E
from tests.cases.written_attribution import attribution, words
from tests.cases.written_comparison import comparison
from tests.cases.written_results import RESULTS
from tests.cases.written_sweep import LRS, sweep

ENTROPY = {"entropy": fp.entropy()}


@pytest.fixture(scope="module")
def kept() -> fp.ProbeResult:
    return Case().probe(None, observables=ENTROPY, keep_scores=True)


def test_observables_are_the_readings_along_the_learning_rate() -> None:
    found = sweep()
    group = found.to_datatree()["observables/entropy"]
    assert group["change"].dims == ("lr",)
    assert group["lr"].values.tolist() == list(LRS)
    for name in ("before", "change", "first_order", "second_order", "remainder", "float_error"):
        assert group[name].values.tolist() == [getattr(r, name) for r in found.readings()]
    for end in ("error", "low", "high"):
        assert group[f"remainder_{end}"].values.tolist() == [
            getattr(r.bars["remainder"], end) for r in found.readings()
        ]
    assert group.attrs == {"observable": "entropy", "level": 0.95}


@pytest.mark.parametrize("kind", RESULTS)
def test_every_number_of_observables_and_replicates_has_its_unit(kind: str) -> None:
    tree = RESULTS[kind].to_datatree()
    groups = [node for node in tree.subtree if node.path.startswith(("/observables/", "/replicates/"))]
    assert groups
    for node in groups:
        units = {name: variable.attrs["units"] for name, variable in node.data_vars.items()}
        own = {unit for name, unit in units.items() if not name.startswith("ratio_")}
        assert own == {"units" if node.attrs["observable"] == "kl" else "nats per token"}
        assert {unit for name, unit in units.items() if name.startswith("ratio_")} <= {"1"}
    assert tree.attrs["kind"] == kind
    assert tree.attrs["evaluation_prompts"] == RESULTS[kind].provenance.evaluation.prompts


def test_the_spread_of_replicates_is_the_error_of_the_bar() -> None:
    found = comparison()
    tree = found.to_datatree()
    group = tree["replicates/entropy"]
    prompts = group.sizes["prompt"]
    assert (group["change"].dims, group.attrs["method"]) == (("update", "prompt"), "jackknife")
    for update in found.outcomes:
        error = float(group["change"].sel(update=update).std("prompt")) * math.sqrt(prompts - 1)
        assert error == pytest.approx(found.reading(update).bars["change"].error, rel=1e-12)
    one, other = (group["change"].sel(update=name) for name in found.outcomes)
    paired = float((other - one).std("prompt")) * math.sqrt(prompts - 1)
    assert paired == pytest.approx(found.difference(list(found.outcomes)[1]).error, rel=1e-9)


def test_scores_are_those_that_were_kept(kept: fp.ProbeResult) -> None:
    assert kept.evidence is not None
    tree, mask = kept.to_datatree(), E.completion_mask
    scores = tree["scores"]
    assert scores["logp"].dims == ("sequence", "token")
    cells = {"logp": kept.evidence.anchor.logp, "entropy_after": kept.evidence.after.entropy}
    for name, x in cells.items():
        assert torch.equal(torch.from_numpy(scores[name].values)[mask], x[mask])
        assert np.isnan(scores[name].values[~mask.numpy()]).all()
        assert scores[name].attrs["units"] == "nats"
    assert "logp_tangent" in scores
    assert scores["prompt"].values.tolist() == E.group_ids.tolist()
    by_hand = [E.ids[b, E.prompt_lengths[b] + t].item() for b, t in mask.nonzero().tolist()]
    assert scores["token_id"].values[mask.numpy()].tolist() == by_hand
    assert (scores["token_id"].values[~mask.numpy()] == -1).all()
    named = tree["replicates/entropy"]["prompt"].values
    assert named.tolist() == sorted(set(E.group_ids.tolist()))


def test_a_prompts_replicate_is_the_one_without_that_prompt(kept: fp.ProbeResult) -> None:
    assert kept.evidence is not None
    group = kept.to_datatree()["replicates/entropy"]
    for prompt in group["prompt"].values:
        weight = E.weight * (E.group_ids != int(prompt))
        without = float(kept.evidence.change(ENTROPY["entropy"], weight))
        assert float(group["change"].sel(prompt=prompt)) == pytest.approx(without, rel=1e-9, abs=1e-15)
    sampled = kept.outcome.sampled
    assert sampled is not None
    assert bar(sampled.replicates).error == kept.main.bars["change"].error


def test_parts_of_an_attribution_sum_to_its_own() -> None:
    found = attribution(vocabulary=words(), influence=True, hole=True)
    tree = found.to_datatree()
    assert float(tree["batch"]["contribution"].sum()) == pytest.approx(found.batch.sum(), rel=1e-12)
    assert float(tree["evaluation"]["contribution"].sum()) == pytest.approx(found.evaluation.sum(), rel=1e-12)
    by_prompt = tree["batch"]["contribution"].sum("token").groupby("prompt").sum()
    assert by_prompt.values == pytest.approx(found.columns("prompts")["contribution"])
    assert tree["ledger"]["contribution"].sel(part="momentum") == found.ledger["momentum"]
    assert tree["parameters"]["contribution"].values.tolist() == [part.contribution for part in found.leaves]
    assert tree["parameters"]["parameter"].values.tolist() == [part.name for part in found.leaves]
    assert tree["parameters"]["contribution"].attrs["units"] == found.unit
    assert found.influence is not None
    assert torch.equal(torch.from_numpy(tree["influence"]["influence"].values), found.influence.matrix)
    assert tree["influence"]["influence"].dims == ("prompt", "batch_sequence")


def test_a_slash_in_the_name_of_an_observable_is_no_level_of_the_tree() -> None:
    group = RESULTS["probe"].to_datatree()["observables/rao_blackwell.per_decision.token"]
    assert group.attrs["observable"] == "rao_blackwell/per_decision/token"


def test_without_bars_there_are_no_replicates_and_reverse_mode_has_those_of_the_change() -> None:
    assert "replicates" not in sweep(bars=False).to_datatree().children
    assert list(sweep(mode="reverse").to_datatree()["replicates/entropy"].data_vars) == ["change"]


def test_a_bootstrap_has_draws_and_not_prompts() -> None:
    group = Case().probe(None, observables=ENTROPY, bars="bootstrap", seed=1).to_datatree()["replicates/entropy"]
    assert group.attrs["method"] == "bootstrap"
    assert group["change"].dims == ("draw",)


@pytest.mark.parametrize("kind", RESULTS)
def test_arviz_takes_the_tree(kind: str) -> None:
    tree = RESULTS[kind].to_datatree()
    assert isinstance(tree, xarray.DataTree)
    assert arviz_base.convert_to_datatree(tree) is tree
    for name in tree["replicates"].children if "replicates" in tree.children else ():
        assert "ci_bound" in arviz_stats.hdi(tree["replicates"], group=name, dim="prompt").sizes
        taken = arviz_base.extract(tree["replicates"], group=name, sample_dims="prompt")
        assert taken.equals(tree[f"replicates/{name}"].to_dataset())
    simple: tuple[Any, ...] = (str, int, float)  # what netCDF and Zarr can keep
    assert all(isinstance(x, simple) for node in tree.subtree for x in node.attrs.values())


def test_without_xarray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(MissingExtraError, match=r"a DataTree needs the package 'xarray', .*funcprobe\[arviz\]"):
        sweep().to_datatree()
