"""Attribution beside what a user would write, and beside other tools: `python benchmarks/attribution_peers.py`.

Everything runs in one process, one thread, on one model and the same two batches; processor seconds, as ratios to a
version in plain torch.

* **Every token of U for one functional of E.** The plain version takes ∇F by autograd, the gradient on U, AdamW's scale
  by hand, and one `torch.func.jvp` over U. A gradient for each sequence by `vmap(grad)` gives a number a sequence.
* **The influence matrix.** The plain version takes gradients of both sides by `vmap(grad)` in chunks, scales one side
  and multiplies, in float32. The same work by the package's own functions is a row of its own, "the matrix alone";
  `attribute(measure=False, influence="sequences")` is timed whole, with ∇F, the gradient on U and the pass over U.
  Peers do the same work, with losses of their own and no scale: dattri (Grad-Dot without projection, each side in one
  batch), bergson (linear modules below the head alone, gradients kept in memory, and one product). They are timed where
  they are installed:

      pip install dattri==0.3.0 bergson==2.5.1

What was expected: ≤ 1.1 for attribution alone, ≤ 1.6 with the measurement, ≤ 1.3 for the matrix.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import comparing, timing
from harness.pair import PROMPT, Pair, build
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import funcprobe as fp
from funcprobe import engine
from funcprobe.attribution.influence import influence_of
from funcprobe.attribution.step_parts import StepParts
from funcprobe.measurement.cautions import step
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.measurement import Measurement
from funcprobe.measurement.options import options_of
from funcprobe.types import Params, Rollouts

CHUNK = 16  #: rows of a vmapped gradient

#: What takes minutes here, and is run once, without a run before.
SLOW = ("dattri",)


class Plain:
    """The same numbers in plain torch, for batches of one length."""

    def __init__(self, pair: Pair) -> None:
        self.pair, self.module = pair, pair.module
        self.params = {name: p.detach() for name, p in pair.module.named_parameters()}
        prepared = pair.step.objective.prepare(pair.batch)
        assert prepared.advantages is not None
        self.advantages = prepared.advantages.float()

    def scores(self, params: Params, ids: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        """Return logp and entropy `[B, T]` of the completions."""
        out = torch.func.functional_call(self.module, params, (ids,), {"use_cache": False}).logits
        logs = torch.log_softmax(out[:, PROMPT - 1 : -1].float() / temperature[:, None, None], -1)
        logp = logs.gather(-1, ids[:, PROMPT:, None])[..., 0]
        return logp, -(logs.exp() * logs).sum(-1)

    def entropy(self, params: Params) -> Tensor:
        """Return the entropy per token of E, per decision, at the anchor."""
        e = self.pair.evaluation
        logp, entropy = self.scores(params, e.ids, e.temperature)
        d = logp - logp.detach()
        weight = (d.cumsum(1) - d).double().softmax(0)
        return (weight * entropy.double()).sum() / weight.sum()

    def loss(self, logp: Tensor, advantages: Tensor) -> Tensor:
        """Return dr_grpo's loss at ratio 1, of rows of the batch."""
        u = self.pair.batch
        ratio = (logp - logp.detach()).exp()
        return -(ratio * advantages[:, None]).sum() / (len(u.ids) * u.completion_mask.shape[1])

    def of_batch(self, params: Params) -> Tensor:
        """Return the loss on U."""
        u = self.pair.batch
        return self.loss(self.scores(params, u.ids, u.temperature)[0], self.advantages)

    def gradient(self, f: Callable[[Params], Tensor]) -> Params:
        """Return a gradient by autograd."""
        leaves = {name: p.requires_grad_() for name, p in self.params.items()}
        found = torch.autograd.grad(f(leaves), list(leaves.values()))
        for p in self.params.values():
            p.requires_grad_(False)
        return dict(zip(leaves, found, strict=True))

    def scale(self, gradient: Params) -> Params:
        """Return AdamW's −η (1 − β₁) / (bc₁ · denominator), by hand."""
        group, found = self.pair.optimizer.param_groups[0], {}
        (b1, b2), lr, eps = group["betas"], group["lr"], group["eps"]
        for name, p in self.module.named_parameters():
            state = self.pair.optimizer.state[p]
            t = float(state["step"]) + 1
            v = b2 * state["exp_avg_sq"] + (1 - b2) * gradient[name] ** 2
            found[name] = -lr * (1 - b1) / ((1 - b1**t) * ((v / (1 - b2**t)).sqrt() + eps))
        return found

    def tokens(self) -> Tensor:
        """Return the contribution of every token of U, `[B, T]`."""
        u = self.pair.batch
        of_f, g = self.gradient(self.entropy), self.gradient(self.of_batch)
        along = {name: s * of_f[name] for name, s in self.scale(g).items()}
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            logp, moved = torch.func.jvp(lambda p: self.scores(p, u.ids, u.temperature)[0], (self.params,), (along,))
        return torch.func.grad(lambda x: self.loss(x, self.advantages))(logp) * moved

    def sequences(self) -> Tensor:
        """Return the contribution of every sequence of U, `[B]`, from a gradient of each by vmap."""
        of_f, g = self.gradient(self.entropy), self.gradient(self.of_batch)
        along = {name: s * of_f[name] for name, s in self.scale(g).items()}
        each = self.each(self.pair.batch, self._row_of_batch(), lambda some: sum(_rows(some, along)))
        return torch.cat(each)

    def influence(self) -> Tensor:
        """Return the matrix `[E, U]`, gradients of E kept whole."""
        e = self.pair.evaluation
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            logp, entropy = self.scores(self.params, e.ids, e.temperature)
        leaves = (logp.requires_grad_(), entropy.requires_grad_())
        d = leaves[0] - logp.detach()
        weight = (d.cumsum(1) - d).double().softmax(0)
        value = (weight * leaves[1].double()).sum() / weight.sum()
        of_logp, of_entropy = (c.float() for c in torch.autograd.grad(value, leaves))

        def row(params: Params, ids: Tensor, temperature: Tensor, k: Tensor) -> Tensor:
            one, h = self.scores(params, ids[None], temperature[None])
            return sum((c.index_select(0, k[None]) * x).sum() for c, x in ((of_logp, one), (of_entropy, h)))

        scale = self.scale(self.gradient(self.of_batch))
        scaled = self.each(e, row, lambda some: {name: scale[name] * x for name, x in some.items()})
        held = {name: torch.cat([some[name] for some in scaled]).flatten(1) for name in scale}
        return torch.cat(
            self.each(
                self.pair.batch,
                self._row_of_batch(),
                lambda some: sum(held[name] @ x.flatten(1).T for name, x in some.items()).T,
            )
        ).T

    def each(self, rollouts: Rollouts, row: Callable[..., Tensor], then: Callable[[Params], Any]) -> list[Any]:
        """Return what becomes of the gradients of all rows, a chunk at a time."""
        taken, k = torch.vmap(torch.func.grad(row), in_dims=(None, 0, 0, 0)), torch.arange(len(rollouts.ids))
        with eager(self.module):
            return [
                then(taken(self.params, rollouts.ids[some], rollouts.temperature[some], some))
                for some in k.split(CHUNK)
            ]

    def _row_of_batch(self) -> Callable[..., Tensor]:
        def row(params: Params, ids: Tensor, temperature: Tensor, k: Tensor) -> Tensor:
            return self.loss(
                self.scores(params, ids[None], temperature[None])[0], self.advantages.index_select(0, k[None])
            )

        return row


