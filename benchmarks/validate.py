"""The counterfactual test of attribution, over seeds: `python benchmarks/validate.py demo` (or `larger`).

A policy is trained as in `funcprobe demo`, anew for every seed, with a U of 16 prompts × 8 and an E of 128 prompts × 8
that it draws itself. Half of E's prompts rank, the other half measure. Two steps each: plain SGD, and the run's own
AdamW with its moments and clipping. Every method's lowest and highest 1, 2, 5 and 10 % of U's tokens are dropped, the
true step is redone and ΔH measured. Beside that, 16 prompts are left out one by one and 32 random halves of them
stepped with; the former also with rankings of the very E that measures (`same E`), in which E's sampling error cancels.

Sizes, seeds and shares were fixed before the first run: 5 seeds of the demo policy (75,200 parameters), 3 of `larger`
(hidden 128, 4 layers). Intervals are 95 % t intervals over seeds, each with a policy, U and E of its own; differences
from the best are paired by seed. `page` writes docs/validation.md from the numbers that are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import record
from scipy.stats import t as student

import funcprobe as fp
from funcprobe.attribution.rankings import METHODS
from funcprobe.attribution.trials import ENDS
from funcprobe.cli.demo_task import draw_prompts
from funcprobe.cli.demo_training import MAX_GRAD_NORM, DemoSize, draw_rollouts, train
from funcprobe.data.rollouts import take
from funcprobe.results.environment import describe_environment
from funcprobe.results.validation import Validation

SHARES, SGD_LR, SUBSETS, RANDOM, EVALUATION = (0.01, 0.02, 0.05, 0.1), 1e-2, 32, 16, 128

#: Size and seeds by policy.
POLICIES: Mapping[str, tuple[DemoSize, int]] = {
    "demo": (DemoSize(), 5),
    "larger": (DemoSize(hidden_size=128, layers=4), 3),
}

PAGE = Path(__file__).parents[1] / "docs" / "validation.md"


def main() -> None:
    """Measure one policy and keep the numbers, or write the page of all that is kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("policy", choices=(*POLICIES, "page"))
    parser.add_argument("--quick", action="store_true", help="one seed of a barely trained policy; nothing is written")
    options = parser.parse_args()
    if options.policy == "page":
        PAGE.write_text(page(), encoding="utf-8")
        return
    torch.set_num_threads(1)
    size, seeds = POLICIES[options.policy]
    if options.quick:
        size, seeds = dataclasses.replace(size, supervised_steps=5, rl_steps=2), 1
    rows = [row for seed in range(seeds) for row in measured(size, seed)]
    if not options.quick:
        asked = {"policy": options.policy, "seeds": seeds, "evaluation prompts": EVALUATION, "sgd_lr": SGD_LR}
        path = record.RESULTS / f"validate-{options.policy}-cpu.json"
        record.write(path, "validate", asked, describe_environment("cpu"), rows)


def measured(size: DemoSize, seed: int) -> Iterable[dict[str, Any]]:
    """Yield a row for each of the two steps of a policy that is trained from a seed."""
    generator, begun = torch.Generator().manual_seed(seed), time.process_time()
    trained = train(size, seed, generator)
    words = draw_prompts(size.batch_prompts + EVALUATION, size.shortest, size.longest, generator)
    drawn = [
        draw_rollouts(size, trained.policy, trained.params, trained.tokenizer, part, generator)
        for part in (words[: size.batch_prompts], words[size.batch_prompts :])
    ]
    U, both = drawn
    half = len(both.ids) // 2
    fit, E = (take(both, torch.arange(len(both.ids))[rows]) for rows in (slice(half), slice(half, None)))
    sgd = fp.sgd(SGD_LR)
    steps = {
        "SGD": (fp.make_step(trained.policy, fp.grpo(), sgd), sgd.init(trained.params)),
        "AdamW": (fp.make_step(trained.policy, fp.grpo(), trained.optimizer, MAX_GRAD_NORM), trained.opt_state),
    }
    for name, (step, state) in steps.items():
        update = fp.Update.from_step(step, trained.params, state, U)
        apart = fp.validate(update, E, fit=fit, shares=SHARES, random=RANDOM, subsets=SUBSETS, seed=seed)
        same = fp.validate(update, E, fit=E, shares=SHARES[:1], random=1, subsets=1, seed=seed)
        yield {"seed": seed, "step": name, "parameters": sum(p.numel() for p in trained.params.values())} | kept(
            apart, same
        )
        print(f"seed {seed}, {name}: {time.process_time() - begun:.0f} s of the processor", flush=True)


def kept(apart: Validation, same: Validation) -> dict[str, Any]:
    """Return the numbers of one step that are kept."""
    return {
        "base": apart.base,
        "tokens of U": apart.batch.tokens if apart.batch else 0,
        "effects": {m: {end: [apart.effect(m, end, share) for share in SHARES] for end in ENDS} for m in apart.methods},
        "random": [{"mean": c.mean, "sd": c.sd} for c in apart.chance],
        "left out": {m: a.left_out for m, a in apart.agreements.items()},
        "left out, same E": {m: a.left_out for m, a in same.agreements.items()},
        "datamodel": {m: a.datamodel for m, a in apart.agreements.items()},
    }


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
    "that holds 0.",
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
    base, wide = interval([1e4 * row["base"] for row in rows])
    cells = {m: [] for m in METHODS}
    for _, factor, sign, place in COLUMNS:
        values = {m: [factor * _at(row, m, place) for row in rows] for m in METHODS}
        best = max(METHODS, key=lambda m: sign * _mean(values[m]))
        for m in METHODS:
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
        *(f"| {m} | {' | '.join(cells[m])} |" for m in METHODS),
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


if __name__ == "__main__":
    main()
