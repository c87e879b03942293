"""What the published predictors of ΔH are worth: `python benchmarks/predictors.py`.

The demo's policy is trained as in `funcprobe demo`, and then for 120 GRPO steps with the pure step; six of its
checkpoints, from high to low entropy, each get an E and an independent E′ of 512 fresh rollouts and 16 update batches
of 128, chosen so that the sign of ΔH varies (`KINDS`). On every batch three steps are measured:

* `adamw`: the run's own next step, with the run's moments, learning rate and clipping;
* `adamw, no moments`: the same from a fresh state, so that nothing but U decides where it goes;
* `sgd`: plain SGD, unclipped, which is what the predictors were derived for.

Predictors see U alone. δH₁ and δH₁ + δH₂ are taken on E, so against ΔH on the same E they share its sampling error;
against ΔH on E′ the comparison is fair. `always down` needs no model at all: what a predictor has to beat. A calibrated
error fits one scalar (least absolute deviations) on one half of the pairs and is median |error| / median |ΔH| on the
other, both ways averaged; 1 is what predicting nothing scores. Every prediction's error as it is stands beside it. The
pairs of a checkpoint share E and E′, so they are not independent of one another.

What was expected: with SGD the discriminant right in sign nine times in ten and a rank correlation of .8, the
covariances a little behind because they are centred over the batch, δH₁ at 97 % and .98; with moments, of which a batch
is a tenth, predictors no better than `always down`; without moments in between. README.md beside this file says what
was found.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import comparing, ranking, record
from torch import Tensor

import funcprobe as fp
from funcprobe.cli.demo_task import draw_prompts
from funcprobe.cli.demo_training import MAX_GRAD_NORM, DemoSize, Trained, draw_rollouts, train
from funcprobe.data.rollouts import take
from funcprobe.results.environment import describe_environment
from funcprobe.training.step import Step
from funcprobe.types import OptState, Params, Rollouts

SEED, RUN, CHECKPOINTS, SGD_LR = 0, 120, (1, 5, 15, 30, 60, 110), 1e-2

#: How many batches of each kind a checkpoint gets. The first three are GRPO batches as a run draws them.
KINDS = {
    "plain": 4,  # 16 prompts times 8
    "easy": 1,  # prompts of four digits
    "hard": 1,  # prompts of six digits
    "reversed": 2,  # a plain batch with its advantages negated
    "shuffled": 4,  # a plain batch with the advantages of each prompt dealt anew: no signal, and either sign
    "positive": 2,  # of 32 prompts times 8, the half of highest advantage
    "negative": 2,  # the other half
}
NATURAL = ("plain", "easy", "hard")

#: What is printed: heading, which ΔH, which pairs, which number, how.
COLUMNS = (
    ("sign", "independent E", "all", "sign", "{:.0%}"),
    ("clear", "independent E", "clear", "sign", "{:.0%}"),
    ("rank", "independent E", "all", "spearman", "{:.2f}"),
    ("within", "independent E", "all", "spearman within a checkpoint", "{:.2f}"),
    ("error", "independent E", "all", "calibrated error", "{:.2f}"),
    ("as it is", "independent E", "all", "error as it is", "{:.2f}"),
    ("natural", "independent E", "natural", "calibrated error", "{:.2f}"),
    ("same E", "same E", "all", "calibrated error", "{:.2f}"),
)


class Demo(NamedTuple):
    """The policy and what draws from it."""

    size: DemoSize
    trained: Trained
    draw: torch.Generator

    def prompts(self, count: int, exclude: Sequence[str] = (), digits: int | None = None) -> list[str]:
        """Return prompts of any length, or of that many digits."""
        many = count if digits is None else 8 * count
        drawn = draw_prompts(many, self.size.shortest, self.size.longest, self.draw, exclude)
        return [word for word in drawn if digits is None or len(word.rstrip(".=")) == digits][:count]

    def rollouts(self, params: Params, words: list[str]) -> Rollouts:
        """Return rollouts with the advantages of GRPO."""
        drawn = draw_rollouts(self.size, self.trained.policy, params, self.trained.tokenizer, words, self.draw)
        return drawn._replace(advantages=fp.grpo().prepare(drawn).advantages)

    def dealt_anew(self, advantages: Tensor) -> Tensor:
        """Return the advantages in a random order within every prompt's group."""
        groups = advantages.view(-1, self.size.group_size)
        order = torch.rand(groups.shape, generator=self.draw).argsort(1)
        return groups.gather(1, order).flatten()


def main() -> None:
    """Measure, print and write."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    chosen, kinds = (CHECKPOINTS[:1], dict.fromkeys(KINDS, 1)) if options.quick else (CHECKPOINTS, KINDS)
    demo = prepared()
    pairs = [pair for at in checkpoints(demo, chosen) for pair in measured(demo, kinds, *at)]
    steps = dict.fromkeys(p["step"] for p in pairs)
    summary = {step: ranking.summarised([p for p in pairs if p["step"] == step], NATURAL) for step in steps}
    for step, found in summary.items():
        show(step, found)
    default = None if options.quick else Path(__file__).parent / "results" / "predictors-cpu.json"
    if out := options.json or default:
        asked = {"seed": SEED, "run": RUN, "checkpoints": chosen, "kinds": kinds, "sgd_lr": SGD_LR}
        rows = [{"summary": summary, "pairs": pairs}]
        record.write(Path(out), "predictors", asked | {"threads": options.threads}, describe_environment("cpu"), rows)


def prepared() -> Demo:
    """Return the demo's policy after its supervised steps, before the first GRPO step."""
    size = dataclasses.replace(DemoSize(), rl_steps=0, rl_run=RUN)
    draw = torch.Generator().manual_seed(SEED)
    return Demo(size, train(size, SEED, draw), draw)


