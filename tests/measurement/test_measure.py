"""One step, measured and predicted: nothing touched, every mode the same number, and every caveat said."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import funcprobe as fp
from funcprobe import tree
from funcprobe.data.rollouts import take
from funcprobe.errors import EffectiveSampleSizeError, ForwardModeError, FuncprobeWarning, InputError, NumericsError
from funcprobe.estimators.importance import weight_health
from funcprobe.measurement.cautions import after_measuring
from funcprobe.types import OptState, Params
from tests.cases import models, tables
from tests.cases.measured import AT_A_RATE, Case, E, U, case
from tests.cases.snapshots import snapshot
from tests.cases.trees import assert_same


@settings(max_examples=20)
@given(
    objective=st.sampled_from(tables.PLAIN),
    optimizer=st.sampled_from(sorted(AT_A_RATE)),
    mode=st.sampled_from(["auto", "forward", "reverse"]),
    build=st.sampled_from(["two lines", "gpt2", "qwen2, lora"]),
)
def test_exactly_one_step_and_nothing_touched(objective: str, optimizer: str, mode: str, build: str) -> None:
    c = Case(build, objective, optimizer)
    for leaf in c.module.parameters():
        leaf.grad = torch.full_like(leaf, 0.5) if leaf.requires_grad else None
    before = [snapshot(c.module), _cloned(c.params), {n: _cloned(s) for n, s in c.state.items()}]
    rollouts = [tuple(None if x is None else x.clone() for x in batch) for batch in (E, U)]
    result = c.probe(mode=mode, keep_delta=True)
    assert_same(snapshot(c.module), before[0])
    assert_same(c.params, before[1])
    assert_same(c.state, before[2])
    assert_same(rollouts, [tuple(batch) for batch in (E, U)])
    # exactly one: the kept update is that of one call of the step
    one = c.step(c.params, c.state, U).delta
    assert result.delta is not None
    assert_same(result.delta, {n: u.float() for n, u in one.items()})


def _cloned(leaves: Params) -> Params:
    return {name: leaf.clone() for name, leaf in leaves.items()}


@pytest.mark.parametrize("build", ["two lines", "gpt2"])
def test_the_probe_is_the_five_lines(build: str) -> None:
    c = case(build)
    result = c.probe()
    after = c.step(c.params, c.state, U)
    H = fp.anchored(fp.entropy(), c.policy, E, c.params)
    gradient = torch.func.grad(H)(c.params)
    size = float(tree.dot(tree.map_(torch.abs, gradient), tree.map_(torch.abs, after.delta)))
    assert abs(result.first_order - float(tree.dot(gradient, after.delta))) <= 1e-10 * size
    assert abs(result.change - float(H(after.params) - H(c.params))) <= 1e-12
    assert abs(result.remainder - (result.change - result.first_order)) <= 1e-15
    assert result.outcome.delta_norm == pytest.approx(float(tree.norm(after.delta)), rel=1e-12)
    assert result.top[0][1] == max(tree.leaf_norms(after.delta).values())
    assert result.lr == 1e-3
    # float64 parameters of order .3 at |Δθ| of 1e-3: what is stored differs by 1e-16/1e-3 of the update
    assert result.outcome.rounding_ratio < 1e-12


def test_forward_and_reverse_report_one_number() -> None:
    c = case()
    forward, reverse = c.probe(mode="forward"), c.probe(mode="reverse")
    assert (forward.mode, reverse.mode, c.probe().mode) == ("forward", "reverse", "forward")
    # two attention kernels in float64; the sum of |terms| is some hundred times the sum
    assert reverse.first_order == pytest.approx(forward.first_order, rel=1e-9)
    assert reverse.change == pytest.approx(forward.change, rel=1e-9)
    assert all(e.first_order is not None for e in forward.family.values())
    named = {name for name, e in reverse.family.items() if e.first_order is not None}
    assert named == {reverse.observable}  # the other cotangents were not pulled back, and no number is made up


@pytest.mark.parametrize("observable", fp.entropy_family(), ids=lambda o: o.name)
def test_the_family_holds_what_each_member_alone_would_say(observable: fp.entropy) -> None:
    c = case()
    alone = c.probe(observables=observable)
    member = c.probe().family[observable.name]
    assert (alone.before, alone.change, alone.first_order) == (member.before, member.change, member.first_order)
    assert alone.unit == observable.unit


@settings(max_examples=10)
@given(st.floats(1e-6, 1e-2), st.sampled_from(["sgd", "adamw"]))
def test_first_order_and_update_scale_with_the_learning_rate(lr: float, optimizer: str) -> None:
    c = case("gpt2", "grpo", optimizer)
    one, two = c.probe(lr=lr), c.probe(lr=lr / 10)
    assert one.lr == lr
    assert one.outcome.delta_norm / two.outcome.delta_norm == pytest.approx(10, rel=1e-6)
    assert one.first_order / two.first_order == pytest.approx(10, rel=1e-6)


def test_no_learning_rate_no_step() -> None:
    with pytest.warns(FuncprobeWarning, match="The step is zero at learning rate 0"):
        result = case().probe(lr=0.0)
    assert (result.outcome.delta_norm, result.change, result.first_order, result.remainder) == (0.0, 0.0, 0.0, 0.0)
    assert result.health.ess_sequence == pytest.approx(9)


def test_rounding_is_its_own_row_in_float32() -> None:
    policy, params = fp.from_module(models.gpt2(torch.float32))
    optimizer = fp.adamw(1e-7)
    step = fp.make_step(policy, fp.grpo(), optimizer)
    run = functools.partial(fp.probe, fp.Update.from_step(step, params, optimizer.init(params), U), E)
    forward, reverse, skipped = run(), run(mode="reverse"), run(rounding=False)
    # at lr 1e-7 on weights of order .3, half an ulp is 1e-8: several per cent of the update
    assert forward.outcome.rounding_ratio > 0.01
    assert forward.outcome.rounding is not None
    assert reverse.outcome.rounding == pytest.approx(forward.outcome.rounding, rel=1e-3)
    assert skipped.outcome.rounding is None
    assert not any(note.kind == "no rounding row" for note in skipped.notes)  # nobody wanted it
    assert 0 < forward.outcome.unmoved < 1
    # the measured change moves with what was stored: first order plus the rounding row explains it
    after = step(params, optimizer.init(params), U)
    stored = {n: (after.params[n].double() - p.double()).float() for n, p in params.items()}
    H = fp.anchored(fp.entropy(), policy, E, params)
    slope = float(torch.func.jvp(H, (params,), (stored,))[1])
    assert forward.first_order + forward.outcome.rounding == pytest.approx(slope, rel=1e-4)


def test_the_change_follows_what_is_stored_and_the_prediction_the_update() -> None:
    policy, params = fp.from_module(models.gpt2())
    drift = models.direction(params, 1e-5, seed=8)

    class Drifting:
        """An optimizer whose stored parameters are off by a known amount, as a coarse dtype's would be."""

        lr = 1e-5

        def init(self, params: Params) -> OptState:
            return fp.sgd(self.lr).init(params)

        def apply(self, *arguments: Any) -> Any:
            taken = fp.sgd(self.lr).apply(*arguments)
            return taken._replace(params=tree.add(taken.params, drift))

    step = fp.make_step(policy, fp.grpo(), Drifting())
    result = fp.probe(fp.Update.from_step(step, params, Drifting().init(params), U), E)
    H = fp.anchored(fp.entropy(), policy, E, params)
    off = float(torch.func.jvp(H, (params,), (drift,))[1])
    assert result.outcome.rounding == pytest.approx(off, rel=1e-9)
    assert result.change == pytest.approx(result.first_order + off, rel=0.02)
    assert abs(off) > 0.1 * abs(result.first_order)


