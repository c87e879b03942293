"""docs/literature.md: claims of the literature and their measurements, of the numbers that `literature.py` keeps."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from funcprobe.attribution.counterfactual import correlation, rank_correlation

from . import record

RESULT = record.RESULTS / "literature-cpu.json"
PAGE = Path(__file__).parents[2] / "docs" / "literature.md"

#: Steps of a run, and steps that a smoothed curve averages.
STEPS, WINDOW = 60, 10


def page() -> str:
    """Return docs/literature.md: a row a claim."""
    report = json.loads(RESULT.read_text(encoding="utf-8"))
    rows = report["rows"]
    lines = [
        "# Claims of the literature, tried here",
        "",
        "`benchmarks/literature.py` writes this page from `benchmarks/results/literature-cpu.json`; its head says how",
        f"the numbers were made: {report['options']['seeds']} runs of {report['options']['steps']} GRPO steps of the",
        "demo's policy (75,200 parameters), every step measured on fresh rollouts. A number is the median over seeds,",
        "with the least and the largest behind it. Claims are in our words; a policy so small refutes no claim about",
        "large ones. A right sign says little where ΔH is below 0 in nearly every step: always saying so is as good.",
        "",
        "| claim | source | measured here |",
        "|---|---|---|",
    ]
    return "\n".join([*lines, *(f"| {claim} | {source} | {text} |" for claim, source, text in claims(rows))]) + "\n"


def claims(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Yield (claim, source, what was measured)."""
    covariance = "The covariance of log-probability and advantage is above 0 in most steps of a run"
    yield (
        covariance,
        "arXiv 2505.22617",
        f"{told(rows, lambda r: _share(x['predictors']['cov_npg'] < 0 for x in r), '.0%')} of the steps; ΔH is below 0 "
        f"in {told(rows, lambda r: _share(x['AdamW']['change'] < 0 for x in r), '.0%')}",
    )
    for method, claim, source in (
        ("cov_npg", "Covariance (natural gradient) and entropy differences match over a run", "arXiv 2505.22617"),
        ("cov_pg", "Covariance (policy gradient) and entropy differences match over a run", "arXiv 2505.22617"),
        ("discriminant", "The discriminant gives the entropy change of a step to first order", "arXiv 2602.03392"),
    ):
        yield claim, source, "; ".join(_matching(rows, step, method) for step in ("AdamW", "SGD"))
    tokens = [
        f"{step}: rank correlation over tokens with their contributions to δH₁ "
        f"{told(rows, lambda r, s=step: statistics.median(x[s]['tokens']['discriminant'] for x in _second(r)), '.2f')}"
        for step in ("AdamW", "SGD")
    ]
    yield "The discriminant tells which tokens lower the entropy", "arXiv 2602.03392", "; ".join(tokens)
    yield (
        "The step itself predicts the entropy change: δH₁ = ⟨∇H, Δθ⟩",
        "this package, on the E that measures",
        "; ".join(_matching(rows, step, "first") for step in ("AdamW", "SGD")),
    )
    closes = [
        f"{step}: (ΔH − δH₁) / δH₂ {told(rows, lambda r, s=step: statistics.median(_closing(r, s)), '.2f')}, crossover "
        f"at {told(rows, lambda r, s=step: statistics.median(_crossover(r, s)), '.1f')} times the learning rate"
        for step in ("AdamW", "SGD")
    ]
    yield (
        "The error of first order has a closed form (the form itself is not tried: its text was not at hand)",
        "arXiv 2605.18814",
        "our second order in its place, medians over steps: " + "; ".join(closes),
    )
    for what, name in (("kl", "KL(θ′‖θ), its Fisher form"), ("entropy", "the entropy, δH₂")):
        shares = [
            f"{step}: last layer alone / whole step {told(rows, lambda r, s=step, w=what: _alone(r, s, w)[0], '.2f')}, "
            f"rank correlation {told(rows, lambda r, s=step, w=what: _alone(r, s, w)[1], '.2f')}"
            for step in ("AdamW", "SGD")
        ]
        yield f"Curvature of the last layer stands for that of the model: {name}", "arXiv 2510.00819", "; ".join(shares)


def told(rows: Sequence[Mapping[str, Any]], of: Callable[[list[Any]], float], form: str) -> str:
    """Return the median over seeds of a number of a run, with its range."""
    seeds = sorted({row["seed"] for row in rows})
    found = sorted(of([row for row in rows if row["seed"] == seed]) for seed in seeds)
    return f"{statistics.median(found):{form}} ({found[0]:{form}} to {found[-1]:{form}})"


def _matching(rows: Sequence[Mapping[str, Any]], step: str, method: str) -> str:
    """Return how a prediction goes with ΔH over the steps of a run, step by step and as means over windows."""

    def pairs(run: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        lrs = [1.0 if step == "SGD" else 1 - x["number"] / STEPS for x in run]
        predicted = [
            x[step]["first"] if method == "first" else lr * x["predictors"][method]
            for x, lr in zip(run, lrs, strict=True)
        ]
        return torch.tensor(predicted).double(), torch.tensor([x[step]["change"] for x in run]).double()

    def smooth(run: list[Any]) -> float:
        return correlation(*(x.unfold(0, WINDOW, 1).mean(1) for x in pairs(run)))

    signs = told(rows, lambda r: _share((p * c > 0).item() for p, c in zip(*pairs(r), strict=True)), ".0%")
    each = told(rows, lambda r: correlation(*pairs(r)), ".2f")
    return f"{step}: sign right {signs}, R {each}, R of means over {WINDOW} steps {told(rows, smooth, '.2f')}"


def _second(run: Sequence[Any]) -> list[Any]:
    return [row for row in run if "last layer" in row]


def _closing(run: Sequence[Any], step: str) -> list[float]:
    return [(x[step]["change"] - x[step]["first"]) / x[step]["second"] for x in _second(run)]


def _crossover(run: Sequence[Any], step: str) -> list[float]:
    return [abs(x[step]["first"] / x[step]["second"]) for x in _second(run)]


def _alone(run: Sequence[Any], step: str, what: str) -> tuple[float, float]:
    """Return the median share of the last layer's curvature in the whole step's, and their rank correlation."""
    found = [x["last layer"][step] for x in _second(run)]
    alone, whole = ([x[f"{what}, {which}"] for x in found] for which in ("alone", "whole"))
    share = statistics.median(a / w if w else math.nan for a, w in zip(alone, whole, strict=True))
    return share, rank_correlation(torch.tensor(alone), torch.tensor(whole))


def _share(marks: Iterator[bool]) -> float:
    found = list(marks)
    return sum(found) / len(found)
