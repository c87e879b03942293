"""Claims of the literature about entropy, tried on the demo's policy: `python benchmarks/literature.py`.

Three seeds of the demo's policy, after its supervised steps, take 60 GRPO steps with AdamW (3e-4 falling by 1/60 a
step, clip 1, 16 prompts × 8 a step). Before each step E of 64 prompts × 8 is drawn at θ, and ΔH, δH₁ and the published
predictors are taken of two steps on the same U: the AdamW step that the run takes, and plain SGD at 1e-2, which the
predictors were derived for. At every tenth θ, δH₂ as well; and on a copy of the policy whose readout is a leaf of its
own, second orders of the entropy and of KL(θ′‖θ) (its Fisher form) along the whole step and along its last layer alone,
for SGD and for AdamW from a fresh state. Seeds and sizes were fixed before the first run. `page` writes
docs/literature.md from the numbers that are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from harness import claims, record
from harness.claims import RESULT, STEPS

import funcprobe as fp
from funcprobe.attribution.counterfactual import rank_correlation
from funcprobe.cli.demo_task import draw_prompts
from funcprobe.cli.demo_training import MAX_GRAD_NORM, DemoSize, Trained, build_model, draw_rollouts, train
from funcprobe.results.environment import describe_environment
from funcprobe.types import Params, Rollouts

SEEDS, EVERY, SGD_LR = 3, 10, 1e-2

HEAD = "lm_head.weight"


def main() -> None:
    """Measure and keep the numbers, or write the page of what is kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("measure", "page"), default="measure")
    parser.add_argument("--quick", action="store_true", help="two steps of one seed; nothing is written")
    options = parser.parse_args()
    if options.what == "page":
        claims.PAGE.write_text(claims.page(), encoding="utf-8")
        return
    torch.set_num_threads(1)
    seeds, steps = (1, 2) if options.quick else (SEEDS, STEPS)
    rows = [row for seed in range(seeds) for row in run(seed, steps)]
    if not options.quick:
        asked = {"seeds": seeds, "steps": steps, "every": EVERY, "sgd_lr": SGD_LR}
        record.write(RESULT, "literature", asked, describe_environment("cpu"), rows)


def run(seed: int, steps: int) -> Iterator[dict[str, Any]]:
    """Yield a row for every step of a run."""
    size = dataclasses.replace(DemoSize(), rl_steps=0)
    draw = torch.Generator().manual_seed(seed)
    trained = train(size, seed, draw)
    params, sgd = trained.params, fp.sgd(SGD_LR)
    state = fp.adamw(size.rl_lr, weight_decay=0.0).init(params)
    for number in range(steps):
        words = draw_prompts(size.batch_prompts + size.evaluation_prompts, size.shortest, size.longest, draw)
        U, E = (
            draw_rollouts(size, trained.policy, params, trained.tokenizer, part, draw)
            for part in (words[: size.batch_prompts], words[size.batch_prompts :])
        )
        running = fp.adamw(size.rl_lr * (1 - number / STEPS), weight_decay=0.0)
        step = fp.make_step(trained.policy, fp.grpo(), running, MAX_GRAD_NORM)
        taken = fp.Update.from_step(step, params, state, U)
        plain = fp.Update.from_step(fp.make_step(trained.policy, fp.grpo(), sgd), params, sgd.init(params), U).sharing(
            taken
        )
        order: Any = 2 if number % EVERY == 0 else 1
        row = {"seed": seed, "number": number} | measured({"AdamW": taken, "SGD": plain}, E, order)
        yield row | ({"last layer": last_layer(size, seed, trained, params, U, E)} if order == 2 else {})
        after = taken.take()
        params, state = after.params, after.opt_state
    print(f"seed {seed} done", flush=True)


def measured(updates: Mapping[str, fp.Update], E: Rollouts, order: Any) -> dict[str, Any]:
    """Return what two steps do to the entropy, and what was predicted of them."""
    found = fp.compare(updates, E, {"entropy": fp.entropy()}, order=order)
    row: dict[str, Any] = {"predictors": fp.predict(next(iter(updates.values())).at(1.0)).totals}
    for name, update in updates.items():
        reading = found.reading(name)
        row[name] = {
            "change": reading.change,
            "error": reading.bars["change"].error,
            "first": reading.first_order,
            "second": reading.second_order,
        }
        if order == 2:
            tokens = fp.attribute(update, E).batch
            mask = tokens.mask
            row[name]["tokens"] = {
                method: rank_correlation(x[mask], tokens.total[mask]) for method, x in tokens.predictors.items()
            }
    return row


def last_layer(
    size: DemoSize, seed: int, trained: Trained, params: Params, U: Rollouts, E: Rollouts
) -> dict[str, dict[str, float]]:
    """Return second orders along a whole step and along its last layer, where that is a leaf of its own."""
    tied = build_model(size, seed)
    tied.config.tie_word_embeddings = False
    module = type(tied)(tied.config)
    policy, own = fp.from_module(module)
    values = {name: params[name if name in params else "model.embed_tokens.weight"].detach().clone() for name in own}
    rows = {}
    for name, optimizer in (("SGD", fp.sgd(SGD_LR)), ("AdamW", fp.adamw(size.rl_lr, weight_decay=0.0))):
        step = fp.make_step(policy, fp.grpo(), optimizer, None if name == "SGD" else MAX_GRAD_NORM)
        delta = fp.Update.from_step(step, values, optimizer.init(values), U).take().delta
        alone = {leaf: d if leaf == HEAD else torch.zeros_like(d) for leaf, d in delta.items()}
        found = {}
        for what, along in (("whole", delta), ("alone", alone)):
            probed = fp.probe(
                fp.Update.from_delta(policy, values, along), E, {"entropy": fp.entropy(), "kl": fp.kl()}, order=2
            )
            found |= {f"{o}, {what}": r.second_order for o, r in probed.readings.items()}
        rows[name] = found
    return rows


if __name__ == "__main__":
    main()
