"""Beyond the first order: curvature by two routes, and ΔF without cancellation, held against float64."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe import engine, tree
from funcprobe.engine import kernels
from funcprobe.engine.clock import Clock
from funcprobe.engine.passes import Passes
from funcprobe.errors import (
    EffectiveSampleSizeError,
    ForwardModeError,
    FuncprobeWarning,
    InputError,
    NumericsError,
)
from funcprobe.measurement import second_order as expansion
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.path import path, subtraction_error
from funcprobe.measurement.second_order import _beginnings
from funcprobe.report.importance_weights import plot_weights
from funcprobe.types import Params
from tests.cases import models, tables
from tests.cases.measured import E, U, case
from tests.cases.probes import prompted
from tests.cases.tables import observables

OBSERVABLES = observables("entropy", "surprisal", "reward", "length", "kl", "kl before")
by_name = pytest.mark.parametrize("name", OBSERVABLES)


@by_name
@pytest.mark.parametrize("build", ["two lines", "gpt2"])
def test_the_third_order_remains(build: str, name: str) -> None:
    policy, params = fp.from_module(tables.POLICIES[build]())
    v, o = models.direction(params), OBSERVABLES[name]
    found = fp.second_order(fp.Update.from_delta(policy, params, v), E, o)
    H = fp.anchored(o, policy, E, params)
    # at ε = 2^-2 … 2^-5 the fourth order is below some per cent of the third, rounding (1e-16/ε³) far below
    steps = [2.0**-k for k in (2, 3, 4, 5)]
    expansion = [e * found.first_order + e**2 * found.second_order for e in steps]
    left = [abs(float(H(tree.axpy(e, v, params)) - H(params)) - at) for e, at in zip(steps, expansion, strict=True)]
    x, y = torch.tensor(steps).log(), torch.tensor(left).log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    assert abs(slope - 3) <= 0.15, left
    assert found.mode == "forward"
    assert found.disagreement < 1e-10  # float64 throughout
    assert abs(found.second_order) > 1e-8


@by_name
def test_forward_over_reverse_says_the_same(name: str) -> None:
    policy, params = fp.from_module(models.gpt2())
    v = models.direction(params)
    one, two = (
        fp.second_order(fp.Update.from_delta(policy, params, v), E, OBSERVABLES[name], mode=m, microbatch=4)
        for m in ("forward", "reverse")
    )
    assert (one.mode, two.mode) == ("forward", "reverse")
    assert two.second_order == pytest.approx(one.second_order, rel=1e-9)
    assert two.first_order == pytest.approx(one.first_order, rel=1e-12)


def test_crossover_is_where_both_orders_are_equal() -> None:
    result = case().probe(order=2)
    assert result.crossover_lr is not None
    assert result.linear_until_lr is not None
    at = case().probe(order=2, lr=result.crossover_lr)
    assert at.second_order is not None
    # Δθ of AdamW is proportional to the learning rate, to the rounding of an update kept in float32
    assert abs(at.second_order) == pytest.approx(abs(at.first_order), rel=1e-5)
    near = case().probe(order=2, lr=result.linear_until_lr)
    assert near.nonlinearity == pytest.approx(0.05, rel=0.2)  # up to the third order
    assert case().probe().crossover_lr is None


def test_a_divergence_has_curvature_only() -> None:
    result = case().probe(observables=OBSERVABLES, order=2, lr=1e-5)
    for name in ("kl", "kl before"):
        reading = result.readings[name]
        assert reading.first_order == 0.0
        assert reading.crossover == 0.0
        # ΔKL = δ₂ (1 + O(lr)): at this step the log-ratios are a few thousandths
        assert reading.change == pytest.approx(reading.second_order, rel=0.01)
        assert f"entropy per {name}" not in result.exchange
    assert {"entropy per reward", "entropy per length"} <= result.exchange.keys()


class Wrong(nn.Module):
    """A layer whose second forward derivative torch gets wrong once its norm is not spelled out."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, x.shape[-1:])  # the function itself, which no mode replaces


