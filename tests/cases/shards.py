"""Work on parts of leaves, the same in one process as in several; asked in one it takes whole leaves."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe import engine, tree
from funcprobe.errors import FuncprobeError
from funcprobe.measurement.identity import identity_of
from funcprobe.measurement.measurement import Measurement
from funcprobe.measurement.options import Options
from funcprobe.parallel.shards import Cut, cut
from funcprobe.parallel.world import world
from funcprobe.types import Params, Rollouts
from tests.cases import models
from tests.cases.probes import Case, prompted
from tests.cases.shared_work import readings
from tests.cases.tables import observables

#: 9 rows of E are uneven shares of two and of three processes, and 2 of U leave the third one none: it runs idle.
E, U = prompted(3, 3, seed=1), prompted(1, 2, seed=2, first=90)

#: As many processes as the laws are stated for: each has a function of its own, whose sum one process takes.
MOST = 3


def parted(case: Case) -> Case:
    """Return the case on parts of its leaves; as it is in a process alone."""
    if world().size > 1:
        case.policy, case.params = fp.shard(case.policy, case.params)
        case.state = fp.shard_state(case.state, case.params)
        case.step = fp.make_step(case.policy, fp.grpo(), case.optimizer, max_grad_norm=1.0)
    return case


def leaves() -> Params:
    """Return leaves that do not divide evenly, are smaller than the world, or a single number."""
    g = torch.Generator().manual_seed(5)
    shapes = {"w": (3, 5), "b": (2,), "s": (), "unused": (4,)}
    return {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}


def laws(size: int = MOST) -> dict[str, Tensor]:
    """Return derivatives, in every mode, of functions of gathered leaves; reverse modes of their sum over processes."""
    p, v = leaves(), models.direction(leaves(), scale=1.0)
    several = world().size > 1
    p, v = (cut(p), cut(v)) if several else (p, v)
    together = Cut([name for name in p if isinstance(name, tree.Part)])
    x = torch.linspace(-1, 1, 5 * MOST, dtype=torch.float64).view(MOST, 5)[:size]

    def f(at: Params, own: Tensor) -> Tensor:
        return torch.tanh(at["w"] @ own).sum() * at["s"] + (at["b"] ** 3).sum() * own[0] + at["s"] ** 2

    def mine(at: Params) -> Tensor:  # all of it where this process is alone, which is what reverse modes sum
        return f(together.gather(at), x[world().rank]) if several else torch.stack([f(at, own) for own in x]).sum()

    def first(at: Params) -> Tensor:  # one and the same function in every process, for forward modes
        return f(together.gather(at) if several else at, x[0])

    def slope(at: Params) -> Tensor:
        return torch.func.jvp(first, (at,), (v,))[1]

    def seen(found: Params) -> Tensor:
        whole = fp.gather_leaves(found) if several else found
        return torch.cat([whole[name].flatten() for name in sorted(whole)])

    thrice = {name: torch.stack([y, 2 * y, -y]) for name, y in v.items()}
    taped = {name: y.clone().requires_grad_() for name, y in p.items()}
    plain = torch.autograd.grad(mine(taped), list(taped.values()), allow_unused=True)
    pulled = {name: g for name, g in zip(taped, plain, strict=True) if g is not None}
    moving = {name: y for name, y in p.items() if name == "b"}
    return {
        "value and slope": torch.stack(torch.func.jvp(first, (p,), (v,))),
        "second": torch.func.jvp(slope, (p,), (v,))[1],
        "some leaves": torch.func.jvp(lambda m: first({**p, **m}), (moving,), (tree.select(v, moving),))[1],
        "gradient": seen(torch.func.grad(mine)(p)),
        "plain gradient": seen(pulled),
        "unused": torch.tensor("unused" in pulled),
        "slope of the gradient": seen(torch.func.jvp(torch.func.grad(mine), (p,), (v,))[1]),
        "many slopes": torch.vmap(lambda w: torch.func.jvp(first, (p,), (w,))[1])(thrice),
        "many values": torch.vmap(first)(thrice),
        "one of many gradients": seen({n: g[1] for n, g in torch.vmap(torch.func.grad(mine))(thrice).items()}),
        "round trip": seen(p),
        "dot": tree.dot(p, v),
        "norm": tree.norm(tree.sub(p, v)),
        "norms": torch.tensor([x for _, x in sorted(tree.leaf_norms(p).items())]),
        "size and bytes": torch.tensor([tree.size(p), tree.bytes_of(p)]),
        "dot of a selection": tree.dot(tree.select(p, ["w", "b"]), tree.select(v, ["b", "w"])),
    }


def modes() -> dict[str, Any]:
    """Return the numbers of probes of a small model in both modes, by a path, and with a second order."""
    case, given = parted(Case(layered())), {"evaluation": E, "batch": U, "microbatch": 3}
    forward = case.probe(1e-3, **given, observables=observables("entropy", "reward"), keep_delta=True)
    assert forward.delta is not None
    return {
        "forward": readings(forward.outcome),
        "reverse": readings(case.probe(1e-3, **given, mode="reverse").outcome),
        "path and second order": readings(case.probe(1e-5, **given, method="path", order=2, exact=True).outcome),
        "kept": {name: d.double() for name, d in forward.delta.items()},
        "parameters": forward.provenance.environment["parameters"],
        "notes": len(forward.outcome.notes),
    }


def verbs() -> dict[str, Any]:
    """Return the numbers of a curve, a comparison and attributions of a small model."""
    case, given = parted(Case(layered())), {"evaluation": E, "batch": U, "microbatch": 5}
    update, curve = case.update(1e-3, batch=U), case.curve(1e-4, **given)
    compared = fp.compare({"one": update, "other": update.at(1e-4)}, E, fp.entropy(), microbatch=5)
    parts = fp.attribute(update, E, microbatch=5, influence="prompts", bars_of=["ledger"], leaves=_common)
    assert parts.influence is not None
    return {
        "curve": {str(lr): readings(curve.at(lr)) for lr in (3e-6, 7e-5)},
        "compared": {name: readings(outcome) for name, outcome in compared.outcomes.items()},
        "leaves": {p.name: [*p[1:]] for p in parts.leaves},
        "tokens of U": parts.batch.total,
        "tokens of E": parts.evaluation.total,
        "influence": parts.influence.matrix,
        "ledger's bars": {name: bar.error for name, bar in parts.bars["ledger"].items()},
        "concentrations": [each.share for each in parts.concentrations],
        "jacobian": {p.name: p.gradient for p in fp.attribute(update, E, microbatch=5, form="jacobian").leaves},
    }


def transformer() -> dict[str, Any]:
    """Return the numbers of a GPT-2, which is cut at its tied head: both modes, and forward over reverse."""
    case, given = parted(Case(models.gpt2(torch.float64, n_embd=8))), {"evaluation": E, "batch": U, "microbatch": 5}
    outcomes = {mode: case.probe(1e-3, **given, mode=mode).outcome for mode in ("forward", "reverse")}
    return {
        **{mode: readings(outcome) for mode, outcome in outcomes.items()},
        "notes": [len(outcome.notes) for outcome in outcomes.values()],
        "curvature": float(_curvature(case)),
    }


def _common(name: str) -> bool:
    return "common" in name


def _curvature(case: Case) -> Tensor:
    """Return Σ s̈ over E along θ, forward over reverse."""
    scores = engine.scores(case.policy, case.params, E, microbatch=4)
    ones = engine.each(torch.ones_like, scores)
    return engine.curvature_by_reverse(ones, case.policy, case.params, case.params, E, microbatch=4)


class Layered(nn.Module):
    """Layers in a list, behind an embedding, with a branch that no token reaches unless its id is 6."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(models.VOCABULARY, width)
        self.layers = nn.ModuleList(Branched(width) for _ in range(2))
        self.head = nn.Linear(width, models.VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden, ids == 6)
        return self.head(hidden)


