"""How good predictions of ΔH are: sign, rank, and the error that one fitted scalar leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: One step on one update batch: where it was taken, ΔH with its standard error on each E, and what was predicted of it.
Pair = dict[str, Any]

#: What ΔH is taken on.
TRUTHS = ("same E", "independent E")


def summarised(pairs: Sequence[Pair], natural: Sequence[str]) -> dict[str, Any]:
    """Return, for each truth, how well every prediction did: on all pairs, clear ones, and natural kinds of batches.

    A pair is clear where |ΔH| is above two of its standard errors. The median of an even number of values is the lower
    of the middle two, as torch takes it.
    """
    return {truth: _against(pairs, truth, natural) for truth in TRUTHS}


def _against(pairs: Sequence[Pair], truth: str, natural: Sequence[str]) -> dict[str, Any]:
    groups = {
        "all": pairs,
        "clear": [p for p in pairs if abs(p[truth]["change"]) > 2 * p[truth]["error"]],
        "natural": [p for p in pairs if p["kind"] in natural],
    }
    counts = {
        "pairs": {name: len(group) for name, group in groups.items()},
        "rising": {name: sum(p[truth]["change"] > 0 for p in group) for name, group in groups.items()},
        "median |ΔH|": float(_changes(pairs, truth).abs().median()),
        "median standard error": float(torch.tensor([p[truth]["error"] for p in pairs]).median()),
    }
    names = list(pairs[0]["predicted"])
    every = dict.fromkeys(p["kind"] for p in pairs)
    kinds = {kind: _of_kind([p for p in pairs if p["kind"] == kind], truth) for kind in every}
    return (
        counts | {group: {x: quality(of, truth, x) for x in names} for group, of in groups.items()} | {"kinds": kinds}
    )


def _of_kind(pairs: Sequence[Pair], truth: str) -> dict[str, Any]:
    """Return, for one kind of batch, how often ΔH rises, signs that agree, and the median of ΔH / prediction."""
    y = _changes(pairs, truth)
    columns = {name: _predictions(pairs, name) for name in pairs[0]["predicted"]}
    return {
        "pairs": len(pairs),
        "rising": int((y > 0).sum()),
        "median ΔH": float(y.median()),
        "right": {name: int((x.sign() == y.sign()).sum()) for name, x in columns.items()},
        "scale": {name: float((y / x).median()) for name, x in columns.items()},
    }


def quality(pairs: Sequence[Pair], truth: str, name: str) -> dict[str, float]:
    """Return sign agreement, rank correlations, and errors relative to median |ΔH|, calibrated and as they are."""
    y, x = _changes(pairs, truth), _predictions(pairs, name)
    numbers = [p["checkpoint"] for p in pairs]
    places = [[k for k, number in enumerate(numbers) if number == c] for c in dict.fromkeys(numbers)]
    within = [spearman(x[rows], y[rows]) for rows in places]
    return {
        "sign": float((x.sign() == y.sign()).double().mean()),
        "spearman": spearman(x, y),
        "spearman within a checkpoint": sum(within) / len(within),
        "calibrated error": calibrated_error(x, y),
        "error as it is": float((x - y).abs().median() / y.abs().median()),
    }


def _changes(pairs: Sequence[Pair], truth: str) -> Tensor:
    return torch.tensor([p[truth]["change"] for p in pairs], dtype=torch.float64)


def _predictions(pairs: Sequence[Pair], name: str) -> Tensor:
    return torch.tensor([p["predicted"][name] for p in pairs], dtype=torch.float64)


def spearman(x: Tensor, y: Tensor) -> float:
    """Return Spearman's rank correlation, ties at their mean rank; 0 where one of the two does not vary."""
    a, b = (((v[:, None] > v).double() + 0.5 * (v[:, None] == v).double()).sum(1) for v in (x, y))
    a, b = a - a.mean(), b - b.mean()
    size = float((a @ a).sqrt() * (b @ b).sqrt())
    return float(a @ b) / size if size else 0.0


def calibrated_error(x: Tensor, y: Tensor) -> float:
    """Return median |c·x − y| / median |y| on every second pair, c fitted on the others, and the reverse, averaged."""
    halves = [slice(0, None, 2), slice(1, None, 2)]
    errors = []
    for fit, test in (halves, halves[::-1]):
        c = least_absolute(x[fit], y[fit])
        errors.append(float((c * x[test] - y[test]).abs().median() / y[test].abs().median()))
    return sum(errors) / len(errors)


def least_absolute(x: Tensor, y: Tensor) -> float:
    """Return the c that minimises Σ|y − c·x|: the median of y/x, weighted by |x|."""
    ratio, order = (y / x).sort()
    reached = x[order].abs().cumsum(0)
    return float(ratio[int((reached < reached[-1] / 2).sum())])