@contextlib.contextmanager
def eager(module: Any) -> Any:
    """Let vmap run the model, whose masks it cannot build for other kernels."""
    before, module.config._attn_implementation = module.config._attn_implementation, "eager"
    try:
        yield
    finally:
        module.config._attn_implementation = before


def _rows(some: Params, along: Params) -> list[Tensor]:
    return [(x * along[name]).flatten(1).sum(1) for name, x in some.items()]


def ours(pair: Pair, **options: Any) -> fp.Attribution:
    """Attribute the update, its gradient taken anew."""
    update = fp.Update.from_step(pair.step, pair.params, pair.opt_state, pair.batch)
    return fp.attribute(update, pair.evaluation, microbatch=pair.shape.microbatch, **options)


def alone(pair: Pair) -> Any:
    """Take the matrix and no more: scores and cotangents of E, the gradient on U, and gradients of the rows."""
    update = fp.Update.from_step(pair.step, pair.params, pair.opt_state, pair.batch)
    given = {"microbatch": pair.shape.microbatch, "mode": "reverse", "bars": None}
    measurement = Measurement.of(update, pair.evaluation, None, options_of(given, "the matrix"))
    scores = measurement.passes.scores(update.params, "E at θ")
    c = engine.cotangents(Evidence(measurement.passes.evaluation, scores, scores).of(fp.entropy()), scores)
    move, _ = step(measurement, update)
    parts = StepParts.of(update, move, pair.shape.microbatch, "additive")
    return influence_of(measurement.passes, c, parts, by="sequences", leaves=None, chunk=None)


def dattri(plain: Plain) -> Any:
    """Take dattri's Grad-Dot of every row of U with every row of E."""
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader, TensorDataset

    def loss(params: Params, data: tuple[Tensor, ...]) -> Tensor:
        ids, temperature = (x[None] for x in data)
        return plain.scores(params, ids, temperature)[0].sum()

    pair = plain.pair
    task = AttributionTask(loss_func=loss, model=pair.module, checkpoints=pair.module.state_dict())
    made = TracInAttributor(task, torch.ones(1), normalized_grad=False)
    made.projector_kwargs = None
    sides = [
        DataLoader(TensorDataset(r.ids, r.temperature), batch_size=len(r.ids)) for r in (pair.batch, pair.evaluation)
    ]
    with eager(pair.module), contextlib.redirect_stderr(io.StringIO()):
        return made.attribute(*sides)


