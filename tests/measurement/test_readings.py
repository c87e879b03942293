"""Error bars held to leaving prompts out for real; caveats where they are due; observables that cannot be read."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student
from torch import Tensor

import funcprobe as fp
from funcprobe.data.rollouts import take
from funcprobe.errors import FuncprobeWarning, InputError, NumericsError
from funcprobe.measurement.readings import Reading
from funcprobe.types import Observable
from tests.cases import tables
from tests.cases.probes import Case, E, U, prompted

LR = 1e-2
OBSERVABLES = tables.observables("entropy", "surprisal", "controlled", "reward", "length", "kl", "kl before")
QUANTITIES = ("change", "first_order", "second_order", "remainder", "ratio")


@functools.cache
def case(model: str = "two lines") -> Case:
    return Case(model)


@functools.cache
def probed(level: float = 0.95) -> fp.ProbeResult:
    return case().probe(LR, observables=OBSERVABLES, order=2, method="difference", level=level)


@functools.cache
def left_out() -> list[fp.ProbeResult]:
    """Return the probe on evaluation rollouts from which a prompt's rows are gone, for each prompt."""
    return [
        case().probe(
            LR, evaluation=take(E, E.group_ids != p), observables=OBSERVABLES, order=2, method="difference", bars=None
        )
        for p in E.group_ids.unique()
    ]


def jackknife(values: list[float]) -> float:
    """Return the standard error from leave-one-out values."""
    return math.sqrt((len(values) - 1) * np.var(values))


def test_bars_are_what_leaving_prompts_out_gives() -> None:
    for name, reading in probed().readings.items():
        for what in QUANTITIES:
            found, without = reading.bars[what], [getattr(r.readings[name], what) for r in left_out()]
            value = getattr(reading, what)
            # the same sums over fewer rows: roundings of 1e-16 of terms up to some thousand times a first order, and
            # that of a divergence is a rounding itself
            size = max(abs(reading.before), 1.0) if what != "ratio" else abs(value)
            assert found.value == pytest.approx(value, rel=1e-9, abs=1e-15 * size)
            assert found.error == pytest.approx(jackknife(without), rel=1e-6, abs=1e-15 * size)
            t = student.ppf(0.975, len(without) - 1)
            assert found.low == pytest.approx(value - t * found.error, rel=1e-9, abs=1e-15 * size)
            assert found.high == pytest.approx(value + t * found.error, rel=1e-9, abs=1e-15 * size)


def test_the_level_widens_the_interval_and_not_the_error() -> None:
    narrow, wide = (probed(level).readings["entropy"].bars["change"] for level in (0.5, 0.95))
    assert narrow.error == wide.error
    assert narrow.level == 0.5
    quantiles = [student.ppf((1 + level) / 2, 4) for level in (0.5, 0.95)]
    assert (narrow.high - narrow.low) / (wide.high - wide.low) == pytest.approx(quantiles[0] / quantiles[1])


def test_the_exchange_rate_is_a_ratio_with_its_own_bar() -> None:
    result = probed()
    for other in ("surprisal", "reward", "length"):
        found = result.exchange[f"entropy per {other}"]
        rates = [r.readings["entropy"].change / r.readings[other].change for r in (result, *left_out())]
        assert found.value == pytest.approx(rates[0], rel=1e-9)
        assert found.error == pytest.approx(jackknife(rates[1:]), rel=1e-6)
    # per nat of a divergence there is no rate: a change of first order over one of second is whatever the step is
    assert not any("kl" in name for name in result.exchange)


def test_in_reverse_mode_only_the_change_has_a_bar() -> None:
    backwards = case().probe(LR, observables=OBSERVABLES, mode="reverse").readings
    for name, reading in probed().readings.items():
        assert set(backwards[name].bars) == {"change"}
        assert backwards[name].bars["change"].error == pytest.approx(reading.bars["change"].error, rel=1e-9)
    assert set(case().probe(LR).main.bars) == {"change", "first_order", "remainder", "ratio"}
    assert case().probe(LR, bars=None).main.bars == {}


def test_a_bar_stands_on_the_path_as_on_the_difference() -> None:
    by_path, by_difference = (case().probe(LR, method=m).main.bars for m in ("path", "difference"))
    for what, found in by_difference.items():
        # the path ends at θ + Δθ and the difference at θ′: float64 roundings of θ, 1e-16 against a step of 1e-2; and
        # its rule has converged to 1e-5 of Σ|terms|, or far beyond
        assert by_path[what].error == pytest.approx(found.error, rel=1e-4)


def test_a_bootstrap_is_its_seed() -> None:
    one, same, other = (case().probe(LR, bars="bootstrap", seed=seed).main.bars["change"] for seed in (1, 1, 2))
    assert one == same
    assert one.error != other.error
    exact = case().probe(LR, bars="jackknife").main.bars["change"]
    # five prompts: bootstrap and jackknife of nearly linear statistics differ by √(4/5), and 1000 draws by 1/√2000
    assert one.error == pytest.approx(exact.error * math.sqrt(0.8), rel=0.15)


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    case().probe(LR, bars="bootstrap")
    assert torch.equal(torch.get_rng_state(), state)


