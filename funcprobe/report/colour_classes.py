"""Contributions in a few classes of size, with numbers on the borders: the colours of a heat map, and its legend."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

#: How many classes there are on either side of the uncoloured one; each holds sizes up to twice those of the one below.
DEPTH = 5

#: Quantile of the sizes at which the strongest class begins, so that one outlier does not pale all others.
_STRONGEST = 0.99


class LegendRow(NamedTuple):
    """One class, in words and numbers."""

    name: str  #: "d5" (lowers most), ..., "d1", "" (uncoloured), "u1", ..., "u5" (raises most)
    bound: float  #: contributions of at least that size, with its sign; 0 where the class has no colour
    tokens: int
    total: float  #: the sum of their contributions


class Classes(NamedTuple):
    """Borders between classes."""

    edges: tuple[float, ...]  #: DEPTH sizes, rising: where class 1, 2, ... begins; empty where nothing contributes

    def of(self, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the signed class of every value: −DEPTH to DEPTH, 0 for one that is smaller than the first border."""
        size = np.searchsorted(np.asarray(self.edges), np.abs(values), side="right")
        return (np.sign(values) * size).astype(np.int64)

    def legend(self, values: NDArray[np.float64]) -> list[LegendRow]:
        """Return a row for every class, from lowering most to raising most, with the share of `values` in it."""
        classes, rows = self.of(values), []
        for k in range(-DEPTH, DEPTH + 1):
            inside = values[classes == k]
            bound = math.copysign(self.edges[abs(k) - 1], k) if k and self.edges else 0.0
            rows.append(LegendRow(class_name(k), bound, len(inside), math.fsum(inside)))
        return rows


def classes_of(values: NDArray[np.float64]) -> Classes:
    """Return classes for these contributions: the strongest begins about where the largest hundredth does.

    Borders halve from class to class, rounded to two digits so that a legend can name them.

    Example:
        >>> classes_of(np.array([-3.21e-6, 1e-7, 0.0])).edges
        (2e-07, 4e-07, 8e-07, 1.6e-06, 3.2e-06)
    """
    sizes = np.abs(values)
    sizes = sizes[sizes > 0]
    if not len(sizes):
        return Classes(())
    top = float(np.quantile(sizes, _STRONGEST, method="higher"))
    unit = math.floor(math.log10(top)) - 1
    top = math.floor(top / 10.0**unit * (1 + 1e-12)) * 10.0**unit  # downwards, so that there is one in the class
    return Classes(tuple(float(f"{top / 2**k:.1e}") for k in range(DEPTH - 1, -1, -1)))


def class_name(k: int) -> str:
    """Return the name of a signed class in markup.

    Example:
        >>> class_name(-2), class_name(0), class_name(5)
        ('d2', '', 'u5')
    """
    return f"{'u' if k > 0 else 'd'}{abs(k)}" if k else ""