def test_a_model_without_forward_derivative_falls_back_with_a_note() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, c: torch.Tensor) -> torch.Tensor:
            return 2 * c

    class Model(models.TwoLines):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return Double.apply(super().forward(ids))

    with models.seeded(1):
        policy, params = fp.from_module(Model().double())
    step = fp.make_step(policy, fp.grpo(), fp.sgd(1e-2))
    result = fp.probe(fp.Update.from_step(step, params, fp.sgd(1e-2).init(params), U), E)
    assert result.mode == "reverse"
    assert "reverse mode was used" in result.notes[0]
    with pytest.raises(ForwardModeError):
        fp.probe(fp.Update.from_step(step, params, fp.sgd(1e-2).init(params), U), E, mode="forward")


def test_a_degenerate_sample_warns_or_raises() -> None:
    c = Case("two lines", lr=3.0)
    with pytest.warns(FuncprobeWarning, match="effective sample size is"):
        result = c.probe(ess_threshold=0.9)
    assert any("below 90 %" in w for w in result.warnings)
    with pytest.raises(EffectiveSampleSizeError, match="take a smaller learning rate or more rollouts"):
        c.probe(ess_threshold=0.9, on_low_ess="raise")


def test_the_threshold_is_on_the_weights_that_the_estimator_uses() -> None:
    result = Case("two lines", lr=0.3).probe(ess_threshold=0.0)
    health = result.health
    assert health.fraction("per_decision") != health.fraction("sequence")
    between = (health.fraction("per_decision") + health.fraction("sequence")) / 2
    worse, better = sorted(("per_decision", "sequence"), key=health.fraction)
    options = {"ess_threshold": between, "on_low_ess": "raise"}
    with pytest.raises(EffectiveSampleSizeError):
        Case("two lines", lr=0.3).probe(observables=fp.entropy(weighting=worse), **options)
    Case("two lines", lr=0.3).probe(observables=fp.entropy(weighting=better), **options)


def test_a_heavy_tail_is_reported_where_it_carries_weight() -> None:
    base = weight_health(torch.zeros(E.completion_mask.shape, dtype=torch.float64), E)._replace(khat=0.9)
    scores = fp.score(case().policy, case().params, E)
    assert list(after_measuring(scores, E, base)) == []  # equal weights: the shape of their tail weighs nothing
    (said,) = after_measuring(scores, E, base._replace(ess_sequence=5.0))
    assert "Pareto k̂ is 0.90, above 0.7" in said
    assert list(after_measuring(scores, E, base._replace(ess_sequence=5.0, khat=0.6))) == []


