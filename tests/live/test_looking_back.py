"""A step measured from its end: exact on exact weights, and the same number as from its beginning."""

from __future__ import annotations

import pytest
import torch

import funcprobe as fp
from funcprobe import tree
from funcprobe.errors import InputError
from funcprobe.live.looking_back import LookedBack, look_back, observables_of
from funcprobe.measurement.options import Options
from funcprobe.types import Params, Rollouts
from tests.cases import models
from tests.cases.probes import E
from tests.oracles import enumeration

OBSERVABLES = {
    **{o.name: o for o in fp.entropy_family()},
    "reward": fp.expected_reward(),
    "length": fp.mean_length(),
    "kl": fp.kl(),
    "kl before": fp.kl("before"),
}


def enumerated(size: float, mode: str = "reverse") -> tuple[LookedBack, fp.ProbeResult]:
    """Return a step looked back at and one looked ahead at, each with the exact probabilities of all completions."""
    module = models.gpt2(vocabulary=enumeration.SYMBOLS).eval()
    policy, before = fp.from_module(module)
    delta = models.direction(before, size)
    now = tree.add(before, delta)

    def drawn(params: Params) -> Rollouts:
        with torch.no_grad():
            stepped = models.gpt2(vocabulary=enumeration.SYMBOLS).eval()
            stepped.load_state_dict(params, strict=False)
            return enumeration.rollouts(enumeration.probabilities(stepped))

    options = {"mode": mode, "bars": None}
    back = look_back(policy, now, before, drawn(now), OBSERVABLES, Options(**options))
    ahead = fp.probe(fp.Update.from_delta(policy, before, delta), drawn(before), OBSERVABLES, **options)
    return back, ahead


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_backward_is_forward_on_exact_weights(mode: str) -> None:
    back, ahead = enumerated(0.03, mode)
    for name, reading in ahead.readings.items():
        found = back.readings[name]
        # sums of some hundred float64 products, of terms of order 1
        assert found.change == pytest.approx(reading.change, rel=1e-9, abs=1e-13), name
        assert found.before == pytest.approx(reading.before, rel=1e-9, abs=1e-13), name
        assert found.observable == reading.observable


def test_both_first_orders_stand_on_either_side() -> None:
    """∇F at the end errs as ∇F at the beginning, with the other sign: their mean is off at third order only."""
    errors = {}
    for size in (0.002, 0.001):
        back, ahead = enumerated(size)
        change = ahead.main.change
        slopes = ahead.main.first_order, next(iter(back.readings.values())).first_order
        errors[size] = [slope - change for slope in (*slopes, sum(slopes) / 2)]
        assert errors[size][0] * errors[size][1] < 0
    orders = [a / b for a, b in zip(errors[0.002], errors[0.001], strict=True)]
    assert orders[0] == pytest.approx(4, rel=0.3)
    assert orders[1] == pytest.approx(4, rel=0.3)
    assert orders[2] == pytest.approx(8, rel=0.4)


def test_a_step_back_and_forth_has_the_same_bars() -> None:
    policy, now = fp.from_module(models.two_lines())
    before = tree.axpy(-1.0, models.direction(now, 0.05), now)
    options = Options(mode="forward", order=2)
    found = look_back(policy, now, before, E, {"entropy": fp.entropy()}, options).readings["entropy"]
    plain = fp.probe(fp.Update.from_delta(policy, now, tree.sub(before, now)), E, mode="forward", order=2).main
    assert found.change == -plain.change
    assert found.second_order == -plain.second_order
    for name in ("change", "first_order", "second_order", "remainder"):
        ours, theirs = found.bars[name], plain.bars[name]
        assert (ours.value, ours.error) == (-theirs.value, theirs.error)
        assert (ours.low, ours.high) == (-theirs.high, -theirs.low)
        assert ours.low < ours.value < ours.high
    assert found.bars["ratio"] == plain.bars["ratio"]


def off(rollouts: Rollouts, field: str, by: float) -> Rollouts:
    """Return rollouts whose sampler, or old policy, reported other log-probabilities."""
    policy, params = fp.from_module(models.two_lines())
    logps = fp.score(policy, params, rollouts).logp.detach()
    return rollouts._replace(**{field: torch.where(rollouts.completion_mask, logps + by, 0.0)})


@pytest.mark.parametrize("field", ["sampling_logps", "old_logps"])
def test_rollouts_of_another_policy_are_refused_with_the_number(field: str) -> None:
    policy, params = fp.from_module(models.two_lines())
    before = tree.add(params, models.direction(params, 0.01))
    given = {"entropy": fp.entropy()}, Options(mode="reverse")
    assert look_back(policy, params, before, E, *given).sampler_gap is None
    near = look_back(policy, params, before, off(E, field, 0.01), *given)
    assert near.sampler_gap == pytest.approx(0.01)
    with pytest.raises(InputError, match=r"not this policy's: .* differ from its own by 0\.5 nats per token"):
        look_back(policy, params, before, off(E, field, 0.5), *given)


def test_rollouts_without_a_token_are_refused() -> None:
    policy, params = fp.from_module(models.two_lines())
    empty = E._replace(completion_mask=torch.zeros_like(E.completion_mask))
    with pytest.raises(InputError, match="hold no completion token"):
        look_back(policy, params, params, empty, {"entropy": fp.entropy()}, Options())


def test_what_is_split_has_a_first_order() -> None:
    assert list(observables_of(None)) == ["entropy"]
    assert list(observables_of({"h": fp.entropy(), "kl": fp.kl()})) == ["h", "kl"]
    with pytest.raises(InputError, match="The first observable is a divergence"):
        observables_of(fp.kl())


def test_the_mirror_is_seen() -> None:
    """Without the other side of the divergence the law above fails: the two are different numbers."""
    back, ahead = enumerated(0.03)
    assert ahead.readings["kl"].change != pytest.approx(ahead.readings["kl before"].change, rel=1e-4)
    assert back.readings["kl"].change == pytest.approx(ahead.readings["kl"].change, rel=1e-9)