def optimizer(demo: Demo, done: int) -> Any:
    """Return the AdamW of the GRPO step that comes after `done` steps."""
    return fp.adamw(demo.size.rl_lr * (1 - done / RUN), weight_decay=0.0)


def checkpoints(demo: Demo, chosen: Sequence[int]) -> Iterator[tuple[int, Params, OptState]]:
    """Yield (GRPO steps done, parameters, moments) along the run."""
    params, state = demo.trained.params, demo.trained.opt_state
    for done in range(max(chosen) + 1):
        if done in chosen:
            yield done, params, state
        batch = demo.rollouts(params, demo.prompts(demo.size.batch_prompts))
        step = fp.make_step(demo.trained.policy, fp.grpo(), optimizer(demo, done), MAX_GRAD_NORM)
        params, _, state, *_ = step(params, state, batch)


def batches(
    demo: Demo, kinds: Mapping[str, int], params: Params, exclude: Sequence[str]
) -> Iterator[tuple[str, Rollouts]]:
    """Yield (kind, update batch)."""
    count = demo.size.batch_prompts

    def drawn(prompts: int = count, digits: int | None = None) -> Rollouts:
        return demo.rollouts(params, demo.prompts(prompts, exclude, digits))

    for kind, digits in (("plain", None), ("easy", 4), ("hard", 6)):
        yield from ((kind, drawn(digits=digits)) for _ in range(kinds[kind]))
    for kind, change in (("reversed", Tensor.neg), ("shuffled", demo.dealt_anew)):
        for _ in range(kinds[kind]):
            batch = drawn()
            yield kind, batch._replace(advantages=change(_advantages(batch)))
    halves = [_halves(drawn(2 * count)) for _ in range(kinds["positive"])]
    yield from (("positive", high) for high, _ in halves)
    yield from (("negative", low) for _, low in halves)


def measured(
    demo: Demo, kinds: Mapping[str, int], number: int, params: Params, state: OptState
) -> Iterator[dict[str, Any]]:
    """Yield a row for every update batch and step at one checkpoint."""
    words = demo.prompts(2 * demo.size.evaluation_prompts)
    E, apart = (demo.rollouts(params, words[k::2]) for k in range(2))
    policy, running = demo.trained.policy, optimizer(demo, number)
    plain = fp.sgd(SGD_LR)
    steps: dict[str, tuple[Step, OptState]] = {
        "adamw": (fp.make_step(policy, fp.grpo(), running, MAX_GRAD_NORM), state),
        "adamw, no moments": (fp.make_step(policy, fp.grpo(), running, MAX_GRAD_NORM), running.init(params)),
        "sgd": (fp.make_step(policy, fp.grpo(), plain), plain.init(params)),
    }
    for order, (kind, batch) in enumerate(batches(demo, kinds, params, words)):
        for name, (step, opt_state) in steps.items():
            row = {"checkpoint": number, "batch": order, "kind": kind, "step": name}
            yield row | one(step, params, opt_state, E, apart, batch)
        print(f"checkpoint {number}: batch {order + 1} of {sum(kinds.values())}", flush=True)


def one(step: Step, params: Params, state: OptState, E: Rollouts, apart: Rollouts, batch: Rollouts) -> dict[str, Any]:
    """Return what one step does on E and on E′, and what was predicted of it."""
    update = fp.Update.from_step(step, params, state, batch)
    here, there = fp.probe(update, E, order=2).main, fp.probe(update, apart).main
    assert here.second_order is not None
    lr = step.optimizer.lr
    return {
        "entropy": here.before,
        "same E": {"change": here.change, "error": here.bars["change"].error},
        "independent E": {"change": there.change, "error": there.bars["change"].error},
        "predicted": {
            "δH₁": here.first_order,
            "δH₁ + δH₂": here.first_order + here.second_order,
            **fp.predict(update).totals,
            "always down": -lr,
        },
    }


def show(step: str, found: Mapping[str, Any]) -> None:
    """Print two tables for one kind of step: every prediction over all pairs, and its sign by kind of batch."""
    apart = found["independent E"]
    cells = [(truth, group, key, form) for _, truth, group, key, form in COLUMNS]
    rows = [[x, *(form.format(found[t][g][x][key]) for t, g, key, form in cells)] for x in apart["all"]]
    counted = f"{apart['pairs']['all']} pairs, {apart['pairs']['clear']} clear, median |ΔH| {apart['median |ΔH|']:.1e}"
    comparing.show(f"{step}: {counted}", ["prediction", *(heading for heading, *_ in COLUMNS)], rows)
    kinds = apart["kinds"]
    right = [[x, *(f"{k['right'][x]} / {k['pairs']}" for k in kinds.values())] for x in apart["all"]]
    rising = ["ΔH > 0", *(f"{k['rising']} / {k['pairs']}" for k in kinds.values())]
    comparing.show(f"{step}: signs that agree with ΔH on E′", ["prediction", *kinds], [rising, *right])


def _halves(rollouts: Rollouts) -> tuple[Rollouts, Rollouts]:
    """Return the half of highest advantage, and the other."""
    order = _advantages(rollouts).argsort(stable=True)
    half = len(order) // 2
    return take(rollouts, order[half:]), take(rollouts, order[:half])


def _advantages(rollouts: Rollouts) -> Tensor:
    assert rollouts.advantages is not None
    return rollouts.advantages


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Published predictors of the entropy change against what is measured.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one checkpoint, a batch of each kind, nothing written")
    parser.add_argument("--json", help="where the numbers go (default results/predictors-cpu.json)")
    return parser


if __name__ == "__main__":
    main()
