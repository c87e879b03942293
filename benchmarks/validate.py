"""The counterfactual test of attribution, over seeds: `python benchmarks/validate.py demo` (or `larger`).

A policy is trained as in `funcprobe demo`, anew for every seed, with a U of 16 prompts × 8 and an E of 128 prompts × 8
(`larger`: 64) that it draws itself. Half of E's prompts rank, the other half measure. Two steps each: plain SGD, and
the run's own AdamW with its moments and clipping. Every method's lowest and highest 1, 2, 5 and 10 % of U's tokens are
dropped, the true step is redone and ΔH measured. Beside that, 16 prompts are left out one by one and 32 random halves
of them stepped with; the former also with rankings of the very E that measures (`same E`), in which E's sampling error
cancels.

Sizes, seeds and shares were fixed before the first run: 5 seeds of the demo policy (75,200 parameters), 3 of `larger`
(hidden 128, 4 layers). Intervals are 95 % t intervals over seeds, each with a policy, U and E of its own; differences
from the best are paired by seed. `page` writes docs/validation.md from the numbers that are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from harness import leaderboard, record
from harness.leaderboard import SHARES

import funcprobe as fp
from funcprobe.attribution.trials import ENDS
from funcprobe.cli.demo_task import draw_prompts
from funcprobe.cli.demo_training import MAX_GRAD_NORM, DemoSize, draw_rollouts, train
from funcprobe.data.rollouts import take
from funcprobe.results.environment import describe_environment
from funcprobe.results.validation import Validation

SGD_LR, SUBSETS, RANDOM = 1e-2, 32, 16

#: Size, with the prompts of E, and seeds by policy.
POLICIES: Mapping[str, tuple[DemoSize, int]] = {
    "demo": (DemoSize(evaluation_prompts=128), 5),
    "larger": (DemoSize(hidden_size=128, layers=4, evaluation_prompts=64), 3),
}


def main() -> None:
    """Measure one policy and keep the numbers, or write the page of all that is kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("policy", choices=(*POLICIES, "page"))
    parser.add_argument("--quick", action="store_true", help="one seed of a barely trained policy; nothing is written")
    options = parser.parse_args()
    if options.policy == "page":
        leaderboard.PAGE.write_text(leaderboard.page(), encoding="utf-8")
        return
    torch.set_num_threads(1)
    size, seeds = POLICIES[options.policy]
    if options.quick:
        size, seeds = dataclasses.replace(size, supervised_steps=5, rl_steps=2), 1
    rows = [row for seed in range(seeds) for row in measured(size, seed)]
    if not options.quick:
        asked = {
            "policy": options.policy,
            "seeds": seeds,
            "evaluation prompts": size.evaluation_prompts,
            "sgd_lr": SGD_LR,
        }
        path = record.RESULTS / f"validate-{options.policy}-cpu.json"
        record.write(path, "validate", asked, describe_environment("cpu"), rows)


def measured(size: DemoSize, seed: int) -> Iterable[dict[str, Any]]:
    """Yield a row for each of the two steps of a policy that is trained from a seed."""
    generator, begun = torch.Generator().manual_seed(seed), time.process_time()
    trained = train(size, seed, generator)
    words = draw_prompts(size.batch_prompts + size.evaluation_prompts, size.shortest, size.longest, generator)
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


if __name__ == "__main__":
    main()