class Branched(nn.Module):
    """A layer with a matrix for all tokens, and one that is read for some alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.common, self.rare = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor, some: Tensor) -> Tensor:
        hidden = hidden + torch.tanh(self.common(hidden))
        return torch.where(some[..., None], hidden + self.rare(hidden), hidden) if bool(some.any()) else hidden


def layered(module: type[nn.Module] = Layered) -> nn.Module:
    """Return a module of layers, seeded, in float64."""
    with models.seeded(4):
        return module().double()


class Detaching(Layered):
    """A model whose layers detach what their outputs depend on, which the derivative on E takes along."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Scaled(6) for _ in range(2))


class Scaled(Branched):
    """A layer that is scaled by the size of its matrix, as training holds it."""

    def forward(self, hidden: Tensor, some: Tensor) -> Tensor:
        return super().forward(hidden, some) * (1 + self.common.weight.norm().detach())


def detaching() -> dict[str, Any]:
    """Return a probe in reverse mode, whose backward passes on E see through `detach`."""
    case = parted(Case(layered(Detaching)))
    return {"reverse": readings(case.probe(1e-3, mode="reverse", evaluation=E, batch=U, microbatch=5).outcome)}


def plain_rows(rare: bool) -> Rollouts:
    """Return rows, of which one holds the id 6 or none does."""
    rows = [[1, 2], [3, 4], [6 if rare else 5, 1], [1, 3], [2, 2]]
    return fp.rollouts_from_lists([[1]] * 5, rows, temperature=1.0, rewards=[0.0, 1.0, 0.3, 0.2, 0.9])