def test_what_makes_a_bar_optimistic_is_said() -> None:
    few = case().probe(LR).main
    assert few.caveats == ("5 prompts, 30 are needed",)
    many = prompted(30, 1, seed=3)
    assert case().probe(LR, evaluation=many).main.caveats == ()
    # the same prompts as the update's, and other completions
    near = case().probe(LR, evaluation=prompted(30, 1, seed=3, first=40)).main
    assert len(near.caveats) == 1
    assert "the step was made from" in near.caveats[0]
    far = case().probe(0.2, evaluation=many, ess_threshold=0.0)
    (said,) = far.main.caveats
    assert said == f"effective sample {math.floor(100 * far.health.fraction('per_decision'))} %, 90 % is needed"


def test_overlap_is_a_caveat_and_a_warning() -> None:
    with pytest.warns(FuncprobeWarning, match="12 of 12 evaluation sequences also stand in the update batch"):
        result = case().probe(LR, evaluation=U)
    assert any("the step was made from" in caveat for caveat in result.main.caveats)


def test_one_prompt_has_no_bar() -> None:
    one = take(E, E.group_ids == E.group_ids[0])
    result = case().probe(LR, evaluation=one, observables={"entropy": fp.entropy(), "reward": fp.expected_reward()})
    assert result.main.bars == {}
    (rate,) = result.exchange.values()
    assert rate.value == result.change / result.readings["reward"].change
    assert rate.error == math.inf  # and where nothing is known of its error, none is printed
    assert "±" not in result.summary()
    (note,) = (n for n in result.notes if "error bars" in n)
    assert note == (
        "no error bars: The rollouts hold 1 prompt (group) that carries weight; a bar over prompts needs 2 or more."
    )
    for bars in ("jackknife", "infinitesimal", "bootstrap"):
        with pytest.raises(InputError, match=rf"E holds 1 prompt \(group\) that carries weight, and bars='{bars}'"):
            case().probe(LR, evaluation=one, bars=bars)


def test_a_prompt_without_weight_does_not_count() -> None:
    weightless = E._replace(weight=E.weight * (E.group_ids != E.group_ids[0]))
    fewer = take(E, E.group_ids != E.group_ids[0])
    a, b = (case().probe(LR, evaluation=e, observables=OBSERVABLES).readings for e in (weightless, fewer))
    for name in OBSERVABLES:
        assert a[name].bars["change"].error == pytest.approx(b[name].bars["change"].error, rel=1e-9)


@pytest.mark.parametrize("rows", [1, 2, 24, 25])
def test_few_rollouts_have_no_khat(rows: int) -> None:
    result = case().probe(LR, evaluation=prompted(25, 1, seed=4) if rows == 25 else _first(rows))
    assert (result.health.khat is None) == (rows < 25)
    assert math.isfinite(result.change)


def _first(rows: int) -> fp.Rollouts:
    return take(prompted(25, 1, seed=4), torch.arange(rows))


def test_a_tolerance_that_cannot_be_met_says_what_was_reached() -> None:
    with pytest.raises(
        NumericsError,
        match=r"The path integral reached \d\.\de-\d\d of the size of its terms with 12 nodes; the tolerance is "
        r"1\.0e-20\. Ask for a larger tolerance, a smaller learning rate, or load the model in a wider dtype",
    ):
        case("gpt2").probe(1e-2, method="path", tolerance=1e-20)


# --- observables that cannot be read ---


def custom(function: Any, **options: Any) -> Observable:
    return fp.observable("mine", "nats", **options)(function)


def weights(scores: fp.TokenScores, anchor: fp.TokenScores, a: Tensor) -> Tensor:
    w = a * torch.exp((scores.logp - anchor.logp).sum(-1))
    return w / w.sum()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda s, a, r: s.logp.sum(-1), r"'mine' returned a tensor of shape \[10\]; expected a scalar; sum over"),
        (lambda s, a, r: s.logp.sum().unsqueeze(0), r"'mine' returned a tensor of shape \[1\]; expected a scalar"),
        (lambda s, a, r: r.rewards.mean(), "'mine' returned a number that does not depend on the scores"),
        (lambda s, a, r: a.logp.sum(), "'mine' returned a number that does not depend on the scores"),
        (lambda s, a, r: s.logp.sum().detach(), "'mine' returned a number that does not depend on the scores"),
        (lambda s, a, r: float(s.logp.detach().sum()), "'mine' returned a float; expected a scalar tensor"),
        (lambda s, a, r: (s.logp < -1).sum(), "'mine' returned a tensor of dtype torch.int64; expected a floating"),
        (lambda s, a, r: s.logp.sum().log(), "'mine' returned nan at the anchor, where nothing has moved"),
        (lambda s, a, r: (s.logp - a.logp).norm().sqrt(), "a number whose derivative is not finite at the anchor"),
    ],
)
def test_an_observable_that_cannot_be_read_is_refused_before_anything_is_run(function: Any, message: str) -> None:
    seen: list[str] = []
    for observables in ({"mine": custom(function)}, {"entropy": fp.entropy(), "mine": custom(function)}):
        with pytest.raises(InputError, match=message):
            case().watched(seen).probe(LR, observables=observables)
        with pytest.raises(InputError, match=message):
            case().watched(seen).sweep([LR], observables=observables)
    assert seen == []


