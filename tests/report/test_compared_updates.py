"""The figure of a comparison shows what the comparison holds."""

from __future__ import annotations

import math

import pytest

from funcprobe.errors import InputError
from funcprobe.report.figures import plot_comparison
from tests.cases.written_comparison import comparison


def points(ax: object, marker: str) -> list[float]:
    """Return where markers of that kind stand, legend entries left out."""
    lines = [line for line in ax.get_lines() if line.get_marker() == marker]  # type: ignore[attr-defined]
    return [float(line.get_xdata()[0]) for line in lines if len(line.get_xdata()) == 1]


def test_every_update_stands_at_its_change_with_its_interval_and_first_order() -> None:
    found = comparison()
    ax = plot_comparison(found)
    assert points(ax, "o") == [found.reading(step).change for step in found.outcomes]
    assert points(ax, "|") == [found.reading(step).first_order for step in found.outcomes]
    ends = [
        tuple(map(float, line.get_xdata())) for line in ax.get_lines() if list(line.get_ydata()) in ([0, 0], [1, 1])
    ]
    assert ends == [(b.low, b.high) for b in (found.reading(s).bars["change"] for s in found.outcomes)]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["grpo", r"a third, \$lr\$"]
    assert "nats per token" in ax.get_xlabel()


def test_differences_leave_the_baseline_out() -> None:
    found = comparison()
    ax = plot_comparison(found, "kl", differences=True)
    assert points(ax, "o") == [found.difference("a third, $lr$", "kl").value]
    assert points(ax, "|") == []
    assert "grpo" in ax.get_xlabel()


def test_without_bars_there_are_points_alone() -> None:
    ax = plot_comparison(comparison(bars=False))
    assert len(points(ax, "o")) == 2
    assert all(math.isfinite(x) for line in ax.get_lines() for x in line.get_xdata())
    with pytest.raises(InputError, match="no update 'grpo' with observable 'nowhere'"):
        plot_comparison(comparison(), "nowhere")