def left_alone() -> dict[str, Any]:
    """Return the leaves without gradient, and the step's norm: with a branch that one row reaches, and with none."""
    case = parted(Case(layered()))
    found = {}
    for rare in (True, False):
        update = case.update(1e-3, batch=plain_rows(rare))
        gradient = update.gradient().gradient
        found[f"{rare} alone"] = float(sum(g is None for g in gradient.values()))
        found[f"{rare} norm"] = float(tree.norm(update.take().delta))
    return found


def refusal(work: Callable[[], Any]) -> dict[str, Any]:
    """Return the class and the words of what is refused."""
    try:
        work()
    except FuncprobeError as error:
        return {"kind": type(error).__name__, "said": str(error)}
    return {"kind": "", "said": "nothing"}


def wrapped_by_fsdp2() -> nn.Module:
    """Return a live module whose parameters are DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = layered()
    fully_shard(module, mesh=init_device_mesh("cpu", (world().size,)))
    return module


def frozen() -> nn.Module:
    """Return a module of which one layer is trained."""
    module = layered().requires_grad_(False)
    module.layers[0].requires_grad_(True)  # type: ignore[index]
    return module


class Outside(Layered):
    """A model that reads a layer's leaf itself."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + (self.layers[0].common.weight ** 2).sum()