def test_a_wrong_second_derivative_is_found_out_and_replaced() -> None:
    with models.seeded(3):
        module = nn.Sequential(
            nn.Embedding(models.VOCABULARY, 6), nn.Linear(6, 6), Wrong(), nn.Tanh(), nn.Linear(6, models.VOCABULARY)
        ).double()
    policy, params = fp.from_module(module)
    v, o = models.direction(params, 0.1), fp.entropy()
    found = fp.second_order(fp.Update.from_delta(policy, params, v), E, o)
    assert found.disagreement > 1e-3
    assert found.mode == "reverse"
    H = fp.anchored(o, policy, E, params)
    e = 2.0**-7
    plus, middle, minus = (float(H(tree.axpy(c, v, params))) for c in (e, 0.0, -e))
    assert 2 * found.second_order == pytest.approx((plus - 2 * middle + minus) / e**2, rel=1e-3)
    with pytest.raises(NumericsError, match="a wrong second derivative; use mode='auto' or 'reverse'"):
        fp.second_order(fp.Update.from_delta(policy, params, v), E, o, mode="forward")
    with pytest.raises(InputError, match="Unknown mode 'both'"):
        fp.second_order(fp.Update.from_delta(policy, params, v), E, o, mode="both")


def test_layer_norm_is_spelled_out_for_that_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break it once: without the spelling the check finds torch's fault in a GPT-2."""
    policy, params = fp.from_module(models.gpt2())
    v = models.direction(params)
    assert fp.second_order(fp.Update.from_delta(policy, params, v), E, fp.entropy()).mode == "forward"
    monkeypatch.setattr(kernels, "_layer_norm", torch.layer_norm)
    assert fp.second_order(fp.Update.from_delta(policy, params, v), E, fp.entropy()).mode == "reverse"


def test_a_probe_takes_the_reliable_route_too(monkeypatch: pytest.MonkeyPatch) -> None:
    straight = case().probe(order=2)
    monkeypatch.setattr(kernels, "_layer_norm", torch.layer_norm)
    detour = case().probe(order=2)
    assert detour.second_order == pytest.approx(straight.second_order, rel=1e-9)
    assert any("forward over reverse" in note for note in detour.notes)
    assert "second_order" in straight.main.bars
    assert "second_order" not in detour.main.bars


@functools.cache
def narrow_and_wide() -> tuple[tuple[fp.Policy, Params], tuple[fp.Policy, Params]]:
    """Return one GPT-2 in float32, and in float64: the second is the truth about the first."""
    module = models.gpt2(torch.float32)
    return fp.from_module(module), fp.from_module(copy.deepcopy(module).double())


