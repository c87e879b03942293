"""Many learning rates from one gradient and one derivative: each point a probe, the laws of a line, calm refusals."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe.data.rollouts import take
from funcprobe.engine import kernels
from funcprobe.errors import EffectiveSampleSizeError, ForwardModeError, FuncprobeWarning, InputError, NumericsError
from funcprobe.measurement.readings import Reading
from funcprobe.results.sweep import SweepResult
from tests.cases import models
from tests.cases.probes import Case, E, Offset, U
from tests.cases.tables import observables

LRS = [1e-4, 1e-3, 1e-2]
SEVERAL = observables("entropy", "reward", "length", "kl")
TWO = observables("reward", "kl")


@functools.cache
def case(build: str = "two lines") -> Case:
    return Case(build)


@functools.cache
def swept(build: str = "two lines") -> SweepResult:
    """Six learning rates in the linear regime, in float64."""
    return case(build).sweep([1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3], observables=SEVERAL, method="difference")


def assert_close(found: Reading, expected: Reading, rel: float = 1e-9) -> None:
    """Hold two readings of one step to each other.

    Both come from the same scores at θ′; δF₁ and δF₂ of a sweep are those of its largest learning rate, scaled: that
    costs roundings of 1e-16 of Σ|terms|, which is up to some thousand times the sum. Qwen2 rounds to float32 (6e-8)
    inside, whatever its dtype.
    """
    assert (found.observable, found.unit, found.method, found.nodes) == (
        expected.observable,
        expected.unit,
        expected.method,
        expected.nodes,
    )
    assert found.before == pytest.approx(expected.before, rel=1e-12)
    assert found.change == pytest.approx(expected.change, rel=rel, abs=1e-14)
    assert found.first_order == pytest.approx(expected.first_order, rel=rel, abs=1e-14)
    if expected.second_order is not None:
        assert found.second_order == pytest.approx(expected.second_order, rel=100 * rel, abs=1e-16)
    assert found.bars.keys() == expected.bars.keys()
    for what in ("change", "first_order"):
        if what in expected.bars:
            assert found.bars[what].error == pytest.approx(expected.bars[what].error, rel=100 * rel, abs=1e-14)


@functools.cache
def probes(build: str) -> list[fp.ProbeResult]:
    return [case(build).probe(lr, method="difference", observables=TWO, order=2) for lr in LRS]


@pytest.mark.parametrize(
    ("build", "chunk"), [("two lines", 1), ("two lines", 2), ("gpt2", 1), ("gpt2", 3), ("qwen2, lora", 2)]
)
def test_a_point_is_a_probe_at_its_learning_rate(build: str, chunk: int) -> None:
    result = case(build).sweep(LRS, method="difference", observables=TWO, chunk=chunk)
    assert result.lrs == tuple(LRS)
    for point, probed in zip(result.points, probes(build), strict=True):
        assert point.delta_norm == probed.outcome.delta_norm
        assert point.health.ess_sequence == pytest.approx(probed.health.ess_sequence, rel=1e-10)
        for name in TWO:
            assert_close(point.readings[name], probed.readings[name], 1e-5 if "lora" in build else 1e-9)
    assert result.info == pytest.approx(probed.outcome.info)
    assert (result.evaluation, result.batch) == (probed.evaluation, probed.batch)


def test_a_point_is_a_probe_in_reverse_mode() -> None:
    c = case("gpt2")
    result = c.sweep(LRS, mode="reverse", order=1)
    for point, reading in zip(result.points, result.readings(), strict=True):
        probed = c.probe(point.lr, mode="reverse", order=1)
        assert_close(reading, probed.main)
        assert reading.method == "difference"
    assert result.mode == probed.mode == "reverse"


@pytest.mark.parametrize("options", [{"method": "path"}, {"mode": "forward", "exact": True}, {"order": 1}])
def test_a_point_of_a_curve_is_a_probe_by_a_path(options: dict[str, Any]) -> None:
    c, order = case("gpt2"), options.get("order", 2)
    result = c.sweep(LRS, observables=TWO, **options)
    for point in result.points:
        probed = c.probe(point.lr, observables=TWO, order=order, method="path", tolerance=1e-7)
        for name, reading in point.readings.items():
            expected = probed.readings[name]
            # a curve is fitted to 1e-4 of ΔF; δF₁ is the reference's, scaled; δF₂ is nested mode's, or the curve's bend
            assert reading.change == pytest.approx(expected.change, rel=1e-4)
            assert abs(reading.change - expected.change) <= reading.float_error + expected.float_error
            assert reading.first_order == pytest.approx(expected.first_order, rel=1e-9, abs=1e-14)
            assert (reading.second_order is None) == (expected.second_order is None)
            if reading.second_order is not None:
                bend = 1e-8 if "exact" in options else 1e-2
                assert reading.second_order == pytest.approx(expected.second_order, rel=bend)
            assert reading.bars.keys() == expected.bars.keys()
            for what in ("change", "first_order"):
                if what in expected.bars:
                    assert reading.bars[what].error == pytest.approx(expected.bars[what].error, rel=1e-3, abs=1e-14)
            # at the largest learning rate θ′ is another policy (ESS .38), and is scored
            scored = point.lr == LRS[-1] and "method" not in options
            assert reading.method == ("difference" if scored else options.get("method", "values"))
        assert point.health.ess_sequence == pytest.approx(probed.health.ess_sequence, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"order": 1}, {"mode": "reverse", "order": 1}])
@pytest.mark.parametrize(("chunk", "scorings"), [(1, 5), (2, 3), (5, 1), (9, 1)])
def test_one_gradient_one_derivative_and_one_scoring_a_learning_rate(
    options: dict[str, Any], chunk: int, scorings: int
) -> None:
    seen: list[str] = []
    case().watched(seen).sweep(
        [1e-5, 1e-4, 1e-3, 1e-2, 1e-1], chunk=chunk, method="difference", bars=None, ess_threshold=0.0, **options
    )
    scorings = 5 if "mode" in options else scorings  # its anchor was scored by kernels that cannot be batched
    assert (seen.count("U"), seen.count("E")) == (1, 1 + scorings)


def test_an_update_that_is_not_proportional_has_a_derivative_of_its_own() -> None:
    seen: list[str] = []
    c = Case(optimizer=Offset())
    result = c.watched(seen).sweep(LRS, method="difference", order=1)
    assert (seen.count("U"), seen.count("E")) == (1, len(LRS) + len(LRS))
    for point in result.points:
        assert_close(point.readings[fp.entropy().name], c.probe(point.lr, method="difference").main)
    # scaling the largest one's derivative would have been wrong
    first = [reading.first_order for reading in result.readings()]
    assert first[0] != pytest.approx(first[-1] * LRS[0] / LRS[-1], rel=0.5)
    (note,) = result.notes
    assert note.startswith("at lr 0.0001, 0.001: the step is not proportional to the learning rate")


def test_a_lifted_optimizer_that_ignores_its_learning_rate() -> None:
    c = Case(optimizer=fp.from_torch(torch.optim.ASGD, lr=1e-3))  # after its first step it has a rate of its own
    result = c.sweep(LRS, method="difference", order=1)
    assert len({point.delta_norm for point in result.points}) == 1
    assert len({round(reading.first_order, 12) for reading in result.readings()}) == 1
    assert result.readings()[0].change == pytest.approx(result.readings()[0].first_order, rel=0.05)
    assert any("not proportional" in note for note in result.notes)


def test_an_update_that_is_proportional_has_no_note() -> None:
    lifted = Case(optimizer=fp.from_torch(torch.optim.RMSprop, lr=1e-3))
    assert lifted.sweep(LRS, order=1, bars=None).notes == ()
    assert swept().notes == ()


@pytest.mark.parametrize("build", ["two lines", "gpt2"])
def test_the_change_has_slope_one_and_the_remainder_slope_two(build: str) -> None:
    result = swept(build)
    until = result.linear_until_lr()
    assert until is not None
    change, remainder = result.slope(up_to=until), result.remainder_slope(up_to=until)
    # up to a twentieth of the crossover the second order adds at most 5 % to the first, at one end of a line that spans
    # decades; and the third order adds about as little to the second
    assert change.points == remainder.points == sum(lr <= until for lr in result.lrs) >= 3
    assert change.slope.value == pytest.approx(1, abs=0.02)
    assert remainder.slope.value == pytest.approx(2, abs=0.1)
    assert change.r_squared > 0.9999
    assert remainder.r_squared > 0.999
    # a divergence has no first order, so its change is of second
    assert result.slope("kl", up_to=until).slope.value == pytest.approx(2, abs=0.02)


def test_the_line_is_least_squares_on_logarithms() -> None:
    result = swept()
    x, y = np.log(result.lrs), np.log([abs(r.change) for r in result.readings()])
    slope, intercept = np.polyfit(x, y, 1)
    fit = result.slope()
    assert fit.slope.value == pytest.approx(slope, rel=1e-10)
    # R² of nearly 1 is 1 minus something small, so the small thing is compared
    unexplained = ((y - slope * x - intercept) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    assert 1 - fit.r_squared == pytest.approx(unexplained, rel=1e-6)
    assert fit.points == 6
    assert result.slope(up_to=1e-4).points == 3


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_the_bar_of_a_slope_is_a_refit_without_each_prompt(level: float) -> None:
    c, lrs = case(), [1e-2, 3e-2, 1e-1]
    result = c.sweep(lrs, method="difference", order=1, level=level)
    changes, remainders = [], []
    for prompt in E.group_ids.unique():
        fewer = take(E, E.group_ids != prompt)
        readings = [c.probe(lr, evaluation=fewer, method="difference", bars=None).main for lr in lrs]
        changes.append(np.polyfit(np.log(lrs), np.log([abs(r.change) for r in readings]), 1)[0])
        remainders.append(np.polyfit(np.log(lrs), np.log([abs(r.remainder) for r in readings]), 1)[0])
    for fit, refits in ((result.slope(), changes), (result.remainder_slope(), remainders)):
        # jackknife over P prompts; a slope of logarithms of sums that cancel keeps some ten digits
        error = math.sqrt((len(refits) - 1) * np.var(refits))
        assert fit.slope.error == pytest.approx(error, rel=1e-6)
        assert fit.slope.level == level
        assert fit.slope.low < fit.slope.value < fit.slope.high


def test_a_slope_without_replicates_is_a_slope_without_a_bar() -> None:
    full, bare = case().sweep(LRS, method="difference"), case().sweep(LRS, bars=None, method="difference")
    backwards = case().sweep(LRS, mode="reverse", order=1)
    for result in (bare, backwards):
        fit = result.remainder_slope()
        assert fit.slope.value == pytest.approx(full.remainder_slope().slope.value, rel=1e-6)
        assert fit.slope.error == math.inf
    assert bare.slope().slope.error == math.inf
    # ΔF has replicates in reverse mode too
    assert backwards.slope().slope.error == pytest.approx(full.slope().slope.error, rel=1e-6)


def test_the_scale_check_is_the_ratios_of_two_learning_rates() -> None:
    result = swept()
    found = result.scale_check(1e-5, 1e-4)
    a, b = result.readings()[0], result.readings()[2]
    assert found.lr == pytest.approx(10)
    assert found.delta_norm == pytest.approx(10, rel=1e-12)
    assert found.first_order == pytest.approx(10, rel=1e-9)
    assert found.change == b.change / a.change
    assert found.change == pytest.approx(10, rel=0.01)
    assert result.scale_check().lr == pytest.approx(300)
    # the reward does not follow the main observable
    assert result.scale_check(1e-5, 1e-4, "reward").change != found.change
    assert math.isnan(result.scale_check(name="kl").first_order)  # 0 over 0
    with pytest.raises(InputError, match=r"The sweep has no learning rate 2e-05; it has 1e-05, 3e-05, 0.0001"):
        result.scale_check(2e-5)


def test_the_crossover_is_where_second_order_is_as_large_as_first() -> None:
    for name in ("entropy", "reward", "length"):
        at = swept().crossover_lr(name)
        until = swept().linear_until_lr(name)
        assert at is not None
        assert until is not None
        there = case().probe(at, order=2, observables={name: SEVERAL[name]}, bars=None, ess_threshold=0.0).main
        assert there.second_order is not None
        # two multiplications by 1e-16 of Σ|terms| away, at most
        assert abs(there.second_order) == pytest.approx(abs(there.first_order), rel=1e-8)
        here = case().probe(until, order=2, observables={name: SEVERAL[name]}, bars=None).main
        assert here.second_order is not None
        assert abs(here.second_order / here.first_order) == pytest.approx(0.05, rel=1e-8)
    assert swept().crossover_lr("kl") == 0.0  # never linear
    assert case().sweep(LRS, order=1).crossover_lr() is None
    assert case().sweep(LRS, order=1).linear_until_lr() is None


def test_the_long_form_has_a_row_for_every_number() -> None:
    result = swept()
    frame = result.to_frame()
    assert list(frame.columns) == ["lr", "observable", "quantity", "value", "unit", "error", "low", "high"]
    assert len(frame) == len(result.rows()) == 6 * 4 * 6
    for point in result.points:
        for name, reading in point.readings.items():
            own = frame[(frame["lr"] == point.lr) & (frame["observable"] == name)].set_index("quantity")
            for what in ("change", "first_order", "second_order", "remainder", "subtraction"):
                assert own["value"][what] == getattr(reading, what)
                assert own["unit"][what] == reading.unit
            assert own["unit"]["ratio"] == "1"
            bar = reading.bars["change"]
            assert (own["error"]["change"], own["low"]["change"], own["high"]["change"]) == bar[1:4]
            assert math.isnan(own["error"]["subtraction"])
    alone = case().sweep(LRS, order=1, bars=None, method="path").to_frame()
    assert set(alone["quantity"]) == {"change", "first_order", "remainder", "ratio", "subtraction"}
    assert alone["error"].isna().all()


@pytest.mark.parametrize("options", [{}, {"bars": None}, {"bars": "bootstrap"}, {"mode": "reverse"}])
def test_what_is_saved_is_what_is_loaded(options: dict[str, Any], tmp_path: Path) -> None:
    result = case().sweep(LRS, observables={"entropy": fp.entropy(), "kl": fp.kl()}, order=1, **options)
    loaded = SweepResult.load(result.save(tmp_path / "sweep"))
    assert loaded.to_dict() == result.to_dict()
    assert loaded.lrs == result.lrs
    assert loaded.readings("kl") == result.readings("kl")
    assert loaded.slope() == result.slope()
    assert loaded.points[0].health == result.points[0].health
    assert loaded.rows()[0] == pytest.approx(result.rows()[0], nan_ok=True)
    with pytest.raises(InputError, match="exists already"):
        result.save(tmp_path / "sweep")
    assert result.save(tmp_path / "sweep", overwrite=True).is_dir()


@pytest.mark.parametrize(
    ("lrs", "message"),
    [
        ([], r"There are no learning rates to sweep; give at least one, such as \[1e-7, 1e-6, 1e-5\]"),
        ([1e-5, 1e-6], "Learning rate 1e-06 stands after 1e-05; give them in rising order"),
        ([1e-6, 1e-5, 1e-5], "Learning rate 1e-05 stands twice; give each once"),
        ([-1e-6, 1e-5], "Learning rate -1e-06 cannot be swept; expected finite numbers above 0"),
        ([0.0, 1e-5], "Learning rate 0 cannot be swept"),
        ([1e-6, math.nan], "Learning rate nan cannot be swept"),
        ([1e-6, math.inf], "Learning rate inf cannot be swept"),
    ],
)
def test_learning_rates_that_make_no_sweep(lrs: list[float], message: str) -> None:
    seen: list[str] = []
    with pytest.raises(InputError, match=message):
        case().watched(seen).sweep(lrs)
    assert seen == []  # before anything is run


def test_learning_rates_come_as_any_numbers() -> None:
    plain = case().sweep(LRS, bars=None).to_dict()["points"]
    for lrs in (tuple(LRS), np.array(LRS), torch.tensor(LRS, dtype=torch.float64)):
        assert case().sweep(lrs, bars=None).to_dict()["points"] == plain
    assert case().sweep([1], bars=None, ess_threshold=0.0).lrs == (1.0,)  # and one is enough for all but a slope


def test_what_cannot_be_fitted_says_so() -> None:
    with pytest.raises(InputError, match=r"needs two learning rates at which the change of 'entropy' is .*not 0"):
        swept().slope("entropy", up_to=1e-5)
    with pytest.raises(InputError, match=r"there are 0 up to 1e-06; sweep more of them"):
        swept().slope(up_to=1e-6)
    for ask in (swept().slope, swept().readings, swept().crossover_lr, swept().linear_until_lr):
        with pytest.raises(InputError, match="The sweep has no observable 'joy'; it has entropy, reward, length, kl"):
            ask("joy")


def test_bad_options() -> None:
    for chunk in (0, 2.5):
        with pytest.raises(InputError, match=f"chunk is {chunk}; expected how many learning rates go together, 1 or"):
            case().sweep(LRS, chunk=chunk)
    for lrs in (1e-3, "1e-3:1e-1", None, ["fast"], [LRS]):
        with pytest.raises(InputError, match=r"lrs is .*; expected several learning rates, such as \[1e-7, 1e-6, 1e-5"):
            case().sweep(lrs)
    with pytest.raises(InputError, match="tolerance is 0"):
        case().sweep(LRS, tolerance=0)
    with pytest.raises(InputError, match="top_k can do nothing in a sweep; leave it out"):
        case().sweep(LRS, top_k=3)


def test_a_model_that_vmap_cannot_run_is_swept_one_by_one() -> None:
    class Looking(models.TwoLines):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * (1.0 if float(self.head.bias.detach().sum()) < 9.0 else 2.0)

    with models.seeded(8):
        c = Case(Looking().double())
    with pytest.raises(InputError, match=r"3 learning rates cannot be scored together, because vmap .* use chunk=1"):
        c.sweep(LRS, chunk=3, bars=None, method="difference")
    assert c.sweep(LRS, bars=None).readings()[0].change == case().sweep(LRS, bars=None).readings()[0].change


def test_an_error_names_its_learning_rate() -> None:
    with pytest.raises(NumericsError, match=r"^At lr 0.01: The path integral reached .* the tolerance is 1.0e-20"):
        case("gpt2").sweep([1e-2], method="path", tolerance=1e-20, order=1)
    with pytest.raises(NumericsError, match=r"^At lr 1e\+308: The .*not finite"):
        case().sweep([1e-3, 1e308])
    with pytest.raises(EffectiveSampleSizeError, match=r"^At lr 3: The effective sample size is"):
        case().sweep([1e-3, 3.0], ess_threshold=0.9, on_low_ess="raise")


def test_a_warning_names_its_learning_rate_and_is_said_once() -> None:
    with pytest.warns(FuncprobeWarning, match=r"^At lr 3: The effective sample size is .* below 90 %") as caught:
        result = case().sweep([1e-3, 3.0], ess_threshold=0.9)
    assert len(result.warnings) == len(caught) == 1
    assert result.points[0].warnings == ()


def test_what_points_note_is_gathered() -> None:
    with pytest.warns(FuncprobeWarning, match="6 of 6 evaluation sequences also stand in the update batch"):
        result = case().sweep(LRS, evaluation=take(U, torch.arange(6)), order=1)
    assert len(result.warnings) == 1
    single = take(E, E.group_ids == E.group_ids[0])
    (note,) = case().sweep(LRS, evaluation=single).notes
    assert note.startswith("at lr 0.0001, 0.001, 0.01: no error bars: The rollouts hold 1 prompt")


def test_a_model_without_second_forward_derivatives_has_those_of_its_curve() -> None:
    class Glu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.glu(torch.cat([x, x], dim=-1))

    with models.seeded(1):
        module = nn.Sequential(nn.Embedding(models.VOCABULARY, 4), Glu(), nn.Linear(4, models.VOCABULARY)).double()
    policy, params = fp.from_module(module)
    optimizer = fp.sgd(1e-3)
    step = fp.make_step(policy, fp.grpo(), optimizer)
    update = fp.Update.from_step(step, params, optimizer.init(params), U)
    assert fp.sweep(update, E, [1e-4, 1e-3]).crossover_lr() is not None
    found = fp.sweep(update, E, [1e-4, 1e-3], method="difference")
    assert found.crossover_lr() is None
    assert found.mode == "forward"  # glu has a first derivative
    assert found.readings()[1].first_order == pytest.approx(found.readings()[1].change, rel=0.05)
    with pytest.raises(ForwardModeError, match="leave out order=2, which needs one"):
        fp.sweep(update, E, [1e-4, 1e-3], order=2, exact=True)
    by_choice = case().sweep([1e-4, 1e-3], mode="reverse")  # and reverse mode may be asked for without more
    assert by_choice.mode == "reverse"


def test_forward_over_reverse_is_taken_once_for_all_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    straight = case("gpt2").sweep([1e-4, 3e-4, 1e-3], exact=True)
    monkeypatch.setattr(kernels, "_layer_norm", torch.layer_norm)
    passes: list[str] = []
    detour = case("gpt2").sweep(
        [1e-4, 3e-4, 1e-3], exact=True, microbatch=None, progress=lambda what, done, total: passes.append(what)
    )
    assert passes.count("E, forward over reverse") == 1
    for one, two in zip(straight.readings(), detour.readings(), strict=True):
        assert two.second_order == pytest.approx(one.second_order, rel=1e-9)