class Given(Layered):
    """A model whose layers are given a list, which they could write to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Listed(6)])


class Listed(Branched):
    """A layer that is called with a list."""

    def forward(self, hidden: Tensor, some: Any) -> Tensor:
        return super().forward(hidden, some[0] if isinstance(some, list) else some)


class GivenAList(Given):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers[0](self.embed(ids), [ids == 6]))


def refusals() -> dict[str, dict[str, Any]]:
    """Return the words with which each of several things is refused, by name."""
    sharded = parted(Case(layered()))
    lifted = fp.from_torch(torch.optim.RMSprop, lr=1e-3)
    step = fp.make_step(sharded.policy, fp.grpo(), lifted)
    other = fp.Update.from_step(step, sharded.params, sharded.state, plain_rows(True))
    fsdp2 = wrapped_by_fsdp2()
    listed, half = parted(Case(layered(GivenAList))), layered().half()
    whole_gradient = {str(name): torch.ones_like(p) for name, p in sharded.params.items()}
    return {
        "fsdp2": refusal(lambda: fp.from_training(fsdp2)),
        "fsdp2 module": refusal(lambda: fp.from_module(fsdp2)),
        "no layers": refusal(lambda: fp.shard(*fp.from_module(models.two_lines()))),
        "outside": refusal(lambda: fp.shard(*fp.from_module(layered(Outside)))),
        "float16": refusal(lambda: fp.shard(*fp.from_module(half))),
        "adapter": refusal(lambda: fp.shard(*fp.from_module(frozen()))),
        "twice": refusal(lambda: fp.shard(sharded.policy, sharded.params)),
        "optimizer": refusal(other.take),
        "list": refusal(lambda: listed.probe(1e-3, batch=plain_rows(True), evaluation=plain_rows(True))),
        "anchored": refusal(lambda: fp.anchored(fp.entropy(), sharded.policy, E, sharded.params)),
        "sample": refusal(
            lambda: fp.sample(
                sharded.policy, sharded.params, [[1]], generator=torch.Generator(), max_new_tokens=1, eos_id=0
            )
        ),
        "named": refusal(
            lambda: fp.Update.from_gradient(
                sharded.policy, sharded.optimizer, sharded.params, sharded.state, whole_gradient
            ).take()
        ),
        "in a transform": refusal(lambda: torch.func.grad(lambda p: tree.dot(p, p))(sharded.params)),
        "whole": refusal(lambda: fp.gather_leaves(whole_gradient)),
    }


class Refuses(Layered):
    """A model that fails on the id 5 in the first process that has a row with it: in a layer, or by NaN."""

    def forward(self, ids: Tensor) -> Tensor:
        bad = bool((ids == 5).any()) and ids.shape[1] == 3
        if bad and os.environ.get("FUNCPROBE_TEST_FAILS") == "error":
            raise RuntimeError("no such token here")
        found = super().forward(ids)
        return found * torch.nan if bad else found


def one_fails() -> dict[str, Any]:
    """Return the words of every process where one of them fails in the middle of a pass; then that all goes on."""
    case = parted(Case(layered(Refuses)))
    found: dict[str, Any] = {}
    for mode in ("forward", "reverse"):
        for how in ("error", "nan"):
            os.environ["FUNCPROBE_TEST_FAILS"] = how
            start = time.monotonic()
            batch, evaluation = plain_rows(True), plain_rows(False)
            said = refusal(lambda m=mode, u=batch, e=evaluation: case.probe(1e-3, batch=u, evaluation=e, mode=m))
            found[f"{mode} {how}"] = {**said, "seconds": time.monotonic() - start}
    good = plain_rows(True)
    found["after"] = case.probe(1e-3, batch=good, evaluation=good, microbatch=1).change
    return found


def not_finite() -> dict[str, Any]:
    """Return the refusal of a gradient of which one process alone holds an entry that is not finite."""
    case = parted(Case(layered()))
    gradient = {name: torch.zeros_like(p) for name, p in case.params.items()}
    if world().is_first:
        next(iter(gradient.values()))[0] = torch.inf
    given = case.policy, case.optimizer, case.params, case.state, gradient
    return refusal(lambda: fp.Update.from_gradient(*given, lr=1e-3).take())


def identities() -> list[str]:
    """Return the identity of a sweep, and of one whose parameters differ in an entry that the last process has."""
    case = parted(Case(layered()))
    other = {name: p.clone() for name, p in case.params.items()}
    if world().rank == world().size - 1:
        next(iter(other.values()))[-1] += 1e-12
    found = []
    for params in (case.params, other):
        update = case.update(batch=U, params=params)
        found.append(identity_of(update, Measurement.of(update, E, None, Options())))
    return found


def held() -> dict[str, float]:
    """Return the entries that this process holds of parameters and optimizer state, and of the whole."""
    case = Case(layered())
    whole = {"parameters": tree.size(case.params), "leaves": len(case.params)}
    case = parted(case)
    own = sum(p.numel() for p in case.params.values())
    moments = sum(x.numel() for entries in case.state.values() for key, x in entries.items() if key != "step")
    body = case.policy.body
    assert body is not None
    kept = sum(p.numel() for p in body.skeleton.module.parameters())
    return {**whole, "own": own, "moments": moments, "in the copy": kept}


#: Asked in one process, in two and in three; and in fewer of these, where a number more tells nothing new.
ASKED = {
    1: (modes, left_alone, detaching, verbs, transformer),
    2: (modes, left_alone, detaching, verbs, transformer, refusals),
    3: (modes, left_alone),
}


def everything() -> dict[str, Any]:
    """Return all of this from one start of the processes; in a process alone the numbers to compare with."""
    size = world().size
    found: dict[str, Any] = {work.__name__: work() for work in ASKED[size]}
    if size > 1:
        found |= {work.__name__: work() for work in (one_fails, not_finite, identities, held)}
        found["laws"] = laws(size)
    return found
