"""Two steps where there seems to be one: the update θ + Δθ, and θ′ as its dtype stores it.

In float32 they are one, up to rounding that no reading sees. A bfloat16 run at a small learning rate moves one entry in
a hundred, by more than Δθ, and the others not at all: ΔF of one says nothing about ΔF of the other. Where rounding is
above a hundredth of the update both are measured, each by subtraction or by a path as its float error asks for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from funcprobe import engine, tree
from funcprobe.measurement.first_order import FirstOrder
from funcprobe.measurement.line import on_line
from funcprobe.measurement.measurement import Measurement
from funcprobe.measurement.move import WORTH_TELLING, Move, displacement, movement


class Apart(NamedTuple):
    """One step as two displacements, either of which can be measured like any other step."""

    exact: Move  #: to θ + Δθ, as near as the arithmetic holds it
    stored: Move  #: to θ′, with θ′ − θ as its Δθ
    held: bool  #: whether the arithmetic holds θ + Δθ, so that a subtraction can see it


def told_apart(measurement: Measurement, move: Move, first: FirstOrder) -> Apart | None:
    """Return the two displacements of a step; None where they are one, or where only θ′ can be measured.

    θ + Δθ is out of reach where the model computes in the very dtype that is too coarse for it: a bfloat16 model has
    no parameters at θ + Δθ, and its tangents are no better.
    """
    if move.size.rounding_ratio <= WORTH_TELLING:
        return None
    params, delta = move.params, move.delta
    target = tree.Lazy(params, lambda name: on_line(params[name], delta[name], 1.0))
    held = movement(move.params, target, move.delta).rounding_ratio <= WORTH_TELLING
    options = measurement.options
    by_path = first.along is not None and first.eps is not None and first.eps <= options.path_tolerance
    if not held and (options.method == "difference" or not by_path):
        return None
    exact = move._replace(after=target) if held else move
    return Apart(exact, move._replace(delta=displacement(move.params, move.after)), held)


def first_of_stored(measurement: Measurement, move: Move, first: FirstOrder) -> FirstOrder | None:
    """Return the tangents along θ′ − θ, at the scores of `first`; None in reverse mode, or where no row is wanted."""
    if first.along is None or measurement.options.rounding is False:
        return None
    if first.rounding is not None:
        tangents = engine.each(torch.add, first.along.tangents, first.rounding.tangents)
        return FirstOrder(first.scores, engine.Directional(first.scores, tangents), {}, first.eps)
    along = measurement.passes.directional(move.params, move.delta, "E, forward mode along θ′ − θ")
    return FirstOrder(first.scores, along, {}, first.eps)