def along_path(eta: float, nodes_from: str) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Return (ΔF, truth, Σ|terms|) by name for a float32 model at a step of the given size."""
    (policy, params), (wide, wide_params) = narrow_and_wide()
    v = models.direction(wide_params, eta)
    narrow_v = {name: x.float() for name, x in v.items()}
    exact = {name: x.double() for name, x in narrow_v.items()}  # the very same direction
    rollouts = models.rollouts(40, seed=3)
    passes = Passes.over(policy, rollouts, OBSERVABLES, None, None, Clock())
    along = passes.directional(params, narrow_v, "E")
    if nodes_from == "path":
        after = path(passes, params, narrow_v, along, OBSERVABLES, 1e-5).scores
    else:
        after = passes.scores({n: (p.double() + exact[n]).float() for n, p in params.items()}, "E", order=1)
    evidence = Evidence(rollouts, along.scores, after, along)
    truth = Evidence(
        rollouts,
        engine.scores(wide, wide_params, rollouts, order=1),
        engine.scores(wide, tree.add(wide_params, exact), rollouts, order=1),
    )
    return (
        {name: float(evidence.change(o)) for name, o in OBSERVABLES.items()},
        {name: float(truth.change(o)) for name, o in OBSERVABLES.items()},
        {name: truth.magnitude(o) for name, o in OBSERVABLES.items()},
    )


@pytest.mark.parametrize("eta", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
def test_a_path_in_float32_is_as_good_as_float64(eta: float) -> None:
    found, truth, size = along_path(eta, "path")
    for name in OBSERVABLES:
        # the promise of the design; eta is the size of every entry of Δθ here, a hundred times an AdamW step's at lr
        # 1e-4 … 1e-9. The truth itself, a float64 subtraction, is off by 1e-16/ΔF: below 1e-8 even at 1e-7.
        tolerance = 1e-5 if not name.startswith("kl") else 2e-5  # a square of differences doubles their error
        assert abs(found[name] - truth[name]) <= tolerance * size[name], (name, found[name], truth[name])


def test_subtraction_in_float32_is_not() -> None:
    found, truth, size = along_path(1e-7, "subtraction")
    assert abs(found["entropy"] - truth["entropy"]) > 1e-2 * size["entropy"]
    assert abs(found["kl"] - truth["kl"]) > 1e-4 * size["kl"]


#: Sequences that share three prompts, and so the rounding of their first tokens, and sequences that share nothing.
SHARED_OR_NOT = {"three prompts": models.rollouts(40, seed=3), "a prompt each": prompted(40, 1, seed=3)}


@pytest.mark.parametrize("rollouts", SHARED_OR_NOT.values(), ids=SHARED_OR_NOT)
@pytest.mark.parametrize("eta", [1e-3, 1e-5, 1e-7])
def test_the_error_of_a_subtraction_is_estimated(eta: float, rollouts: fp.Rollouts) -> None:
    """Over four observables and four directions the true error is below the estimate, and not far below it."""
    (policy, params), (wide, wide_params) = narrow_and_wide()
    start, ratios = engine.scores(wide, wide_params, rollouts, order=1), []
    for seed in range(4):
        v = {n: x.float() for n, x in models.direction(wide_params, eta, seed=seed).items()}
        stored = {n: (p.double() + v[n].double()).float() for n, p in params.items()}
        # the very step that was stored, so that rounding of θ′ is no part of the error
        exact = {n: stored[n].double() - p.double() for n, p in params.items()}
        along = engine.directional(policy, params, {n: x.float() for n, x in exact.items()}, rollouts)
        after = engine.scores(policy, stored, rollouts, order=1)
        evidence = Evidence(rollouts, along.scores, after, along)
        end = engine.scores(wide, {n: p.double() for n, p in stored.items()}, rollouts, order=1)
        truth = Evidence(rollouts, start, end)
        for name in ("entropy", "surprisal", "reward", "length"):
            o = OBSERVABLES[name]
            off = abs(float(evidence.change(o) - truth.change(o)))
            estimate = subtraction_error(evidence, o, torch.finfo(torch.float32).eps)
            # Small steps: Σ c r is error and curvature, so the error is at most both, whatever the kernels; 5 % for r²
            # and the change of c. Large ones: a score may be off by the cap and typically is by a sixth of it; a sum
            # over sequences that round alike has come out at up to 3.5 times its random walk. 3.5/6 is below 1.
            curvature = abs(float(truth.change(o) - evidence.first_order(o))) if eta < 1e-4 else 0.0
            assert off <= 1.05 * estimate + curvature, (name, seed, off, estimate, curvature)
            ratios.append(off / estimate)
    # one error in a hundred is by chance a hundredth of its estimate; the middle one of sixteen is not
    assert sorted(ratios)[len(ratios) // 2] > 0.01, ratios


def test_auto_takes_the_path_where_subtraction_fails() -> None:
    policy, params = fp.from_module(models.gpt2(torch.float32))
    optimizer = fp.adamw(1e-3)
    step = fp.make_step(policy, fp.grpo(), optimizer)
    update = fp.Update.from_step(step, params, optimizer.init(params), U)
    large, small = (fp.probe(update.at(lr), E) for lr in (None, 1e-8))
    assert (large.main.method, small.main.method) == ("difference", "path")
    assert large.main.nodes == 0
    assert small.main.nodes >= 1
    assert small.change == pytest.approx(small.first_order, rel=1e-4)
    assert small.main.subtraction is not None
    assert small.main.float_error is not None
    assert small.main.float_error < 1e-3 * abs(small.change)
    forced = fp.probe(update.at(1e-8), E, method="difference")
    assert forced.change == small.main.subtraction
    assert forced.main.float_error > 1e-3 * abs(forced.change)
    # how far off one subtraction happens to be is a matter of kernels; that it is within its estimate is not
    assert abs(forced.change - small.change) <= 1.05 * forced.main.float_error
    by_path = fp.probe(update, E, method="path")
    assert by_path.main.subtraction == large.main.subtraction  # a path is held against two evaluations
    assert by_path.change == pytest.approx(large.change, rel=1e-3)
    assert by_path.main.nodes > small.main.nodes  # a longer step bends more


def test_more_nodes_for_more_curvature_and_an_honest_end() -> None:
    c = case()
    with pytest.raises(
        NumericsError, match=r"reached \d\.\de-\d+ of the size of its terms with 12 nodes; the tolerance"
    ):
        c.probe(method="path", tolerance=1e-300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FuncprobeWarning)  # of the ESS, at so large a step
        far = c.probe(method="path", lr=0.02, tolerance=1e-3, ess_threshold=0.0)
    near = c.probe(method="path", lr=1e-6, tolerance=1e-3)
    assert near.main.nodes == 1
    assert far.main.nodes > 1
    assert far.main.float_error is not None


def test_paths_and_curvature_need_forward_mode() -> None:
    c = case("two lines")
    for options in ({"order": 2}, {"method": "path"}):
        with pytest.raises(InputError, match="is made of forward-mode passes"):
            c.probe(mode="reverse", **options)


def test_a_model_without_forward_mode_has_neither() -> None:
    class Glu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.glu(torch.cat([x, x], dim=-1))

    with models.seeded(1):
        module = nn.Sequential(nn.Embedding(7, 4), Glu(), nn.Linear(4, 7)).double()
    policy, params = fp.from_module(module)
    with pytest.raises(ForwardModeError, match=r"The module '1' \(Glu\)"):
        fp.second_order(fp.Update.from_delta(policy, params, models.direction(params)), E, fp.entropy())


def test_scores_of_a_path_are_those_of_the_end() -> None:
    policy, params = fp.from_module(models.gpt2())
    v = models.direction(params, 1e-2)
    passes = Passes.over(policy, E, OBSERVABLES, None, None, Clock())
    along = passes.directional(params, v, "E")
    found = path(passes, params, v, along, OBSERVABLES, 1e-11)
    end = engine.scores(policy, tree.add(params, v), E, order=1)
    assert found.converged
    # Gauss–Legendre that agrees to 1e-11 of F agrees to some 1e-9 of each score in float64
    torch.testing.assert_close(found.scores.logp, end.logp, rtol=0, atol=1e-9)
    assert math.isclose(found.reached, max(found.reached, 0.0))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_anchor_and_end_are_scored_in_one_arithmetic(order: Literal[1, 2], dtype: torch.dtype) -> None:
    policy, params = fp.from_module(models.gpt2(dtype))
    step = fp.make_step(policy, fp.grpo(), fp.sgd(0.0))
    with pytest.warns(FuncprobeWarning, match="The step is zero"):
        found = fp.probe(
            fp.Update.from_step(step, params, step.optimizer.init(params), U), E, order=order, method="difference"
        )
    assert found.change == 0.0  # the same parameters, to the last bit


def test_the_check_of_the_second_order_is_nobodys_observable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A divergence has no cotangents at the anchor, and hides no fault by that."""
    monkeypatch.setattr(kernels, "_layer_norm", torch.layer_norm)
    one = case().probe(order=2, observables={"entropy": fp.entropy(), "kl": fp.kl()})
    two = case().probe(order=2, observables={"kl": fp.kl(), "entropy": fp.entropy()})
    assert any("forward over reverse" in note for note in two.notes)
    assert two.readings["entropy"].second_order == one.readings["entropy"].second_order


