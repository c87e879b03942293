from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from funcprobe.errors import InputError, MissingExtraError
from funcprobe.estimators.uncertainty import Bar
from funcprobe.report.canvas import new_axes, write
from funcprobe.report.figures import plot_remainder, plot_sweep, save_figures
from funcprobe.results.sweep_law import law_of, remainder_fit
from funcprobe.results.sweep_words import fit_text
from tests.cases.written_sweep import DIVERGENCE, ENTROPY, LRS, REWARD, sweep, with_reading

PATHS = LRS[:5]  # by path, in a sweep of the cases; the others by difference


def line(ax: Any, label: str) -> Any:
    """Return the one line whose label begins so."""
    (found,) = [x for x in ax.get_lines() if str(x.get_label()).startswith(label)]
    return found


def drawn(ax: Any, label: str) -> list[tuple[float, float]]:
    found = line(ax, label)
    return list(zip(found.get_xdata(), found.get_ydata(), strict=True))


def labels(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def intervals(ax: Any) -> dict[float, tuple[float, float]]:
    """Return {lr: (low, high)} of the error bars."""
    bars = [c for c in ax.containers if hasattr(c, "has_yerr")]
    segments = [s for c in bars for s in c.lines[2][0].get_segments()]
    return {float(s[0, 0]): (float(s[:, 1].min()), float(s[:, 1].max())) for s in segments}


def size(law: tuple[float, float, float], lr: float) -> float:
    return abs(law[0] * lr + law[1] * lr**2 + law[2] * lr**3)


def test_every_learning_rate_is_a_triangle_at_the_size_of_its_change() -> None:
    ax = plot_sweep(sweep())
    path, difference = line(ax, "ΔF < 0, by path"), line(ax, "ΔF < 0, by difference")
    assert drawn(ax, "ΔF < 0, by path") == [(lr, size(ENTROPY, lr)) for lr in PATHS]
    assert drawn(ax, "ΔF < 0, by difference") == [(lr, size(ENTROPY, lr)) for lr in LRS[5:]]
    assert {path.get_marker(), difference.get_marker()} == {"v"}
    assert sum(to_rgb(path.get_markerfacecolor())) < 1 < 2 < sum(to_rgb(difference.get_markerfacecolor()))


def test_the_axes_are_logarithmic_and_name_quantity_and_unit() -> None:
    ax = plot_sweep(sweep())
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("learning rate η", "|ΔF|, nats per token")
    assert plot_remainder(sweep()).get_ylabel() == "|ΔF − δF₁|, nats per token"
    assert ax.get_title(loc="left").startswith("One step at 7 learning rates: entropy\n")


def test_everything_measured_lies_inside_the_frame() -> None:
    for ax in (plot_sweep(sweep()), plot_remainder(sweep()), plot_sweep(sweep(lrs=(1e-5,)))):
        (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
        shown = [x for x in ax.get_lines() if x.get_marker() not in ("None", "", None)]
        assert shown
        for x, y in [point for found in shown for point in zip(found.get_xdata(), found.get_ydata(), strict=True)]:
            assert left < x < right
            assert bottom <= y < top


def test_an_interval_is_that_of_the_size() -> None:
    found = sweep()
    bars = {point.lr: point.readings["entropy"].bars["change"] for point in found.points}
    for lr, (low, high) in intervals(plot_sweep(found)).items():
        # an end and the reach from it are added again: a few roundings
        assert (low, high) == pytest.approx((-bars[lr].high, -bars[lr].low), rel=1e-12)
    assert len(intervals(plot_sweep(found))) == len(LRS)


def test_an_interval_that_holds_0_leaves_the_frame_below_and_the_legend_says_so() -> None:
    found = sweep(spread=0.3)  # a standard error of 1.05 of the change
    ax = plot_sweep(found)
    bar = found.points[2].readings["entropy"].bars["change"]
    assert bar.low < 0 < bar.high
    low, high = intervals(ax)[1e-7]
    assert low < ax.get_ylim()[0]
    assert high == pytest.approx(max(-bar.low, bar.high), rel=1e-12)
    assert "95 % interval over prompts,\nto the edge where it holds 0" in labels(ax)
    assert "95 % interval over prompts" in labels(plot_sweep(sweep()))


def test_an_infinite_interval_crosses_the_frame() -> None:
    bar = Bar(-2.26e-6, math.inf, -math.inf, math.inf, 0.9)
    ax = plot_sweep(with_reading(sweep(), 1e-7, bars={"change": bar}))
    low, high = intervals(ax)[1e-7]
    assert low < ax.get_ylim()[0] < ax.get_ylim()[1] < high < math.inf


def test_optimistic_intervals_are_dashed_and_named() -> None:
    ax = plot_sweep(sweep(caveats={1e-3: ("12 prompts, 30 are needed",)}))
    solid, dashed = [c for c in ax.containers if hasattr(c, "has_yerr")]
    assert (len(solid.lines[2][0].get_segments()), len(dashed.lines[2][0].get_segments())) == (6, 1)
    assert solid.lines[2][0].get_linestyle() != dashed.lines[2][0].get_linestyle()
    assert "95 % interval over prompts,\noptimistic" in labels(ax)


def test_without_bars_there_are_no_intervals() -> None:
    ax = plot_sweep(sweep(bars=False))
    assert intervals(ax) == {}
    assert not any("interval" in label for label in labels(ax))
    assert "slope" in ax.get_title(loc="left")
    assert "±" not in ax.get_title(loc="left")


def test_the_lines_are_what_first_and_second_order_predict() -> None:
    ax = plot_sweep(sweep())
    a, b, _ = ENTROPY
    for label, predicted in (("first order", lambda x: a * x), ("first + second", lambda x: a * x + b * x**2)):
        x, y = (np.asarray(part) for part in line(ax, label).get_data())
        # relative to |aη|, for the sum goes through 0 at the crossover
        assert np.allclose(y, np.abs(predicted(x)), rtol=0, atol=1e-12 * np.abs(a * x).max())
        assert np.all(np.abs(y - np.abs(predicted(x))) <= 1e-12 * np.abs(a * x))
        assert (x[0], x[-1]) == pytest.approx(ax.get_xlim())


def test_where_the_multiple_changes_the_line_goes_through_every_prediction() -> None:
    found = with_reading(sweep(lrs=(1e-6, 1e-5, 1e-4)), 1e-5, first_order=-3e-4)
    x, y = (np.log(part) for part in line(plot_sweep(found), "first order").get_data())
    for lr, expected in ((1e-6, 22.6e-6), (1e-5, 3e-4), (1e-4, 22.6e-4)):
        # between two of 801 places over 4 decades: a few thousandths in the logarithm
        assert np.interp(math.log(lr), x, y) == pytest.approx(math.log(expected), abs=0.01)


def test_of_a_divergence_only_second_order_is_drawn() -> None:
    ax = plot_sweep(sweep({"kl": DIVERGENCE}))
    assert "second order |δF₂|" in labels(ax)
    assert not any(label.startswith(("first", "linear", "crossover")) for label in labels(ax))
    x, y = (np.asarray(part) for part in line(ax, "second order").get_data())
    assert np.allclose(y, DIVERGENCE[1] * x**2, rtol=1e-12)


def test_a_first_order_sweep_has_neither_curve_nor_ends() -> None:
    for found in (sweep(order=1), sweep(mode="reverse")):
        words = labels(plot_sweep(found)) + labels(plot_remainder(found))
        assert "first order |δF₁|" in words
        assert not any("second" in word or "crossover" in word or "within" in word for word in words)


def test_rings_are_the_subtraction_and_crosses_where_it_fails() -> None:
    ax = plot_sweep(sweep())
    rings = line(ax, "float32 subtraction")
    assert (rings.get_marker(), rings.get_markerfacecolor()) == ("o", "none")
    assert list(rings.get_xdata()) == list(PATHS)
    assert list(rings.get_ydata()) == pytest.approx([abs(5e-8 - size(ENTROPY, lr)) for lr in PATHS], rel=1e-12)
    assert drawn(ax, "float error above 10 %") == drawn(ax, "float32 subtraction")[:2]


def test_a_subtraction_that_gives_0_lies_on_the_lower_edge() -> None:
    ax = plot_sweep(with_reading(sweep(), 1e-9, subtraction=0.0))
    assert drawn(ax, "float32 subtraction")[0] == (1e-9, ax.get_ylim()[0])
    assert drawn(ax, "float error above 10 %")[0] == (1e-9, ax.get_ylim()[0])


def test_a_path_alone_leaves_no_ring() -> None:
    found = sweep()
    for lr in PATHS:
        found = with_reading(found, lr, subtraction=None)
    assert not any("subtraction" in label or "float error" in label for label in labels(plot_sweep(found)))


def test_what_was_measured_by_a_lost_difference_is_crossed() -> None:
    ax = plot_sweep(sweep(path_below=0.0))
    assert [lr for lr, _ in drawn(ax, "float error above 10 %")] == [1e-9, 1e-8]
    assert [lr for lr, _ in drawn(ax, "ΔF < 0, by difference")] == list(LRS)
    assert not any("subtraction" in label for label in labels(ax))


def test_a_lost_number_far_below_the_others_does_not_stretch_the_axis() -> None:
    ax = plot_sweep(with_reading(sweep(path_below=0.0), 1e-8, change=-1e-22, bars={}))
    assert ax.get_ylim()[0] > 1e-10
    assert (1e-8, ax.get_ylim()[0]) in drawn(ax, "float error above 10 %")


def test_both_directions_have_their_own_triangle() -> None:
    turns = (-1e-3, 10.0, 0.0)  # falls below η = 1e-4, rises above
    ax = plot_sweep(sweep({"entropy": turns}, lrs=(1e-6, 1e-5, 1e-3), path_below=0.0))
    assert [lr for lr, _ in drawn(ax, "ΔF < 0, by difference")] == [1e-6, 1e-5]
    assert [lr for lr, _ in drawn(ax, "ΔF > 0, by difference")] == [1e-3]
    assert line(ax, "ΔF > 0").get_marker() == "^"
    assert line(ax, "ΔF < 0").get_marker() == "v"


def test_upright_lines_stand_at_the_crossover_and_a_twentieth_of_it() -> None:
    ax = plot_sweep(sweep())
    crossover = 22.6 / 3590
    assert list(line(ax, "crossover").get_xdata()) == pytest.approx([crossover] * 2)
    assert list(line(ax, "linear within 5 %").get_xdata()) == pytest.approx([crossover / 20] * 2)
    assert "linear within 5 % up to\nη = 3.1e-4" in labels(ax)
    assert "crossover |δF₂| = |δF₁| at\nη = 6.3e-3" in labels(ax)


def test_an_end_off_the_figure_stands_in_the_legend_alone() -> None:
    ax = plot_sweep(sweep(lrs=(1e-8, 1e-7)))
    assert "crossover |δF₂| = |δF₁| at\nη = 6.3e-3, off the figure" in labels(ax)
    assert list(line(ax, "crossover").get_xdata()) == []
    assert ax.get_xlim()[1] < 1e-5


@pytest.mark.parametrize(
    "found", [sweep(), sweep(order=1), sweep(mode="reverse"), sweep({"reward": REWARD}), sweep({"kl": DIVERGENCE})]
)
def test_the_title_gives_slope_and_r_squared_of_the_law(found: Any) -> None:
    law = law_of(found)
    assert law.fit is not None
    assert f"{fit_text(law.fit)}, from {law.fit.points} learning rates" in plot_sweep(found).get_title(loc="left")
    assert ("float error not estimated" in plot_sweep(found).get_title(loc="left")) == (found.mode == "reverse")


def test_one_learning_rate_has_points_and_no_slope() -> None:
    for plot in (plot_sweep, plot_remainder):
        ax = plot(sweep(lrs=(1e-5,)))
        assert ax.get_title(loc="left").startswith("One step at lr 1e-5: entropy")
        assert ax.get_title(loc="left").endswith("\na slope takes two learning rates")
        assert ax.get_xlim()[1] / ax.get_xlim()[0] >= 29  # a decade and a half, for the lines to be seen
        assert len(intervals(ax)) == 1


def test_few_decades_leave_no_labels_that_run_into_one_another() -> None:
    ax = plot_sweep(sweep(lrs=(1e-5,)))
    ax.figure.canvas.draw()
    assert not any(label.get_text() for label in ax.get_xticklabels(minor=True))
    left, right = ax.get_xlim()
    assert any(left < tick < right for tick in ax.get_xticks())


def test_a_change_of_exactly_0_lies_on_the_edge_and_a_sweep_of_them_says_so() -> None:
    some = with_reading(sweep(), 1e-4, change=0.0, bars={})
    ax = plot_sweep(some)
    assert drawn(ax, "ΔF = 0 (at the edge)") == [(1e-4, ax.get_ylim()[0])]
    ax = plot_sweep(sweep({"entropy": (0.0, 0.0, 0.0)}, path_below=0.0))
    assert "0 at every learning rate" in [text.get_text() for text in ax.texts]
    assert len(drawn(ax, "ΔF = 0")) == len(LRS)


def test_the_remainder_is_drawn_beside_second_order_and_slope_2() -> None:
    ax = plot_remainder(sweep())
    _, b, c = ENTROPY
    found = dict(drawn(ax, "ΔF − δF₁ > 0, by path") + drawn(ax, "ΔF − δF₁ > 0, by difference"))
    assert list(found) == list(LRS)
    for lr, y in found.items():
        # a float64 subtraction of numbers of size 22.6 η
        assert y == pytest.approx(b * lr**2 + c * lr**3, abs=1e-15 * 22.6 * lr)
    x, y = (np.asarray(part) for part in line(ax, "second order").get_data())
    assert np.allclose(y, b * x**2, rtol=1e-12)
    x, y = (np.log(part) for part in line(ax, "slope 2").get_data())
    assert np.allclose(np.diff(y) / np.diff(x), 2.0)


def test_a_lost_remainder_is_crossed_and_not_in_the_slope() -> None:
    found = sweep()
    ax, fit = plot_remainder(found), remainder_fit(found)
    assert fit is not None
    # 1e-9 by its path's error, 1e-4 not: 5e-8 is .14 % of 3.59e-5
    assert [lr for lr, _ in drawn(ax, "float error above 10 %")] == [1e-9]
    assert fit.points == 5
    assert f"{fit_text(fit)}, from 5 learning rates up to 1e-4" in ax.get_title(loc="left")
    assert fit.slope.value == pytest.approx(2.0, abs=1e-3)


def test_the_remainder_has_intervals_in_forward_mode_only() -> None:
    assert len(intervals(plot_remainder(sweep()))) == len(LRS)
    assert intervals(plot_remainder(sweep(mode="reverse"))) == {}
    assert len(intervals(plot_sweep(sweep(mode="reverse")))) == len(LRS)


def test_no_two_kinds_of_mark_or_line_differ_in_colour_alone() -> None:
    turns = sweep({"entropy": ENTROPY}, caveats={1e-3: ("few",)})
    turns = with_reading(turns, 1e-3, change=0.01, bars={"change": Bar(0.01, 0.02, -0.03, 0.05)})
    for ax in (plot_sweep(turns), plot_remainder(turns)):
        looks = []
        for found in ax.get_lines():
            if not str(found.get_label()).startswith("_"):
                face = found.get_markerfacecolor()
                grey = None if face == "none" else round(float(np.dot(to_rgb(face), (0.3, 0.6, 0.1))), 1)
                marked = found.get_marker() not in ("None", "", None)
                dash = found._unscaled_dash_pattern  # matplotlib returns "--" for every dash of one's own
                looks.append((found.get_marker(), grey) if marked else str(dash))
        assert len(looks) >= 5
        assert len({str(look) for look in looks}) == len(looks)


def test_the_fullest_legend_fits_beside_the_axes() -> None:
    found = sweep(spread=0.3, caveats={1e-3: ("few",)})
    ax = plot_sweep(with_reading(found, 1e-3, change=0.01))
    ax.figure.canvas.draw()
    box, inside = ax.get_legend().get_window_extent(), ax.get_window_extent()
    assert len(labels(ax)) >= 10
    assert box.x0 >= inside.x1
    assert box.x1 <= ax.figure.bbox.x1 + 1  # a pixel of rounding
    assert box.y0 >= 0
    assert inside.width > 0.45 * ax.figure.bbox.width


def test_axes_of_the_caller_are_drawn_on_and_returned() -> None:
    for plot in (plot_sweep, plot_remainder):
        ax = new_axes()
        assert plot(sweep(), "entropy", ax) is ax


def test_another_observable_is_drawn_by_name_and_an_unknown_one_refused() -> None:
    found = sweep({"entropy": ENTROPY, "reward": REWARD})
    ax = plot_sweep(found, "reward")
    assert ax.get_ylabel() == "|ΔF|, reward"
    assert drawn(ax, "ΔF > 0, by path")[0] == (1e-9, size(REWARD, 1e-9))
    for plot in (plot_sweep, plot_remainder):
        with pytest.raises(InputError, match="no observable 'length'; it has entropy, reward"):
            plot(found, "length")


def test_every_observable_has_its_file(tmp_path: Path) -> None:
    laws = {"entropy": ENTROPY, "reward": REWARD, "a/b": REWARD, "a b": REWARD}
    paths = save_figures(sweep(laws, lrs=(1e-6, 1e-5)), tmp_path)
    assert [p.name for p in paths] == [
        "sweep.png",
        "remainder.png",
        "sweep-reward.png",
        "sweep-a-b.png",
        "sweep-a-b-.png",
    ]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)


def test_pyplot_stays_unloaded(tmp_path: Path) -> None:
    script = (
        "import sys; from funcprobe.report.figures import save_figures\n"
        "from tests.cases.written_sweep import sweep\n"
        f"save_figures(sweep(lrs=(1e-6, 1e-5)), {str(tmp_path)!r})\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


def test_without_matplotlib_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for plot in (plot_sweep, plot_remainder):
        with pytest.raises(MissingExtraError, match=r"'matplotlib'.*pip install 'funcprobe\[app\]'"):
            plot(sweep())


@pytest.mark.parametrize("found", [sweep(mode="reverse"), sweep(spread=0.0), sweep({"entropy": (0.0, 0.0, 0.0)})])
def test_whatever_a_sweep_lacks_it_can_be_written(found: Any, tmp_path: Path) -> None:
    write(plot_sweep(found), tmp_path / "a.svg")
    write(plot_remainder(found), tmp_path / "b.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()
