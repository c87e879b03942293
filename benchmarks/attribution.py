"""What attributing U costs: `python benchmarks/attribution.py [--lora] [--device cuda]`.

* **One pass**: the forward-mode pass over U that gives every token its contribution, in scoring passes over U under the
  same (math) attention kernel. Expected: 3 and a little for the softmax's tangents, 2 with LoRA, and less in time,
  because elementwise work is not multiplied with the products.
* **Against per-sample gradients**: one backward per sequence, dotted with the same direction, at 512 sequences. It
  gives a number a sequence; the pass gives one a token. Expected: about even in FLOPs (3 against 3, with LoRA 2 against
  2 to 3), and in time what sequences gain by going together.
* **Memory**: the peak of the pass at 64 and 512 sequences, microbatch fixed. Expected: flat but for what a token
  leaves, some float64 scores.
* **Several directions**: one pushed over U, and eight sharing a pass (1 + 2·8 passes in place of 3·8).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from harness import comparing, timing
from harness.pair import Pair, build

from funcprobe import engine, tree
from funcprobe.attribution.predictors import STATS
from funcprobe.data.rollouts import take
from funcprobe.training.response import respond
from funcprobe.types import Params, Rollouts

SEQUENCES, TOGETHER = (64, 512), 8


class Work(NamedTuple):
    """A pair with ∇F carried back through its step; any ∇F costs the same, and the parameters themselves are free."""

    pair: Pair
    prepared: Rollouts
    direction: Params

    @classmethod
    def of(cls, pair: Pair) -> Work:
        """Prepare."""
        gradient, _ = pair.step.gradient(pair.params, pair.batch)
        found = respond(pair.step.rule, pair.params, pair.opt_state, gradient, pair.params)
        return cls(pair, pair.step.objective.prepare(pair.batch), found.direction)


def attributing(work: Work) -> Any:
    """Return what every token of U contributes, as `attribute` makes it, statistics of the predictors with it."""
    pair = work.pair
    cut = pair.shape.microbatch
    along = engine.directional(
        pair.policy, pair.params, work.direction, work.prepared, as_training=True, stats=STATS, microbatch=cut
    )
    c = engine.cotangents(lambda s: pair.step.objective(s, work.prepared)[0], along.scores)
    return c.logp * along.tangents.logp


def scoring(work: Work) -> Any:
    """Score U, attention in the math kernel."""
    pair = work.pair
    with engine.math_attention():
        return engine.scores(pair.policy, pair.params, work.prepared, microbatch=pair.shape.microbatch)


def per_sample(work: Work) -> Any:
    """Take the gradient of every sequence's own loss terms, and its product with the same direction."""
    pair, found = work.pair, []
    for j in range(len(work.prepared.ids)):
        one = engine.gradient(
            pair.step.objective, pair.policy, pair.params, take(work.prepared, [j]), separable=True, as_training=True
        )
        found.append(tree.dot(one.gradient, work.direction))
    return torch.stack(found)


def pushed(work: Work, rows: int) -> Any:
    """Push so many directions over U in one pass."""
    pair = work.pair
    cut = pair.shape.microbatch
    return engine.directional_of_many(
        pair.policy, pair.params, [work.direction] * rows, work.prepared, as_training=True, microbatch=cut
    )


def runs(pair: Pair) -> dict[str, Callable[[], Any]]:
    """Return what a child process may be asked for."""
    work = Work.of(pair)
    return {"attributing": partial(attributing, work), "scoring": partial(scoring, work)}


def main() -> None:
    """Measure, print and write."""
    parser = comparing.parser("The cost of attributing U.", batch=64, evaluation=4, length=64, rounds=5)
    parser.add_argument(
        "--sequences", type=int, default=SEQUENCES[1], help="of the comparison with per-sample gradients"
    )
    options = comparing.parsed(parser)
    if options.peak:
        what, size = options.peak.split(":")
        options.peak, options.batch = what, int(size)
        comparing.serve_peak(options, runs)
        return
    torch.set_num_threads(options.threads)
    work = Work.of(build(comparing.shape_of(options)))
    found = {**_passes(work, options), **_per_sample(options), **_several(work, options), **_memory(options)}
    comparing.show("attribution of U", ("what", "measured", "target"), [_row(*item) for item in found.items()])
    comparing.write("attribution", options, [found], work.pair.params)


#: What was to be reached.
TARGETS = {"FLOPs: the pass / a scoring pass": 4.0, "time: the pass / a scoring pass": 4.0}


def _passes(work: Work, options: argparse.Namespace) -> dict[str, Any]:
    one, base = partial(attributing, work), partial(scoring, work)
    taken = timing.side_by_side(one, base, options.rounds, options.device)
    ratio = comparing.flops(one) / comparing.flops(base)
    return {
        "FLOPs: the pass / a scoring pass": ratio,
        "time: the pass / a scoring pass": taken.median,
        "quartiles": [taken.low, taken.high],
        "seconds": taken.seconds,
    }


def _per_sample(options: argparse.Namespace) -> dict[str, Any]:
    count = 8 if options.quick else options.sequences
    work = Work.of(build(comparing.shape_of(options)._replace(batch=count)))
    one, each = partial(attributing, work), partial(per_sample, work)
    taken = timing.side_by_side(each, one, 1 if options.quick else 3, options.device)
    a, b = one().sum(1), each()
    return {
        f"FLOPs: {count} per-sample gradients / the pass": comparing.flops(each) / comparing.flops(one),
        f"time: {count} per-sample gradients / the pass": taken.median,
        "per-sample quartiles": [taken.low, taken.high],
        "per-sample seconds": taken.seconds,
        "they differ by, of the largest": float((a - b).abs().max() / b.abs().max()),
    }


def _several(work: Work, options: argparse.Namespace) -> dict[str, Any]:
    one, together = partial(pushed, work, 1), partial(pushed, work, TOGETHER)
    taken = timing.side_by_side(together, one, max(1, options.rounds // 2), options.device)
    return {
        f"FLOPs: {TOGETHER} directions in a pass / {TOGETHER} passes": comparing.flops(together)
        / (TOGETHER * comparing.flops(one)),
        f"time: {TOGETHER} directions in a pass / {TOGETHER} passes": taken.median / TOGETHER,
    }


def _memory(options: argparse.Namespace) -> dict[str, Any]:
    sizes = (4, 8) if options.quick else SEQUENCES
    return {
        f"peak MiB, {what}, {size} sequences": comparing.peak(options, f"{what}:{size}")
        for size in sizes
        for what in ("attributing", "scoring")
    }


def _row(what: str, value: Any) -> tuple[str, str, str]:
    target = f"≤ {TARGETS[what]:g}" if what in TARGETS else ""
    if isinstance(value, list | tuple):
        return what, " .. ".join(f"{x:.3f}" for x in value), target
    return what, f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.3f}", target


if __name__ == "__main__":
    main()
