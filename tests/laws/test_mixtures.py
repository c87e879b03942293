"""Mixtures of experts as transformers loads them, with grouped products: every verb works, and all of them agree."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest

import funcprobe as fp
from funcprobe.errors import FuncprobeWarning
from tests.cases import routing as routing_cases
from tests.cases.probes import Case, E, U, Variant, updates

NAMES = ["qwen3_moe", "mixtral"]


@functools.cache
def case(name: str, experts: str | None) -> Case:
    return Case(routing_cases.mixture(name, experts=experts))


def probed(c: Case) -> float:
    found = c.probe(1e-6, order=2)
    assert (found.mode, found.main.second_order is None) == ("forward", False)
    return found.change


def swept(c: Case) -> float:
    found = c.sweep([1e-7, 1e-6])
    assert found.mode == "forward"
    assert found.crossover_lr() is not None
    return found.readings()[1].change


def swept_in_chunks(c: Case) -> float:
    found = c.sweep([1e-7, 1e-6], chunk=2, order=1)
    assert found.mode == "forward"
    return found.readings()[1].change


def attributed(c: Case) -> float:
    found = fp.attribute(fp.Update.from_step(c.step, c.params, c.state, U, lr=1e-6), E)
    assert abs(found.completeness_error) < 1e-4  # float32 passes
    alone = c.probe(1e-6)
    assert found.first_order == pytest.approx(alone.first_order, rel=1e-4)
    return alone.change


def compared(c: Case) -> float:
    steps = {"one": Variant(c.step, lr=1e-7), "two": Variant(c.step, lr=1e-6)}
    found = fp.compare(updates(steps, c.params, c.state, U), E, observables={"entropy": fp.entropy()})
    assert found.mode == "forward"
    return found.reading("two").change


def largest(c: Case) -> float:
    whole = abs(c.probe(1e-6).change)
    found = c.largest(max_abs_delta=whole, between=(3e-7, 3e-6), relative=0.02)
    assert found.notes == ()
    return math.copysign(whole * found.lr / 1e-6, found.point.readings["rao_blackwell/per_decision/token"].change)


VERBS = [swept, swept_in_chunks, attributed, compared, largest]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", NAMES)
def test_every_verb_takes_a_mixture_as_it_is_loaded(name: str, verb: Callable[[Case], float]) -> None:
    # bisection stops at 2 %
    assert verb(case(name, None)) == pytest.approx(change_of(name, None), rel=0.02 if verb is largest else 1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_grouped_products_and_single_experts_agree(name: str) -> None:
    # their gradients are rounded in float32, and Adam divides by the size of each
    assert change_of(name, None) == pytest.approx(change_of(name, "eager"), rel=1e-2)


@functools.cache
def change_of(name: str, experts: str | None) -> float:
    return probed(case(name, experts))


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_reverse_mode_agree_on_a_mixture(name: str) -> None:
    c = case(name, None)
    forward, reverse = c.probe(1e-5), c.probe(1e-5, mode="reverse")
    assert reverse.first_order == pytest.approx(forward.first_order, rel=1e-3)
    assert reverse.outcome.routing == forward.outcome.routing
    assert forward.outcome.routing is not None
    assert (forward.outcome.routing.tokens, forward.outcome.routing.layers) == (len(routing_cases.seen(E)), 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_comparison_and_a_sweep_count_as_a_probe_does(name: str) -> None:
    c = case(name, "eager")
    with pytest.warns(FuncprobeWarning):
        alone = c.probe(2e-2, ess_threshold=0.0)
    with pytest.warns(FuncprobeWarning):
        swept = c.sweep([1e-2, 2e-2], ess_threshold=0.0)
    steps = {"one": Variant(c.step, lr=1e-9), "two": Variant(c.step, lr=2e-2)}
    compared = fp.compare(updates(steps, c.params, c.state, U), E, ess_threshold=0.0)
    assert alone.outcome.routing is not None
    assert alone.outcome.routing.changed > 0
    assert swept.points[1].routing == compared.outcomes["two"].routing == alone.outcome.routing
    assert any("sent to other experts" in text for text in compared.warnings["two"])