def bergson(pair: Pair) -> Any:
    """Take bergson's gradients of the rows of both batches, in memory, and their products; it writes some files."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "run.part").mkdir()
        return _bergson(pair, folder)


def _bergson(pair: Pair, folder: str) -> Any:
    from bergson import CollectorComputer, GradientProcessor, InMemoryCollector
    from bergson.config.config import IndexConfig
    from datasets import Dataset

    logging.disable(logging.INFO)
    sides = []
    for rollouts in (pair.batch, pair.evaluation):
        data = Dataset.from_dict(
            {"input_ids": rollouts.ids.tolist(), "length": [rollouts.ids.shape[1]] * len(rollouts.ids)}
        )
        config = IndexConfig(run_path=f"{folder}/run", projection_dim=0, token_batch_size=rollouts.ids.numel() // 8)
        processor = GradientProcessor(projection_dim=None)
        collector = InMemoryCollector(model=pair.module.base_model, data=data, cfg=config, processor=processor)
        cut = torch.arange(len(rollouts.ids)).split(8)
        computer = CollectorComputer(
            model=pair.module, data=data, collector=collector, batches=[x.tolist() for x in cut], cfg=config
        )
        with contextlib.redirect_stderr(io.StringIO()):
            computer.run_with_collector_hooks(desc="")
        sides.append(collector.gradients)
    return sum(sides[0][name].flatten(1) @ sides[1][name].flatten(1).T for name in sides[0])


def main() -> None:
    """Measure, print and write."""
    parser = comparing.parser("Attribution beside other ways.", batch=64, evaluation=64, length=80, rounds=5, threads=1)
    options = comparing.parsed(parser)
    torch.set_num_threads(options.threads)
    pair = build(comparing.shape_of(options))
    plain = Plain(pair)
    found = {**_tokens(plain, options), **_matrix(plain, options)}
    comparing.show("attribution beside other ways", ("what", "measured"), [_row(*item) for item in found.items()])
    comparing.write("attribution_peers", options, [found], pair.params)


def _tokens(plain: Plain, options: argparse.Namespace) -> dict[str, Any]:
    pair = plain.pair
    ways: dict[str, Callable[[], Any]] = {
        "attribute(measure=False)": partial(ours, pair, measure=False),
        "attribute, by difference": partial(ours, pair, method="difference", rounding=False),
        "attribute, default": partial(ours, pair),
        "vmap(grad), a number a sequence": plain.sequences,
    }
    exact = ours(pair, measure=False).batch.total
    off = (plain.tokens() - exact).abs().max() / exact.abs().max()
    found: dict[str, Any] = {"tokens: the plain version differs by, of the largest": float(off)}
    return found | _against("tokens", "plain torch", plain.tokens, ways, options)


def _matrix(plain: Plain, options: argparse.Namespace) -> dict[str, Any]:
    pair = plain.pair
    ways: dict[str, Callable[[], Any]] = {
        "the matrix alone": partial(alone, pair),
        "attribute(measure=False, influence='sequences')": partial(ours, pair, measure=False, influence="sequences"),
        "dattri": partial(dattri, plain),
        "bergson": partial(bergson, pair),
    }
    matrix = ours(pair, measure=False, influence="sequences").influence
    assert matrix is not None
    off = (plain.influence() - matrix.matrix).abs().max() / matrix.matrix.abs().max()
    found: dict[str, Any] = {"matrix: the plain version differs by, of the largest": float(off)}
    return found | _against("matrix", "plain torch", plain.influence, ways, options)


def _against(
    what: str,
    base: str,
    plain: Callable[[], Any],
    ways: dict[str, Callable[[], Any]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Return processor time of every way that is there over the plain one's, rounds alternating."""
    found: dict[str, Any] = {}
    for name, way in ways.items():
        once = name in SLOW
        try:
            taken = timing.side_by_side(way, plain, 1 if once else options.rounds, options.device, warm=once)
        except ImportError as error:
            found[f"{what}: {name}"] = f"not installed ({error.name})"
            continue
        found[f"{what}: {name} / {base}, processor time"] = taken.cpu
        found[f"{what}: {name} / {base}, wall quartiles"] = [taken.low, taken.high]
        found[f"{what}: {name}, {base}, wall seconds"] = list(taken.seconds)
        print(f"{what}: {name} / {base}: {taken.cpu:.2f}", flush=True)
    return found


def _row(what: str, value: Any) -> tuple[str, str]:
    if isinstance(value, str):
        return what, value
    if isinstance(value, list | tuple):
        return what, " .. ".join(f"{x:.3f}" for x in value)
    return what, f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.3f}"


if __name__ == "__main__":
    main()
