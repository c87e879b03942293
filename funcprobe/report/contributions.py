"""Figures of an attribution: which layers, kinds of parameters, prompts and tokens moved the observable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from funcprobe.attribution.token_tables import Columns, movers
from funcprobe.errors import InputError, percent
from funcprobe.report.canvas import legend_outside, new_axes
from funcprobe.report.figure_text import drawable, set_families
from funcprobe.results.parts import Batch, Parts
from funcprobe.results.probe_words import named, step_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: What the bars are stacked of: name of the column, words, fill, hatch. They differ in grey as well.
_PARTS = {
    "additive": (
        ("gradient", "gradient on U", "#1b2a49", ""),
        ("momentum", "momentum", "#e08a1e", ""),
        ("decay", "weight decay", "#f4e3c8", "////"),
    ),
    "jacobian": (("gradient", "gradient on U", "#1b2a49", ""), ("rest", "rest", "#f4e3c8", "////")),
}

#: Of bars that lower and of those that raise: the colours of the heat map, dark and light.
_LOWERS, _RAISES = "#1f5c99", "#f3a047"

#: So many characters of a token or a prompt stand at a bar.
_WIDTH = 24

#: Above so many bars every second, fifth, ... layer is named.
_NAMED = 26


def plot_layers(attribution: Parts, ax: Axes | None = None) -> Axes:
    """Draw the contribution of every layer: gradient, momentum and decay, stacked, and their sum as a diamond.

    Parts of opposite sign are stacked on opposite sides of 0. Parameters outside of layers have bars of their own. Sums
    have their intervals where `bars_of` named the table, as in all figures of an attribution.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    ax = new_axes() if ax is None else ax
    columns = attribution.columns("layers")
    names = [name.removeprefix("layer ") for name in columns["layer"]]
    places = _places(names)
    _stack(ax, attribution, columns, places, vertical=True)
    numbered = [k for k, name in enumerate(names) if name.isdigit()]
    _name_layers(ax, names, places, numbered[:: 1 + len(numbered) // _NAMED])
    ax.set_ylabel(f"contribution, {attribution.unit}")
    title(ax, attribution, "by layer")
    legend_outside(ax)
    return ax


def plot_kinds(attribution: Parts, ax: Axes | None = None) -> Axes:
    """Draw the contribution of every kind of parameter (attention, MLP, norm, ...), stacked as in `plot_layers`.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    ax = new_axes() if ax is None else ax
    columns = attribution.columns("kinds")
    _stack(ax, attribution, columns, range(len(columns["kind"])), vertical=False)
    ax.set_yticks(range(len(columns["kind"])), columns["kind"])
    ax.invert_yaxis()
    ax.set_xlabel(f"contribution, {attribution.unit}")
    title(ax, attribution, "by kind of parameter")
    legend_outside(ax)
    return ax


def plot_movers(
    attribution: Parts, table: str = "tokens", of: Batch = "batch", count: int = 8, ax: Axes | None = None
) -> Axes:
    """Draw the `count` rows of a table that raise the observable most, and those that lower it most, with their text.

    `table` is "tokens", "sequences" or "prompts", of U or of E.

    Raises:
        InputError: If the table is another one, there is no such batch, or the count is below 1.
        MissingExtraError: If matplotlib is not installed.
    """
    if table not in _LABELS:
        raise InputError(f"Movers are drawn of {', '.join(_LABELS)}, found {table!r}; give one of them.")
    if count < 1:
        raise InputError(f"count is {count!r}; expected how many bars there are either way, at least 1.")
    up, down = movers(attribution.columns(table, of), count)
    ax = new_axes() if ax is None else ax
    labels = [*_LABELS[table](up), *reversed(_LABELS[table](down))]
    values = [float(x) for x in (*up["contribution"], *reversed(down["contribution"]))]
    colours = [_RAISES if x > 0 else _LOWERS for x in values]
    ax.barh(range(len(values)), values, color=colours, edgecolor="0.2", linewidth=0.6, height=0.75)
    ax.set_yticks(range(len(values)), labels, fontsize=8)
    set_families(ax.get_yticklabels())
    ax.invert_yaxis()
    ax.axvline(0, color="0.2", linewidth=0.8)
    ends: Columns = {n: [*up[n], *reversed(down[n])] for n in ("error", "low", "high") if n in up}
    reach = _intervals(ax, ends, values, range(len(values)), vertical=False)
    _shares(ax, values, [*zip(*reach, strict=True)] if reach else [(x, x) for x in values], attribution.first_order)
    _room(ax, [*values, *np.ravel(reach)], 0.2, "x")
    if not len(values):
        ax.text(0.5, 0.5, "nothing contributes", transform=ax.transAxes, ha="center")
    ax.set_xlabel(f"contribution, {attribution.unit}, and share of δF₁")
    title(ax, attribution, f"by {table} of {'U' if of == 'batch' else 'E'}, largest both ways")
    return ax


def _places(names: list[str]) -> list[float]:
    """Return the places of bars: layers beside one another, parts outside of layers so far apart that names fit."""
    apart = max(1.0, len(names) / 20)
    places, at = [], 0.0
    for name, before in zip(names, [None, *names], strict=False):
        outside = not name.isdigit() or (before is not None and not before.isdigit())
        at += 0.0 if before is None else apart if outside else 1.0
        places.append(at)
    return places


def _name_layers(ax: Axes, names: list[str], places: list[float], numbered: list[int]) -> None:
    """Name some layers by number, and everything outside of layers, upright where bars are many."""
    shown = sorted({*numbered, *(k for k, name in enumerate(names) if not name.isdigit())})
    ax.set_xticks([places[k] for k in shown], [drawable(names[k]) for k in shown])
    for k, label in zip(shown, ax.get_xticklabels(), strict=True):
        if len(names) > 8 and not names[k].isdigit():
            label.set_rotation(90)
    ax.set_xlabel("layer")


def _stack(ax: Axes, attribution: Parts, columns: Columns, places: Sequence[float], *, vertical: bool) -> None:
    """Stack the parts of every row away from 0, and mark their sum."""
    total = [float(x) for x in columns["contribution"]]
    draw, side, line = (ax.bar, "bottom", ax.axhline) if vertical else (ax.barh, "left", ax.axvline)
    ends = {True: np.zeros(len(total)), False: np.zeros(len(total))}
    for name, words, colour, hatch in _PARTS[attribution.form]:
        values = np.asarray(columns[name])
        if not values.any():
            continue
        start = np.where(values > 0, ends[True], ends[False])
        style: dict[str, Any] = {
            side: start,
            "color": colour,
            "hatch": hatch,
            "edgecolor": "0.3",
            "linewidth": 0.5,
            "label": words,
        }
        draw(places, values, **style)
        for sign, end in ends.items():
            end += np.where((values > 0) == sign, values, 0.0)
    at = (places, total) if vertical else (total, places)
    size = 5 if len(total) < 40 else 3
    ax.plot(*at, "D", color="white", markeredgecolor="black", markersize=size, linestyle="none", label="sum", zorder=5)
    line(0, color="0.2", linewidth=0.8)
    reach = _intervals(ax, columns, total, places, vertical=vertical)
    _room(ax, [*ends[True], *ends[False], *total, *np.ravel(reach)], 0.06, "y" if vertical else "x")


def _intervals(
    ax: Axes, columns: Columns, values: Sequence[float], places: Sequence[float], *, vertical: bool
) -> list[list[float]]:
    """Draw the intervals over prompts of E where the table has bars, and return their low and high ends.

    An interval without an end, of which nothing can be said, is not drawn.
    """
    if "error" not in columns:
        return []
    from matplotlib.patheffects import withStroke

    ends = np.array([columns["low"], columns["high"]], dtype=float)
    ends = np.where(np.isfinite(ends), ends, np.asarray(values))
    size = np.abs(ends - np.asarray(values))
    at = (places, values) if vertical else (values, places)
    shown: dict[str, Any] = {"yerr" if vertical else "xerr": size}
    label = "interval over\nprompts of E"
    drawn = ax.errorbar(*at, **shown, fmt="none", ecolor="black", elinewidth=1, capsize=2.5, zorder=4, label=label)
    for line in (*drawn.lines[1], *drawn.lines[2]):
        line.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # it is seen on dark bars
    return ends.tolist()


def _room(ax: Axes, values: Sequence[float], margin: float, axis: Literal["x", "y"]) -> None:
    """Show every value and 0, with a margin on both sides, and name values by few digits."""
    low, high = min([0.0, *values]), max([0.0, *values])
    room = margin * (high - low) or 1.0
    (ax.set_xlim if axis == "x" else ax.set_ylim)(low - room, high + room)
    ax.locator_params(axis=axis, nbins=6)
    ax.ticklabel_format(axis=axis, style="sci", scilimits=(-2, 3))


def _shares(ax: Axes, values: Sequence[float], ends: Sequence[tuple[float, float]], whole: float) -> None:
    """Write at the end of every bar, or of its interval, its share of δF₁."""
    for k, x in enumerate(values if whole else ()):
        size = abs(x / whole)
        text = percent(x / whole, 2 if size < 0.1 else 1 if size < 1 else 0).replace("-", "−")
        away: dict[str, Any] = {"xytext": (4 if x > 0 else -4, 0), "ha": "left" if x > 0 else "right"}
        tip = max(x, ends[k][1]) if x > 0 else min(x, ends[k][0])
        ax.annotate(text, (tip, k), textcoords="offset points", va="center", fontsize=7, **away)


def title(ax: Axes, attribution: Parts, by: str) -> None:
    """Head a figure of an attribution: the step, its whole, and the parts that it is split into."""
    probe = attribution.probe
    what = named(probe.outcome, probe.family).removeprefix("the ")
    whole = f"δF₁ = {attribution.first_order:+.3e} {attribution.unit}".replace("-", "−")
    ax.set_title(f"{step_of(probe.outcome)}: {whole}\n{what} {by}", fontsize=10, loc="left")


def _token_labels(columns: Columns) -> list[str]:
    places = zip(columns["text"], columns["position"], columns["sequence"], strict=True)
    return [f"“{drawable(text, _WIDTH)}” at {position} of sequence {b}" for text, position, b in places]


def _sequence_labels(columns: Columns) -> list[str]:
    return [
        f"sequence {b}: {drawable(t.strip(' '), _WIDTH)}"
        for b, t in zip(columns["sequence"], columns["text"], strict=True)
    ]


def _prompt_labels(columns: Columns) -> list[str]:
    return [
        f"prompt {p}: {drawable(t.strip(' '), _WIDTH)}" for p, t in zip(columns["prompt"], columns["text"], strict=True)
    ]


_LABELS = {"tokens": _token_labels, "sequences": _sequence_labels, "prompts": _prompt_labels}
