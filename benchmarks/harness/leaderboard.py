"""docs/validation.md: the leaderboard of methods of attribution, made of the numbers that `validate.py` keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student

from . import record

PAGE = Path(__file__).parents[2] / "docs" / "validation.md"

#: The policies with a table, and the shares that are dropped.
POLICIES, SHARES = ("demo", "larger"), (0.01, 0.02, 0.05, 0.1)


def page() -> str:
    """Return docs/validation.md: the leaderboard of every policy and step whose numbers are kept."""
    lines = [*_OPENING]
    for name in POLICIES:
        path = record.RESULTS / f"validate-{name}-cpu.json"
        report = json.loads(path.read_text(encoding="utf-8"))
        for step in ("SGD", "AdamW"):
            lines += _board(name, step, [row for row in report["rows"] if row["step"] == step])
    return "\n".join(lines).rstrip() + "\n"


_OPENING = (
    "# Attribution against counterfactuals",
    "",
    "`benchmarks/validate.py` writes this page from `benchmarks/results/validate-*.json`; its head says how they were",
    "made. A method ranks the tokens of U on one half of E's prompts. The share that it ranks lowest (as lowering",
    "the entropy most) or highest is dropped from the loss, normaliser unchanged, the true step redone, and ΔH",
    "measured on the other half. Effects are ΔH without the share minus ΔH of the whole step: lowest should be far",
    "above 0, highest far below. **R** correlates a prompt's score with the change that leaving it in makes, on an",
    "independent E and on the E that ranked; **LDS** is the linear datamodelling score (rank correlation over 32",
    "random halves of the prompts). ± is half of a 95 % t interval over seeds, each with a policy, U and E of its own.",
    "Bold: the best of its column by mean, and every method whose difference from it, paired by seed, has an interval",
    "that holds 0: with three seeds few differences are told apart, and bold says no more than that.",
    "",
)

#: The columns: heading, factor, whether high is good, and the number of a row.
COLUMNS = (
    *((f"lowest {100 * s:g} %", 1e4, 1, ("effects", "lowest", k)) for k, s in enumerate(SHARES)),
    *((f"highest {100 * s:g} %", 1e4, -1, ("effects", "highest", k)) for k, s in enumerate(SHARES) if k in (1, 3)),
    ("R", 1, 1, ("left out",)),
    ("R, same E", 1, 1, ("left out, same E",)),
    ("LDS", 1, 1, ("datamodel",)),
)


def _board(policy: str, step: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of one policy and step."""
    methods = list(rows[0]["effects"])
    base, wide = interval([1e4 * row["base"] for row in rows])
    cells = {m: [] for m in methods}
    for _, factor, sign, place in COLUMNS:
        values = {m: [factor * _at(row, m, place) for row in rows] for m in methods}
        best = max(methods, key=lambda m: sign * _mean(values[m]))
        for m in methods:
            off, width = interval([x - y for x, y in zip(values[m], values[best], strict=True)])
            mark = "**" if m == best or abs(off) <= width else ""
            mean, own = interval(values[m])
            digits = 2 if factor > 1 else 3
            cells[m].append(f"{mark}{mean:.{digits}f}{mark} ± {own:.{digits}f}")
    chance = [
        " ± ".join(f"{1e4 * _mean([row['random'][k][what] for row in rows]):.2f}" for what in ("mean", "sd"))
        for k in (*range(len(SHARES)), 1, 3)
    ]
    return [
        f"## {policy}, {step}",
        "",
        f"{len(rows)} seeds, {rows[0]['parameters']:,} parameters, ΔH of the whole step {base:.2f} ± {wide:.2f}; "
        "effects and ΔH in 1e-4 nats per token; random: ± the standard deviation of one draw.",
        "",
        f"| method | {' | '.join(heading for heading, *_ in COLUMNS)} |",
        f"|---|{'---:|' * len(COLUMNS)}",
        *(f"| {m} | {' | '.join(cells[m])} |" for m in methods),
        f"| random | {' | '.join(chance)} | | | |",
        "",
    ]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of values, one a seed, and half of its 95 % t interval."""
    found = torch.tensor(values, dtype=torch.float64)
    n = len(values)
    width = float(found.std()) / math.sqrt(n) * float(student.ppf(0.975, n - 1)) if n > 1 else math.inf
    return float(found.mean()), width


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _at(row: Mapping[str, Any], method: str, place: Sequence[Any]) -> float:
    found: Any = row[place[0]][method]
    for key in place[1:]:
        found = found[key]
    return float(found)