def test_the_check_looks_at_beginnings_alone() -> None:
    policy, params = fp.from_module(models.gpt2())
    v = models.direction(params)
    rows, few = _beginnings(E)
    assert few.ids.shape[0] == 4
    assert set(rows.tolist()) <= set(E.attention_mask.sum(1).argsort(stable=True)[:4].tolist())
    long = models.rollouts(6, seed=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expansion, "CHECKED_TOKENS", 2)
        cut = _beginnings(long)[1]
        assert cut.completion_mask.shape[1] == 2
        found = fp.second_order(fp.Update.from_delta(policy, params, v), long, fp.entropy())
    assert found.mode == "forward"
    assert found.disagreement < 1e-10


def test_half_precision_takes_no_path_it_could_not_walk() -> None:
    policy, params = fp.from_module(models.gpt2(torch.bfloat16))
    optimizer = fp.adamw(1e-4)
    step = fp.make_step(policy, fp.grpo(), optimizer)
    seen: list[str] = []
    run = functools.partial(fp.probe, fp.Update.from_step(step, params, optimizer.init(params), U), E)
    found = run(progress=lambda what, done, total: seen.append(what))
    assert found.main.method == "difference"
    assert "E along the path" not in seen
    assert any("too coarse for a path" in note for note in found.notes)
    with pytest.raises(NumericsError, match="load the model in a wider dtype"):
        run(method="path")