def test_shared_rollouts_are_reported() -> None:
    with pytest.warns(FuncprobeWarning, match="9 of 9 evaluation sequences also stand in the update batch"):
        case().probe(evaluation=U)


def test_a_sampler_that_disagrees_is_reported() -> None:
    c = case()
    ours = fp.score(c.policy, c.params, E).logp
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert c.probe(evaluation=E._replace(sampling_logps=ours)).warnings == ()
    off = E._replace(sampling_logps=ours + 0.1 * E.completion_mask)
    with pytest.warns(FuncprobeWarning, match=r"differ by 0.1 nats per token \(mean ratio 0.905\) from the recomputed"):
        c.probe(evaluation=off)
    nucleus = E._replace(sampling_logps=ours, top_p=torch.full((9,), 0.9, dtype=torch.float64))
    with pytest.warns(
        FuncprobeWarning, match=r"The evaluation rollouts come from a truncated sampler \(top_p, top_k\)"
    ):
        c.probe(evaluation=nucleus)


def test_a_sampler_that_disagrees_on_the_update_batch_is_reported() -> None:
    c = case()
    off = U._replace(sampling_logps=fp.score(c.policy, c.params, U).logp - 0.1 * U.completion_mask)
    with pytest.warns(
        FuncprobeWarning, match=r"of the update rollouts differ by 0.1 nats per token \(mean ratio 1.11\)"
    ):
        c.probe(batch=off)


def test_another_proposal_is_named_and_never_mixed_with_the_anchor() -> None:
    c = case()
    reported = E._replace(sampling_logps=fp.score(c.policy, c.params, E).logp - 0.01 * E.completion_mask)
    observable = fp.entropy(proposal="sampler")
    forward, reverse = (c.probe(observables=observable, evaluation=reported, mode=m) for m in ("forward", "reverse"))
    assert forward.observable == "rao_blackwell/per_decision/token/sampler"
    for result in (forward, reverse):
        assert all(name.endswith("/sampler") for name in result.family)
        main = result.family[result.observable]
        assert (main.change, main.first_order) == (result.change, result.first_order)
    assert reverse.first_order == pytest.approx(forward.first_order, rel=1e-9)


def test_the_batch_of_a_score_that_is_not_finite_is_named() -> None:
    c = case("two lines")
    broken = {n: torch.full_like(p, torch.nan) for n, p in c.params.items()}
    with pytest.raises(NumericsError, match=r"not finite for sequence [\d, ]+ \(in: gradient\)"):
        fp.probe(fp.Update.from_step(c.step, broken, c.state, U), E)


def test_what_the_step_warns_of_stands_in_the_result() -> None:
    flat = U._replace(rewards=torch.ones(9, dtype=torch.float64))
    with pytest.warns(FuncprobeWarning, match="momentum and weight decay"):
        result = case().probe(batch=flat)
    assert len(result.warnings) == 1
    assert result.first_order != 0.0


def test_bad_options() -> None:
    c = case()
    with pytest.raises(InputError, match="Unknown mode 'sideways'"):
        c.probe(mode="sideways")
    with pytest.raises(InputError, match="Unknown on_low_ess 'shrug'"):
        c.probe(on_low_ess="shrug")
    with pytest.raises(InputError, match=r"ess_threshold is 10; expected a fraction"):
        c.probe(ess_threshold=10)
    for lr in (-1e-3, float("nan"), float("inf")):
        with pytest.raises(InputError, match="rate"):
            c.probe(lr=lr)


def test_an_observable_of_ones_own() -> None:
    """Anything with a name, a unit, statistics and a call is an observable."""

    class Surprise:
        name, unit, stats = "squared surprisal", "nats²", {}
        weighting, proposal, inclusive = "none", "anchor", False

        def __call__(self, scores: fp.TokenScores, anchor: fp.TokenScores, rollouts: fp.Rollouts) -> torch.Tensor:
            return (scores.logp**2).mean()

    result = case().probe(observables=Surprise(), lr=1e-5)
    assert result.observable == "squared surprisal"
    assert result.change == pytest.approx(result.first_order, rel=0.02)


def test_microbatches_change_nothing_and_progress_counts() -> None:
    c = case()
    seen: list[str] = []
    whole = c.probe(microbatch=None, progress=lambda what, done, total: seen.append(what))
    cut = c.probe(microbatch=fp.TokenBudget(16))
    assert cut.change == pytest.approx(whole.change, rel=1e-10)
    assert cut.first_order == pytest.approx(whole.first_order, rel=1e-10)
    assert list(dict.fromkeys(seen)) == ["gradient", "E, forward mode", "E at θ′"]
    fewer = c.probe(evaluation=take(E, torch.arange(3)))
    assert fewer.evaluation.sequences == 3
    assert isinstance(c.module, nn.Module)
