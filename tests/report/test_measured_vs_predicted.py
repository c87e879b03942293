from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from funcprobe.errors import InputError, MissingExtraError
from funcprobe.report.canvas import new_axes, write
from funcprobe.report.figures import draw
from funcprobe.report.measured_vs_predicted import limits, plot_measured_vs_predicted, points
from funcprobe.results.blocks import Figure
from funcprobe.types import Estimate
from tests.cases.written_probe import family, result

NAME = "rao_blackwell/per_decision/token"


def drawn(found: object) -> dict[str, tuple[float, float]]:
    """Return {label: (x, y)} of the single points of some Axes."""
    lines = [line for line in found.get_lines() if len(line.get_xdata()) == 1]  # type: ignore[attr-defined]
    return {str(line.get_label()): (line.get_xdata()[0], line.get_ydata()[0]) for line in lines}


def test_every_member_is_a_point_at_predicted_and_measured_change() -> None:
    found = drawn(plot_measured_vs_predicted(result()))
    labels = [label for label in found if not label.startswith("_")]
    assert len(labels) == 8
    x, y = found["surprisal, sequence, per sequence"]
    estimate = family()["surprisal/sequence/sequence"]
    assert estimate.first_order is not None
    # the axes are in percent of |F|; both sides are one multiplication and one division apart
    assert x == pytest.approx(100 * estimate.first_order / estimate.before, rel=1e-12)
    assert y == pytest.approx(100 * estimate.change / estimate.before, rel=1e-12)


def test_the_diagonal_is_where_measured_equals_predicted_and_both_axes_share_limits() -> None:
    ax = plot_measured_vs_predicted(result())
    diagonal = next(line for line in ax.get_lines() if line.get_label() == "linear: ΔF = δF₁")
    assert np.array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    assert ax.get_xlim() == ax.get_ylim() == (diagonal.get_xdata()[0], diagonal.get_xdata()[-1])
    for x, y in drawn(ax).values():
        assert ax.get_xlim()[0] < x < ax.get_xlim()[1]
        assert ax.get_xlim()[0] < y < ax.get_xlim()[1]


@pytest.mark.parametrize(
    ("scale", "unit"), [(1.0, "% of |F(θ)|"), (1e-6, "10$^{-9}$ |F(θ)|"), (0.0, "% of |F(θ)|"), (1e300, "|F(θ)|")]
)
def test_the_axes_name_their_unit_at_every_scale(scale: float, unit: str) -> None:
    ax = plot_measured_vs_predicted(result(family=family(scale)))
    assert ax.get_xlabel() == f"predicted δF₁, {ax.get_ylabel().removeprefix('measured ΔF, ')}"
    assert ax.get_xlabel().endswith(unit)
    assert "nats per token" in ax.get_title(loc="left")
    assert max(abs(limit) for limit in ax.get_xlim()) < 1000


@pytest.mark.parametrize("sign", [1, -1])
def test_changes_that_agree_fill_the_figure_and_the_origin_is_held_where_it_is_near(sign: int) -> None:
    low, high = limits([sign * 0.60, sign * 0.62, sign * 0.64])
    assert 0.04 < high - low < 0.06  # three values over 0.04, and a margin: not the 0.64 down to the origin
    assert limits([sign * 1.0, sign * 3.0])[0 if sign > 0 else 1] * sign < 0
    assert limits([sign * 0.5, sign * 0.5]) == (sign * 0.5 - 0.5, sign * 0.5 + 0.5)
    assert limits([0.0, 0.0]) == (-1.0, 1.0)


def test_what_was_asked_for_is_ringed() -> None:
    ax = plot_measured_vs_predicted(result())
    ring = max(ax.get_lines(), key=lambda line: line.get_markersize())
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == drawn(ax)["Rao–Blackwell, per decision, per token (ringed)"]


def test_in_reverse_mode_only_the_member_with_a_first_order_is_drawn() -> None:
    members = {n: e if n == NAME else Estimate(*e[:3], None) for n, e in family().items()}
    main, others = points(result(family=members, mode="reverse"))
    assert main.name == NAME
    assert others == []


def test_another_proposal_than_the_family_s_is_a_point_of_its_own() -> None:
    main, others = points(result(change=-0.5, first_order=-0.4))
    assert main.measured == -0.5 / result().before
    assert NAME in [p.name for p in others]


def test_an_observable_outside_the_family_and_at_zero_is_drawn() -> None:
    ax = plot_measured_vs_predicted(result(observable="reward", unit="reward", before=0.0, change=0.1, first_order=0.1))
    assert "reward (ringed)" in drawn(ax)


def test_the_legend_covers_no_point() -> None:
    ax = plot_measured_vs_predicted(result())
    ax.figure.canvas.draw()
    legend = ax.get_legend()
    assert legend is not None
    inside, box = ax.get_window_extent(), legend.get_window_extent()
    assert box.x0 >= inside.x1
    assert box.x1 <= ax.figure.bbox.x1 + 1  # a pixel of rounding
    assert box.y0 >= 0


def test_axes_of_the_caller_are_drawn_on_and_returned() -> None:
    ax = new_axes()
    assert plot_measured_vs_predicted(result(), ax) is ax


def test_an_image_is_written_and_pyplot_stays_unloaded(tmp_path: Path) -> None:
    script = (
        "import sys; from funcprobe.report.figures import save_figures; from tests.cases.written_probe import result\n"
        f"save_figures(result(), {str(tmp_path)!r})\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
    assert (tmp_path / "measured_vs_predicted.png").read_bytes().startswith(b"\x89PNG")


def test_the_extension_chooses_the_format(tmp_path: Path) -> None:
    write(draw(result(), Figure("measured_vs_predicted")), tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_without_matplotlib_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"'matplotlib'.*pip install 'funcprobe\[app\]'"):
        plot_measured_vs_predicted(result())


def test_an_unknown_figure_is_refused() -> None:
    with pytest.raises(InputError, match="There is no figure 'joy'; the figures are measured_vs_predicted, "):
        draw(result(), Figure("joy"))


def test_an_update_without_a_learning_rate_has_a_title_too() -> None:
    assert plot_measured_vs_predicted(result(lr=None)).get_title(loc="left").startswith("The update\n")
