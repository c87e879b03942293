"""Figures of an attribution: bars at the numbers, labels that no text can break, nothing cut off or covered."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from funcprobe.attribution.influence import Influence
from funcprobe.attribution.token_tables import movers
from funcprobe.errors import InputError, MissingExtraError
from funcprobe.report.canvas import new_axes
from funcprobe.report.figure_text import drawable
from funcprobe.report.figures import (
    plot_influence,
    plot_kinds,
    plot_layers,
    plot_movers,
    save_figures,
)
from tests.cases.written_attribution import NASTY, attribution, nasty, with_bars, words

FIGURES = [plot_layers, plot_kinds, plot_movers, lambda a: plot_movers(a, "prompts"), plot_influence]


def heights(ax: Any) -> dict[str, list[tuple[float, float]]]:
    """Return {legend label: [(start, size)]} of upright bars."""
    return {c.get_label(): [(p.get_y(), p.get_height()) for p in c.patches] for c in ax.containers}


def labels(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def grey(colour: Any) -> float:
    return float(np.dot(to_rgb(colour), (0.299, 0.587, 0.114)))


def test_bars_of_layers_are_the_parts_and_the_diamond_is_their_sum() -> None:
    found = attribution()
    ax, columns = plot_layers(found), found.columns("layers")
    drawn = heights(ax)
    for label, name in (("gradient on U", "gradient"), ("momentum", "momentum"), ("weight decay", "decay")):
        assert [size for _, size in drawn[label]] == pytest.approx(columns[name], rel=1e-12)
    (line,) = [x for x in ax.get_lines() if x.get_marker() == "D"]
    assert list(line.get_ydata()) == pytest.approx(columns["contribution"], rel=1e-12)
    assert labels(ax.xaxis) == ["embedding", "0", "1", "2", "final norm", "head"]
    assert ax.get_ylabel() == "contribution, nats per token"


def test_parts_of_one_sign_are_stacked_and_never_overlap() -> None:
    drawn = heights(plot_layers(attribution()))
    for k in range(6):
        spans = sorted(sorted((y, y + h)) for y, h in (bars[k] for bars in drawn.values()))
        assert len({np.sign(h) for _, h in (bars[k] for bars in drawn.values())}) == 2  # both signs are tried
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert start >= end - 1e-18


def test_the_jacobian_form_is_stacked_of_gradient_and_rest() -> None:
    found = attribution(form="jacobian")
    drawn = heights(plot_layers(found))
    assert list(drawn) == ["gradient on U", "rest"]
    assert [size for _, size in drawn["rest"]] == pytest.approx(found.columns("layers")["rest"], rel=1e-12)


def test_kinds_have_a_bar_each() -> None:
    found = attribution()
    ax = plot_kinds(found)
    assert labels(ax.yaxis) == found.columns("kinds")["kind"]
    widths = [p.get_width() for p in ax.containers[0].patches]
    assert widths == pytest.approx(found.columns("kinds")["gradient"], rel=1e-12)


@pytest.mark.parametrize("table", ["tokens", "sequences", "prompts"])
@pytest.mark.parametrize("of", ["batch", "evaluation"])
def test_movers_are_drawn_from_what_raises_most_to_what_lowers_most(table: str, of: Any) -> None:
    found = attribution(vocabulary=words())
    ax = plot_movers(found, table, of, count=3)
    up, down = movers(found.columns(table, of), 3)
    widths = [p.get_width() for p in ax.patches if isinstance(p, Rectangle)]
    assert widths == pytest.approx([*up["contribution"], *down["contribution"][::-1]], rel=1e-12)
    assert widths == sorted(widths, reverse=True)
    bottom, top = ax.get_ylim()
    assert bottom > top  # the first bar stands above
    first = ax.texts[0].get_text()
    assert float(first.removesuffix(" %").replace("−", "-")) == pytest.approx(
        100 * widths[0] / found.first_order, abs=0.51 if abs(widths[0] / found.first_order) >= 1 else 0.051
    )


@pytest.mark.parametrize(
    ("figure", "table", "upright"),
    [
        (plot_layers, "layers", True),
        (plot_kinds, "kinds", False),
        (lambda a: plot_movers(a, "prompts"), "prompts", False),
    ],
)
def test_intervals_stand_where_a_table_has_bars(figure: Any, table: str, upright: bool) -> None:
    found = with_bars(attribution((5,) * 12), 3e-5, table)
    ax = figure(found)
    (bars,) = [c for c in ax.containers if hasattr(c, "has_yerr")]
    spans = [s[:, int(upright)] for s in bars.lines[2][0].get_segments()]
    values = sorted(map(float, found.columns(table)["contribution"]))
    assert sorted(s.min() + 3e-5 for s in spans) == pytest.approx(values, rel=1e-9)
    assert [s.max() - s.min() for s in spans] == pytest.approx([9e-5] * len(values), rel=1e-9)
    low, high = ax.get_ylim() if upright else ax.get_xlim()
    assert all(low < s.min() < s.max() < high for s in spans)
    assert not [c for c in figure(attribution((5,) * 12)).containers if hasattr(c, "has_yerr")]


def test_an_interval_of_which_nothing_can_be_said_is_not_drawn() -> None:
    ax = plot_layers(with_bars(attribution(), float("inf"), "layers"))
    assert np.isfinite(ax.get_ylim()).all()
    ax.get_figure().canvas.draw()


def test_raising_and_lowering_differ_in_grey() -> None:
    colours = {p.get_width() > 0: p.get_facecolor()[:3] for p in plot_movers(attribution()).patches}
    assert grey(colours[True]) - grey(colours[False]) > 0.25
    stacked = [c.patches[0].get_facecolor()[:3] for c in plot_layers(attribution()).containers]
    shades = sorted(map(grey, stacked))
    assert min(b - a for a, b in itertools.pairwise(shades)) > 0.2


def test_influence_is_drawn_as_it_is_and_symmetric_about_0() -> None:
    found = attribution(influence=True)
    assert found.influence is not None
    ax = plot_influence(found)
    (image,) = ax.get_images()
    assert np.array_equal(np.asarray(image.get_array()), found.influence.matrix.numpy())
    low, high = image.get_clim()
    assert low == -high
    assert labels(ax.yaxis) == ["0", "1"]
    shades = [grey(image.cmap(x)) for x in np.linspace(0, 1, 33)]
    assert all(b > a for a, b in itertools.pairwise(shades))  # it reads in grey, sign included


def test_one_large_entry_does_not_pale_the_matrix() -> None:
    matrix = torch.full((10, 20), 1e-6, dtype=torch.float64)
    matrix[3, 4] = -1.0
    found = attribution(influence=True)
    many = Influence(matrix, "sequences", torch.arange(10))
    ax = plot_influence(type(found)(**{**vars(found), "influence": many}))
    assert ax.get_images()[0].get_clim()[1] == pytest.approx(1e-6)
    assert ax.get_images()[0].colorbar.extend == "both"


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("layers", [1, 28, 94])
def test_no_text_is_cut_off_and_none_covers_another(figure: Any, layers: int) -> None:
    found = attribution((9,) * 12, vocabulary=nasty(), words=len(NASTY), layers=layers, influence=True)
    ax = figure(found)
    ax.get_figure().canvas.draw()
    frame, ticks = ax.get_figure().bbox, ticks_shown(ax)
    legend = ax.get_legend().get_texts() if ax.get_legend() else []
    beside = [a.title for a in ax.get_figure().axes] + [a._left_title for a in ax.get_figure().axes]
    named = [x for a in ax.get_figure().axes for x in (a.xaxis.label, a.yaxis.label)]
    for text in [*ticks, *ax.texts, *legend, *beside, *named]:
        box = text.get_window_extent()
        if box.width:
            assert frame.x0 - 1 <= box.x0 < box.x1 <= frame.x1 + 1, text
            assert frame.y0 - 1 <= box.y0 < box.y1 <= frame.y1 + 1, text
    for one, other in itertools.combinations(ticks, 2):
        assert not one.get_window_extent().overlaps(other.get_window_extent()), (one, other)


def ticks_shown(ax: Any) -> list[Any]:
    """Return the tick labels that are drawn: those between the limits."""
    found = []
    for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        inside = [tick for tick in axis.get_major_ticks() if min(limits) <= tick.get_loc() <= max(limits)]
        found += [tick.label1 for tick in inside if tick.label1.get_text()]
    return found


def test_the_legend_covers_no_bar() -> None:
    for ax in (plot_layers(attribution()), plot_kinds(attribution())):
        ax.get_figure().canvas.draw()
        assert ax.get_legend().get_window_extent().x0 > ax.get_window_extent().x1


def test_untrusted_text_is_text() -> None:
    assert drawable("$a$ and $b$") == r"\$a\$ and \$b\$"
    assert drawable("a\nb\x1b") == "a⏎b‹U+001B›"
    assert drawable("\u202e") == "‹U+202E›"
    assert drawable("x" * 50, 10) == "x" * 9 + "…"
    assert len(drawable("\U0001f642" * 50, 10)) == 10
    assert drawable("\U000f0000") == "‹U+F0000›"  # no font has it


def test_figures_leave_an_axes_alone_that_is_given() -> None:
    for figure in (plot_layers, plot_kinds, plot_movers):
        ax = new_axes()
        assert figure(attribution(), ax=ax) is ax


def test_no_pyplot_state_is_made() -> None:
    code = (
        "import sys\nfrom tests.cases.written_attribution import attribution\n"
        "from funcprobe.report.figures import plot_layers\nplot_layers(attribution())\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_figures_are_written_and_a_matrix_only_where_there_is_one(tmp_path: Path) -> None:
    names = [path.name for path in save_figures(attribution(), tmp_path)]
    assert names == ["layers.png", "kinds.png", "tokens.png", "prompts.png"]
    (tmp_path / "with").mkdir()
    paths = save_figures(attribution(influence=True), tmp_path / "with")
    assert paths[-1].name == "influence.png"
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_where_nothing_moves_the_figures_say_so() -> None:
    still = attribution(scale=0.0, change=0.0, first_order=0.0)
    assert [t.get_text() for t in plot_movers(still).texts] == ["nothing contributes"]
    plot_layers(still).get_figure().canvas.draw()


def test_bad_asking_is_one_calm_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="Movers are drawn of tokens, sequences, prompts, found 'layers'"):
        plot_movers(attribution(), "layers")
    with pytest.raises(InputError, match="count is 0"):
        plot_movers(attribution(), count=0)
    with pytest.raises(InputError, match="has no influence matrix"):
        plot_influence(attribution())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"'matplotlib'.*pip install 'funcprobe\[app\]'"):
        plot_layers(attribution())