def test_tangents_of_float16_do_not_vanish_with_the_step() -> None:
    policy, params = fp.from_module(models.gpt2(torch.float16))
    wide = {n: p.float() for n, p in params.items()}
    small = models.direction(wide, 1e-9)  # float16 ends at 6e-8
    large = {n: v * 2.0**20 for n, v in small.items()}
    one, two = (engine.directional(policy, params, v, E).tangents.logp for v in (small, large))
    assert float(one.abs().max()) > 0
    torch.testing.assert_close(one * 2.0**20, two, rtol=1e-6, atol=0)


def test_what_does_not_move_reads_zero() -> None:
    even = E._replace(rewards=torch.ones(len(E.ids), dtype=torch.float64))
    seen: list[str] = []
    found = case().probe(
        evaluation=even,
        observables={"entropy": fp.entropy(), "reward": fp.expected_reward()},
        progress=lambda what, done, total: seen.append(what),
    )
    reward = found.readings["reward"]
    assert (reward.change, reward.first_order, reward.bars) == (0.0, 0.0, {})
    assert "E along the path" not in seen  # whose rounding would have been chased in vain
    assert found.exchange == {}
    assert not any("rollouts.weight" in caveat for caveat in reward.caveats)


def test_every_observable_is_judged_by_its_own_weights() -> None:
    given = {"before": fp.kl("before"), "reward": fp.expected_reward()}
    with pytest.raises(EffectiveSampleSizeError):
        case().probe(lr=0.5, observables=given, on_low_ess="raise", method="difference", ess_threshold=0.9)
    result = case().probe(lr=1e-2, observables=given, method="difference")
    share = result.health.ess_sequence / result.health.ess_base
    assert any("effective sample" in c for c in result.readings["reward"].caveats) == (share < 0.9)
    assert not any("effective sample" in c for c in result.readings["before"].caveats)  # a plain mean uses all


def test_statistics_of_one_name_are_one() -> None:
    def using(power: int) -> fp.estimators.custom.Custom:
        def moment(log_probs: Tensor, token: Tensor) -> Tensor:
            return (power * log_probs).exp().sum(-1)

        @fp.observable(f"moment {power}", "1", stats={"moment": moment})
        def observable(scores: fp.TokenScores, anchor: fp.TokenScores, rollouts: fp.Rollouts) -> Tensor:
            return (scores.extra["moment"] * rollouts.weight.unsqueeze(-1)).sum() / rollouts.weight.sum()

        return observable

    one = using(2)
    assert case().probe(observables={"a": one, "b": one}).readings["a"].change != 0.0
    with pytest.raises(InputError, match="different statistics under the name 'moment'"):
        case().probe(observables={"a": one, "b": using(3)})


def test_a_divergence_has_its_second_order_for_nothing() -> None:
    plain, full = (case().probe(observables={"entropy": fp.entropy(), "kl": fp.kl()}, order=o) for o in (1, 2))
    assert plain.readings["kl"].second_order == pytest.approx(full.readings["kl"].second_order, rel=1e-9)
    assert plain.second_order is None


def test_inference_mode_is_named() -> None:
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode is on"):
        case().probe()


def test_a_learning_rate_for_all_groups_says_what_it_replaces() -> None:
    module = models.two_lines()
    groups = [{"params": [module.embed.weight], "lr": 0.0}, {"params": list(module.head.parameters()), "lr": 1e-2}]
    live = fp.from_training(module, torch.optim.SGD(groups, lr=1e-3))
    step = fp.make_step(live.policy, fp.grpo(), live.optimizer)
    with pytest.warns(FuncprobeWarning, match=r"groups have learning rates 0, 0\.01, and all of them are set"):
        fp.sweep(fp.Update.from_step(step, live.params, live.opt_state, U), E, [1e-3, 1e-2])


def test_scores_are_kept_on_request_and_drawn() -> None:
    kept, bare = case().probe(keep_scores=True), case().probe()
    assert bare.evidence is None
    assert kept.evidence is not None
    assert torch.equal(kept.evidence.rollouts.ids, E.ids)
    assert plot_weights(kept).get_xlabel()
    with pytest.raises(InputError, match="keep_scores=True"):
        plot_weights(bare)
