"""Work that is the same in one process and in several: verbs on a float64 policy, with uneven and with empty shares."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

import funcprobe as fp
from funcprobe.errors import FuncprobeError
from funcprobe.parallel.batches import gather_rollouts
from funcprobe.parallel.world import world
from tests.cases import ledgers, models, routing
from tests.cases.probes import Case, prompted
from tests.cases.tables import observables

#: 14 rows of E are uneven shares of three processes; 2 rows of U leave the third one none.
E, U = prompted(7, 2, seed=1), prompted(1, 2, seed=2, first=90)
THREE = observables("entropy", "reward", "kl")
LRS = [1e-6, 1e-5, 1e-4, 1e-3]


def readings(outcome: Any) -> dict[str, Any]:
    """Return the numbers of an outcome, without float errors: these follow the last bits."""
    named = {name: r._asdict() for name, r in outcome.readings.items()}
    kept = ("before", "change", "first_order", "second_order")
    numbers = {
        f"{name} {key}": fields[key] for name, fields in named.items() for key in kept if fields[key] is not None
    }
    bars = {f"{name} bar of {what}": bar.error for name, f in named.items() for what, bar in f["bars"].items()}
    return {**numbers, **bars, "norm": outcome.delta_norm, "ess": outcome.health.ess_prefix_min}


def every_verb() -> dict[str, Any]:
    """Return the numbers of every verb, by name."""
    case = Case(models.qwen2(torch.float64))
    update = case.update(1e-3, batch=U)
    given: dict[str, Any] = {"evaluation": E, "batch": U, "microbatch": 2, "observables": THREE}
    taken = update.take()
    compared = fp.compare({"one": update, "other": update.at(1e-4)}, E, THREE, microbatch=3)
    attributed = fp.attribute(update, E, THREE, microbatch=2, influence="prompts")
    sweep, curve = case.sweep(LRS, **given), case.curve(1e-3, **given)
    return {
        "forward": readings(case.probe(1e-3, **given).outcome),
        "reverse": readings(case.probe(1e-3, **given, mode="reverse").outcome),
        "path": readings(case.probe(1e-5, **given, method="path").outcome),
        "second order": readings(case.probe(1e-3, **given, order=2, exact=True).outcome),
        "sweep": {str(p.lr): readings(p) for p in sweep.points},
        "curve": {str(lr): readings(curve.at(lr)) for lr in (3e-5, 7e-4)},
        "compare": {name: readings(outcome) for name, outcome in compared.outcomes.items()},
        "parameters": {part.name: part.contribution for part in attributed.leaves},
        "tokens of U": attributed.batch.total,
        "tokens of E": attributed.evaluation.total,
        "influence": attributed.influence.matrix,
        "bits of θ′": [p.view(torch.int64).sum().item() for p in taken.params.values()],
    }


def experts() -> dict[str, Any]:
    """Return the probe of a mixture of experts, with the tokens that change experts."""
    case = Case(routing.gated(routing.top_two))
    outcome = case.probe(0.3, evaluation=E, batch=U, microbatch=2).outcome
    return {"routing": tuple(outcome.routing), "change": outcome.main.change}


def journaled() -> dict[str, Any]:
    """Return a sweep whose journal is the file that the environment names, and how often E was run."""
    calls: list[int] = []
    case = Case(models.qwen2(torch.float64)).watched_rows(calls)
    path = os.environ["FUNCPROBE_TEST_JOURNAL"]
    cold = case.optimizer.init(case.params)  # moments of a step in several processes differ in their last bits
    result = case.sweep(LRS, evaluation=E, batch=U, state=cold, observables=THREE, journal=path)
    return {"points": {str(p.lr): readings(p) for p in result.points}, "rows": sum(calls)}


class Refuses(torch.nn.Module):
    """A model that fails on a prompt of two sixes, which stands in one row of E: with an error, or with NaN."""

    def __init__(self, raises: bool) -> None:
        super().__init__()
        self.inner, self.raises = models.two_lines(), raises

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        refused = (ids[:, :2] == 6).all(1)
        if self.raises and bool(refused.any()):
            raise RuntimeError("no such prompt here")
        return torch.where(refused[:, None, None], torch.nan, self.inner(ids))


def one_fails(raises: bool = True) -> dict[str, Any]:
    """Return the words of every process where one of them cannot run its rows, and after how many seconds."""
    policy, params = fp.from_module(Refuses(raises))
    rollouts = fp.rollouts_from_lists([[1, 2], [3, 4], [6, 6], [1, 3]], [[2, 1]] * 4, temperature=1.0)
    delta = {name: 1e-3 * torch.ones_like(p) for name, p in params.items()}
    start = time.monotonic()
    try:
        fp.probe(fp.Update.from_delta(policy, params, delta), rollouts)
    except FuncprobeError as error:
        return {"kind": type(error).__name__, "said": str(error), "seconds": time.monotonic() - start}
    return {"said": "nothing"}


def one_meets_nan() -> dict[str, Any]:
    """Return the words of every process where the scores of one row are not finite."""
    return one_fails(raises=False)


def one_is_killed() -> str:
    """End one process in the middle, and return what the others say."""
    case = Case(models.qwen2())
    if world().rank == 1:
        os._exit(9)
    try:
        case.probe(1e-3, evaluation=E, batch=U)
    except FuncprobeError as error:
        return str(error)
    return "nothing"


def parts_of_a_batch() -> Any:
    """Return the batch that three processes draw, of which the second one has no row."""
    own = None if world().rank == 1 else prompted(1, 2, seed=world().rank, first=3 + 10 * world().rank)
    return tuple(gather_rollouts(own))


def a_live_ddp_pair() -> dict[str, Any]:
    """Return how far the step of a DDP trainer is from the update of its batch, and two readings of it."""
    rank = world().rank
    model = models.qwen2(torch.float64)
    live = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(live.parameters(), lr=1e-3, weight_decay=0.1)
    objective, own = fp.grpo(), prompted(2, 2, seed=5 + rank, first=20 * rank)
    run = fp.from_training(live, optimizer)
    batch = gather_rollouts(own)
    update = run.update(objective, batch)
    probed, delta = fp.probe(update, E, microbatch=4), update.take().delta
    before = {name: p.detach().clone() for name, p in run.params.items()}
    # what the trainer does: a loss on its own rows, whose gradients DDP averages
    prepared = objective.prepare(own)
    logits = live(prepared.ids, attention_mask=prepared.attention_mask).logits
    loss = _grpo_by_hand(logits, prepared)
    loss.backward()
    optimizer.step()
    names = {name.removeprefix("module."): p for name, p in live.named_parameters()}
    off = max(float((names[n].detach() - before[n] - delta[n]).abs().max()) for n in before)
    return {"off": off, "change": probed.change, "first order": probed.main.first_order}


def _grpo_by_hand(logits: torch.Tensor, rollouts: fp.Rollouts) -> torch.Tensor:
    """Return GRPO's loss at ratio 1: the mean over rows of the mean over tokens of −A log π."""
    logp = (logits[:, :-1] / rollouts.temperature[0]).log_softmax(-1)
    taken = logp.gather(-1, rollouts.ids[:, 1:, None])[..., 0]
    rows = []
    for b, (start, mask) in enumerate(zip(rollouts.prompt_lengths.tolist(), rollouts.completion_mask, strict=True)):
        length = int(mask.sum())
        assert rollouts.advantages is not None
        rows.append(-rollouts.advantages[b] * taken[b, start - 1 : start - 1 + length].mean())
    return torch.stack(rows).mean()


def ledger_of_a_loop() -> dict[str, Any]:
    """Return the numbers of a short run's ledger, kept in a folder that the environment names; all train alike."""
    loop = ledgers.Loop()
    book = ledgers.ledger(loop, Path(os.environ["FUNCPROBE_TEST_LEDGER"]), open_every=1)
    loop.run(book, 2)
    books = book.close()
    return {
        "change": [w.main.change for w in books],
        "error": [w.error for w in books],
        "split": [value for w in books for value in w.split.values()],
        "tokens": [o.whole for w in books for o in w.opened],
    }
