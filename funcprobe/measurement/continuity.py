"""Whether the numbers of one step can belong to a function that is smooth from θ to θ′, judged in their float errors.

Derivatives do not see a jump. A path integral of them converges all the same, and a second order says that the line is
straight; only two evaluations tell, as far as their subtraction is exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from funcprobe.errors import Note
from funcprobe.measurement.readings import Reading
from funcprobe.measurement.routing import Routing

#: Numbers disagree where they differ by more than this multiple of their float errors, taken together. The error of a
#: subtraction is `√Σ x_i²` over sequences whose roundings x_i are as likely up as down; so |Σ x_i| is above k times it
#: with a probability of at most 2 exp(−k²/2) (Hoeffding): 3e-8 for 6.
DISAGREE = 6.0

#: First order is close where it misses at most this much of ΔF, or of itself.
CLOSE = 0.05

#: Up to this ratio q of |δF₂| to |δF₁|, terms that fall off like a geometric series leave at most
#: `|δF₂| q/(1 − q) ≤ |δF₂|` beyond second order; beyond it the second order says nothing of the rest.
EXPANDS = 0.5

#: Fraction of tokens sent elsewhere above which a result warns, however close first order is to ΔF.
MANY = 0.01

#: Rounding of θ′, relative to Δθ, up to which it cannot be taken for a bend: a fifth of what a straight line may miss.
STORED = 1e-2

JUMPS = (
    "Tokens of E are sent to other experts at θ′ than at θ (see `routing`). F jumps where that happens, and δF₁ and "
    "δF₂, being derivatives, do not see it"
)


def disagree(difference: float, *errors: float) -> bool:
    """Return whether two numbers that differ by `difference` do so beyond their float errors.

    Example:
        >>> disagree(1e-5, 1e-7, 1e-8), disagree(1e-7, 1e-7, 1e-8)
        (True, False)
    """
    return abs(difference) > DISAGREE * math.hypot(*errors)


def is_bent(reading: Reading) -> bool:
    """Return whether ΔF − δF₁ is far from δF₂ within the reach of an expansion: smooth functions do not do that.

    That is by more than twice |δF₂|, or twice the 5 % of δF₁ that a straight line may miss, and beyond float error.
    """
    if reading.second_order is None or reading.float_error is None:
        return False
    first, second = abs(reading.first_order), abs(reading.second_order)
    unexplained = reading.remainder - reading.second_order
    far = abs(unexplained) > 2 * max(second, CLOSE * first)
    return second <= EXPANDS * first and far and disagree(unexplained, reading.float_error)


def remarks(
    readings: Mapping[str, Reading], routing: Routing | None, rounding_ratio: float
) -> tuple[list[Note], list[Note]]:
    """Return the warnings, and the notes, about jumps between θ and θ′.

    `rounding_ratio` is that of storing θ′: what a second order can be held against is a step that was taken.
    """
    moved = routing is not None and routing.changed > 0
    bent = [name for name, reading in readings.items() if rounding_ratio <= STORED and is_bent(reading)]
    missed = [name for name, reading in readings.items() if moved and _misses(reading)]
    if routing is not None and moved:
        if missed:
            return [
                Note("experts", f"{JUMPS}: the remainder of {_listed(missed)} is theirs, or beyond second order.")
            ], []
        jumps = [Note("experts", f"{JUMPS}.")]
        return (jumps, []) if routing.fraction > MANY else ([], jumps)
    if bent:
        text = (
            f"The remainder ΔF − δF₁ of {_listed(bent)} is far from δF₂, though the step is small enough for an "
            "expansion: F is not smooth between θ and θ′, as where a model compares with a threshold; trust ΔF."
        )
        return [Note("bend", text)], []
    return [], []


def _misses(reading: Reading) -> bool:
    """Return whether the orders that are known miss more of ΔF than 5 %, and than its float error."""
    known = reading.first_order + (reading.second_order or 0.0)
    off = abs(reading.change - known)
    return off > CLOSE * abs(reading.change) and (reading.float_error is None or disagree(off, reading.float_error))


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
