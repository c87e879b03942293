from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from funcprobe.data.rollouts import rollouts_from_padded
from funcprobe.errors import InputError, MissingExtraError
from funcprobe.estimators.importance import log_ratios, pareto_khat, weight_health
from funcprobe.measurement.evidence import Evidence
from funcprobe.report.canvas import new_axes
from funcprobe.report.importance_weights import plot_weights, sizes_of
from funcprobe.types import TokenScores

SPREAD = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def evidence(weight: list[float]) -> Evidence:
    """Return three sequences of two tokens, whose log-weights are log 1, log 2 and log 8."""
    rollouts = rollouts_from_padded(
        torch.zeros(3, 3, dtype=torch.int64),
        torch.ones(3, 3, dtype=torch.bool),
        torch.tensor([[False, True, True]] * 3),
        temperature=1.0,
        group_ids=[0, 1, 2],
        weight=weight,
    )
    anchor = torch.full((3, 2), -3.0, dtype=torch.float64)
    moved = torch.tensor([[0.5, -0.5], [math.log(2), 0.0], [math.log(4), math.log(2)]], dtype=torch.float64)
    return Evidence(rollouts, TokenScores(anchor, -anchor), TokenScores(anchor + moved, -anchor))


def heights(ax: object) -> list[float]:
    """Return the heights of the bars that count sequences."""
    return [bar.get_height() for bar in ax.containers[0]]  # type: ignore[attr-defined]


def outlined(ax: object) -> float:
    """Return the sum of the outline's heights: its polygon steps up and down once a bin."""
    (patch,) = [p for p in ax.patches if type(p).__name__ == "Polygon"]  # type: ignore[attr-defined]
    return float(patch.get_xy()[1:-1:2, 1].sum())


def test_the_bars_count_sequences_and_the_outline_their_share() -> None:
    ax = plot_weights(SPREAD)
    assert sum(heights(ax)) == 200
    assert outlined(ax) == pytest.approx(200, rel=1e-12)
    few = plot_weights([0.0, 0.0, 0.0, math.log(9)])
    assert [h for h in heights(few) if h] == [3, 1]
    (patch,) = [p for p in few.patches if type(p).__name__ == "Polygon"]
    # 4 sequences of weights 1, 1, 1, 9: of 4 the first three hold 1, the last 3
    assert sorted({round(float(y), 12) for _, y in patch.get_xy()}) == [0.0, 1.0, 3.0]


def test_the_axes_name_quantity_and_unit() -> None:
    ax = plot_weights(SPREAD)
    assert ax.get_xlabel() == "sequence log-weight log p(θ′) − log p(θ), nats"
    assert ax.get_ylabel() == "sequences"


def test_the_title_gives_effective_sample_and_khat() -> None:
    khat = pareto_khat(SPREAD)
    w = SPREAD.exp()
    ess = float(w.sum() ** 2 / (w**2).sum())
    assert plot_weights(SPREAD).get_title(loc="left").endswith(f"\nESS {ess:.1f} of 200 sequences, Pareto k̂ {khat:.2f}")
    # weights 1, 1, 2: 4²/6
    title = plot_weights([0.0, 0.0, math.log(2)]).get_title(loc="left")
    assert title.endswith("\nESS 2.7 of 3 sequences, Pareto k̂ not fitted")


def test_log_weights_may_be_a_tensor_an_array_or_a_list() -> None:
    values = [0.1, -0.2, 0.05]
    for given in (values, np.array(values), torch.tensor(values, dtype=torch.float64)):
        assert sizes_of(given).logs.tolist() == values
    for single in (np.array(values, dtype=np.float32), torch.tensor(values)):
        assert sizes_of(single).logs.tolist() == pytest.approx(values, rel=1e-7)  # half a unit of float32


def test_scores_bring_their_log_weights() -> None:
    found = sizes_of(evidence([1.0, 1.0, 1.0]))
    assert found.logs.tolist() == pytest.approx([0.0, math.log(2), math.log(8)], abs=1e-12)
    assert found.ess == pytest.approx(11**2 / (1 + 4 + 64), rel=1e-12)
    assert "of 3 sequences" in plot_weights(evidence([1.0, 1.0, 1.0])).get_title(loc="left")


def test_base_weights_multiply_the_shares_and_leave_rows_out() -> None:
    step = evidence([4.0, 2.0, 0.0])
    found = sizes_of(step)
    assert found.logs.tolist() == pytest.approx([0.0, math.log(2)], abs=1e-12)
    assert found.shares.tolist() == pytest.approx([0.5, 0.5], rel=1e-12)
    assert (found.ess, found.ess_base) == pytest.approx((2.0, 36 / 20), rel=1e-12)
    title = plot_weights(step).get_title(loc="left")
    assert "ESS 2.0 of 1.8 by base weight alone" in title
    health = weight_health(log_ratios(step.after, step.anchor, step.rollouts), step.rollouts)
    assert (found.ess, found.ess_base, found.khat) == (health.ess_sequence, health.ess_base, health.khat)


def test_one_value_alone_stands_in_the_middle() -> None:
    for values in (torch.zeros(40), torch.full((30,), 5.0), [5.0, math.nextafter(5.0, 6.0)]):
        ax = plot_weights(values)
        found = heights(ax)
        assert found[len(found) // 2] == sum(found) == len(values)


def test_small_log_weights_have_bins_of_their_own_size() -> None:
    ax = plot_weights(1e-9 * SPREAD)
    assert heights(ax) == heights(plot_weights(SPREAD))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(3, 2), r"shape \(3, 2\); expected one for every sequence"),
        (torch.tensor(1.0), r"shape \(\); expected"),
        ([], r"shape \(0,\); expected"),
        ([0.0, math.nan, -math.inf], "2 of 3 log-weights are not finite; leave"),
    ],
)
def test_what_is_no_vector_of_log_weights_is_refused(given: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plot_weights(given)  # type: ignore[arg-type]


def test_arguments_are_left_as_they_were() -> None:
    given = SPREAD.clone().requires_grad_()
    plot_weights(given)
    assert given.grad is None
    assert torch.equal(given.detach(), SPREAD)


def test_axes_of_the_caller_are_drawn_on_and_returned() -> None:
    ax = new_axes()
    assert plot_weights(SPREAD, ax) is ax


def test_without_matplotlib_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"'matplotlib'.*pip install 'funcprobe\[app\]'"):
        plot_weights(SPREAD)
