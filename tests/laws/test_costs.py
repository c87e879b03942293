"""The totals that docs/verbs.md states, counted: forward passes over U (u) and E (e), in FLOPs of the same model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import funcprobe as fp
from funcprobe import engine
from tests.cases import models
from tests.cases.probes import Case, prompted
from tests.cases.tables import observables

E, U = prompted(64, 8, seed=1), prompted(16, 8, seed=2, first=100)
THREE = observables("entropy", "reward", "kl")

#: What is not a pass over E or U: arithmetic is looked up on two tokens, a first tangent is tried on seven.
SLACK = 0.05


def two_products(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    batch, heads, queries, features = query
    return 2 * batch * heads * queries * key[-2] * (features + value[-1])


def flops(run: Callable[[], Any]) -> int:
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: two_products}  # which torch does not count
    with engine.math_attention(), FlopCounterMode(display=False, custom_mapping=fused) as counter:
        run()
    return counter.get_total_flops()


@functools.cache
def case(dtype: torch.dtype = torch.float32) -> Case:
    """Return a case whose model has made its trials."""
    made = Case(models.qwen2(dtype))
    made.probe(1e-4, evaluation=E, batch=U)
    return made


@functools.cache
def of_one_pass(rollouts: str) -> int:
    made = case()
    return flops(lambda: fp.score(made.policy, made.params, {"E": E, "U": U}[rollouts]))


def beyond(run: Callable[[], Any]) -> float:
    """Return the passes over E that a run takes beside three over U, which its gradient is."""
    passes = of_one_pass("U"), of_one_pass("E")  # and the trials of the model are made
    return (flops(run) - 3 * passes[0]) / passes[1]


def test_a_probe_by_difference_is_four() -> None:
    def probed() -> fp.ProbeResult:
        return case().probe(1e-3, evaluation=E, batch=U, method="difference", rounding=False)

    assert 3.5 < beyond(probed) <= 4 + SLACK


@pytest.mark.parametrize("lr", [3e-3, 1e-4, 1e-5, 1e-6, 1e-8])
def test_a_default_probe_is_at_most_seven_and_two_more_with_the_rounding_row(lr: float) -> None:
    results: list[fp.ProbeResult] = []
    cost = beyond(lambda: results.append(case().probe(lr, evaluation=E, batch=U, observables=THREE)))
    (result,) = results
    stored = any(reading.stored is not None for reading in result.readings.values())
    row = result.outcome.rounding is not None
    # where storing sets θ′ apart from θ + Δθ there are two steps, each by one node of a path at most
    assert cost <= (7 if not stored else 11) + 2 * row + SLACK


def swept(top: float, count: int, **options: Any) -> tuple[float, fp.Reading]:
    """Return the cost of a sweep up to a learning rate, and its last reading."""
    results: list[fp.SweepResult] = []
    lrs = list(np.geomspace(1e-8, top, count))
    given = {"evaluation": E, "batch": U, "observables": THREE, "bars": None, **options}
    cost = beyond(lambda: results.append(case().sweep(lrs, **given)))
    return cost, results[0].readings()[-1]


@pytest.mark.parametrize("count", [3, 60])
def test_a_sweep_by_tangents_is_at_most_thirteen_for_any_number_of_learning_rates(count: int) -> None:
    cost, last = swept(3e-4, count, method="path")
    assert (last.method, last.nodes <= 2) == ("path", True)
    # the anchor with its tangents, the nodes, the end, and rules of one node more at a time on a sixteenth of E
    assert cost <= 3 + 3 * last.nodes + 1 + 3 * sum(range(1, last.nodes + 2)) / 16 + SLACK <= 13


@pytest.mark.parametrize("count", [3, 60])
def test_a_sweep_by_values_is_six_and_a_part_for_any_number_of_learning_rates(count: int) -> None:
    cost, last = swept(3e-4, count, order=1, observables=None)
    assert (last.method, last.nodes) == ("values", 3)
    # the anchor with its tangents, three values, and four on a sixteenth of E
    assert cost <= 3 + 3 + 4 / 16 + SLACK


def test_the_largest_learning_rate_is_one_curve_and_one_pass() -> None:
    found: list[fp.LargestLr] = []

    def searched() -> None:
        found.append(case().largest(evaluation=E, batch=U, max_nonlinearity=0.01, between=(1e-8, 1e-2), relative=1e-3))

    # three nodes at most, the end of the curve and the answer, and four rules on a sixteenth of E
    assert beyond(searched) <= 3 + 9 + 1 + 1 + 3 * 10 / 16 + SLACK
    assert found[0].tried == 1


def test_a_comparison_shares_its_pass_with_tangents() -> None:
    def compared() -> None:
        own = {"grpo": fp.grpo(), "dapo": fp.dapo(), "bonus": fp.entropy_bonus(fp.grpo())}
        update = case().update(1e-3, batch=U)
        fp.compare(
            {name: update.vary(objective=objective) for name, objective in own.items()},
            E,
            method="difference",
        )

    # over U one forward pass for all and two for each; over E a scoring pass each, and one pass with three tangents
    passes = of_one_pass("U"), of_one_pass("E")  # and the trials of the model are made
    assert (flops(compared) - (1 + 2 * 3) * passes[0]) / passes[1] <= 1 + 3 * 3 + 2 * SLACK


def test_an_attribution_is_a_probe_and_three_passes_over_either_side() -> None:
    options: dict[str, Any] = {"method": "difference", "rounding": False}
    passes = of_one_pass("U"), of_one_pass("E")
    update = case().update(1e-3, batch=U)
    probed = flops(lambda: fp.probe(case().update(1e-3, batch=U), E, **options))
    attributed = flops(lambda: fp.attribute(update, E, **options))
    # beside it ∇F by reverse mode, ∇F carried back along U in forward mode, and a gradient of each of three rows of U
    assert (attributed - probed) <= 3 * passes[1] + 3 * passes[0] + 9 * passes[0] / len(U.ids) + SLACK * passes[1]


def test_parts_without_a_measurement_are_a_gradient_on_either_side_and_a_pass_over_u() -> None:
    passes = of_one_pass("U"), of_one_pass("E")
    rows = 9 * passes[0] / len(U.ids)  # a gradient of each of three rows of U
    anew = flops(lambda: fp.attribute(case().update(1e-3, batch=U), E, measure=False))
    # E is run in two pieces here, so its scores come first: one pass more
    assert anew <= 4 * passes[1] + 6 * passes[0] + rows + SLACK * passes[1]
    update = case().update(1e-3, batch=U)
    kept = fp.covector(update, E)
    again = flops(lambda: fp.attribute(update, E, measure=False, covector=kept))
    assert again <= 6 * passes[0] + rows + SLACK * passes[1]


@pytest.mark.parametrize("chunk", [None, 2])
def test_an_influence_matrix_is_a_gradient_of_every_row(chunk: int | None) -> None:
    e, u = prompted(4, 2, seed=1), prompted(4, 4, seed=2, first=100)
    update = case().update(1e-3, batch=u)
    passes = [flops(lambda r=r: fp.score(case().policy, case().params, r)) for r in (u, e)]
    plain, made = (
        flops(lambda w=w: fp.attribute(update, e, measure=False, influence=w, chunk=chunk)) for w in (None, "sequences")
    )
    chunks = 1 if chunk is None else len(e.ids) // chunk
    products = 2 * len(e.ids) * len(u.ids) * fp.tree.size(case().params)
    # rows by themselves are cut to their own length, and so are no more than the batch
    assert made - plain <= 3 * passes[1] + chunks * 3 * passes[0] + products + SLACK * passes[1]