def test_rewards_that_are_missing() -> None:
    seen: list[str] = []
    bare = E._replace(rewards=None)
    for observables in ({"reward": fp.expected_reward()}, {"entropy": fp.entropy(), "reward": fp.expected_reward()}):
        with pytest.raises(InputError, match="The expected reward needs rewards, and these rollouts carry none; give"):
            case().watched(seen).probe(LR, evaluation=bare, observables=observables)
    assert seen == []
    assert case().probe(LR, evaluation=bare).main.bars  # which nothing else needs


def test_one_form_and_none() -> None:
    one, several = (case().probe(LR, observables=o, bars=None) for o in (fp.entropy(), {"entropy": fp.entropy()}))
    assert one.main == several.main
    with pytest.raises(InputError, match="No observable was given; expected at least one"):
        case().probe(LR, observables={})


def looking(scores: fp.TokenScores, anchor: fp.TokenScores, rollouts: fp.Rollouts) -> Tensor:
    if rollouts.weight.sum() > 1:
        return (weights(scores, anchor, rollouts.weight) * scores.logp.sum(-1)).sum()
    return scores.logp.sum()


def items(scores: fp.TokenScores, anchor: fp.TokenScores, rollouts: fp.Rollouts) -> Tensor:
    return (weights(scores, anchor, rollouts.weight) * scores.logp.sum(-1)).sum() * float(rollouts.weight.sum().item())


@pytest.mark.parametrize("function", [looking, items])
def test_an_observable_that_looks_at_its_weights_has_no_bar(function: Any) -> None:
    plain = case().probe(LR, observables=custom(function), bars=None).main
    result = case().probe(LR, observables=custom(function))
    assert result.main == plain
    (note,) = result.notes[-1:]
    assert note.startswith("no error bars: An observable looks at the values of its weights (an if, or .item())")
    with pytest.raises(InputError, match=r"so it cannot be resampled; write it with torch.where, or ask for no bars"):
        case().probe(LR, observables=custom(function), bars="jackknife")


@settings(max_examples=8)
@given(st.floats(-100, 100).filter(lambda x: abs(x) > 1e-3))
def test_an_observable_that_ignores_its_weights_has_no_bar(scale: float) -> None:
    mine = custom(lambda s, a, r: scale * s.logp.mean())
    result = case().probe(LR, observables={"mine": mine, "reward": fp.expected_reward()})
    assert result.main.bars == {}
    assert result.main.caveats == ("the observable does not use rollouts.weight, so it has no error bar",)
    assert result.readings["reward"].bars
    assert result.exchange["mine per reward"].error == math.inf


def test_an_error_of_the_users_own_is_the_users() -> None:
    def broken(scores: fp.TokenScores, anchor: fp.TokenScores, rollouts: fp.Rollouts) -> Tensor:
        raise KeyError("what I meant")

    with pytest.raises(KeyError, match="what I meant"):
        case().probe(LR, observables=custom(broken))


# --- a reading alone ---


def test_what_follows_from_the_numbers() -> None:
    reading = Reading("x", "nats", before=2.0, change=0.5, first_order=0.4, second_order=-0.2)
    assert (reading.after, reading.remainder, reading.ratio) == pytest.approx((2.5, 0.1, 0.8))
    assert reading.nonlinearity == pytest.approx(0.2)
    assert reading.crossover == pytest.approx(2.0)
    still = reading._replace(change=0.0, first_order=0.0, second_order=0.0)
    assert math.isnan(still.ratio)
    assert (still.nonlinearity, still.crossover) == (0.0, None)
    assert still._replace(first_order=0.1).nonlinearity == math.inf
    assert still._replace(second_order=None).crossover is None


def test_what_is_no_observable_is_refused_in_words() -> None:
    for wrong in (fp.entropy, "entropy", [fp.entropy()], lambda scores, anchor, rollouts: scores.logp.sum()):
        with pytest.raises(InputError, match="is no observable: it needs name, unit, stats, weighting"):
            case().probe(LR, observables=wrong)
    with pytest.raises(InputError, match="is no observable"):
        case().probe(LR, observables={"a": fp.entropy})


def test_a_change_that_is_no_number_is_an_error() -> None:
    @fp.observable("ratio", "1")
    def ratio(scores: fp.TokenScores, anchor: fp.TokenScores, rollouts: fp.Rollouts) -> torch.Tensor:
        moved = (scores.logp.detach() - anchor.logp).abs().sum() > 0
        return scores.logp.sum() / torch.where(moved, 0.0, 1.0)

    with pytest.raises(NumericsError, match=r"'ratio' is .* before the step, and its change is -?inf"):
        case().probe(LR, observables=ratio, method="difference", bars=None)


def test_a_seed_is_a_whole_number() -> None:
    with pytest.raises(InputError, match=r"seed is 1\.5; expected a whole number"):
        case().probe(LR, seed=1.5)
