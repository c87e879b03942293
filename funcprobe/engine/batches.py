"""Scores of a batch, by microbatch: cut, run, put back into the order of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Literal, TypeVar

import optree
import torch
import torch.nn.functional
from torch import Tensor

from funcprobe.data.rollouts import microbatches, take, to_device
from funcprobe.engine.kernels import forward_arithmetic
from funcprobe.errors import NumericsError, listed
from funcprobe.parallel.phases import phase
from funcprobe.parallel.world import world
from funcprobe.policy.module import Policy
from funcprobe.policy.scoring import score
from funcprobe.types import Microbatch, Params, Progress, Rollouts, Statistic, TokenScores

Stats = Mapping[str, Statistic]

Found = TypeVar("Found")


def scores(
    policy: Policy,
    params: Params,
    rollouts: Rollouts,
    *,
    stats: Stats | None = None,
    microbatch: Microbatch = None,
    progress: Progress | None = None,
    what: str = "scores",
    order: Literal[0, 1, 2] = 0,
) -> TokenScores:
    """Return the scores `[B, T]` of a batch, by microbatch and without a graph.

    With an `order` of 1 or 2 the model runs in the arithmetic of forward mode of that order (attention in the math
    kernel, formulas that can be differentiated twice), so that their scores may be subtracted from one another.

    Raises:
        NumericsError: If a score is not finite; the message names the sequences.
    """
    rollouts = to_device(rollouts, policy.device)
    with forward_arithmetic(policy, order) if order else nullcontext(), torch.no_grad():
        with phase(what):
            scored = [
                (rows, finite(of_rows(score(policy, params, part, stats), rows), rows, what))
                for rows, part in pieces(policy, rollouts, microbatch, progress, what)
            ]
        return gather(scored, rollouts)


def scores_of_many(
    policy: Policy,
    several: Sequence[Params],
    rollouts: Rollouts,
    *,
    stats: Stats | None = None,
    microbatch: Microbatch = None,
    progress: Progress | None = None,
    what: str = "scores",
    order: Literal[1, 2] = 1,
) -> list[TokenScores]:
    """Return the scores `[B, T]` at each of several parameter trees, all in one pass: vmap over the trees.

    What the trees share with the frozen weights is read once for all of them, so it pays where few leaves are trained
    (LoRA) or the model is small; activations take as many times the memory. The model runs in the arithmetic of forward
    mode of that order: the math kernel has a batching rule.

    Raises:
        NumericsError: If a score is not finite; the message names the sequences.
    """
    rollouts = to_device(rollouts, policy.device)
    stacked = {name: torch.stack([params[name] for params in several]) for name in several[0]}
    parts: list[list[tuple[Tensor, TokenScores]]] = [[] for _ in several]
    with forward_arithmetic(policy, order), torch.no_grad():
        with phase(what):
            for rows, part in pieces(policy, rollouts, microbatch, progress, what):
                run = torch.vmap(partial(score, policy, rollouts=part, stats=stats))
                together = run(stacked)
                for k, own in enumerate(parts):
                    own.append((rows, finite(of_rows(each(lambda x, k=k: x[k], together), rows), rows, what)))
        return [gather(own, rollouts) for own in parts]


def pieces(
    policy: Policy, rollouts: Rollouts, microbatch: Microbatch, progress: Progress | None = None, what: str = ""
) -> Iterator[tuple[Tensor, Rollouts]]:
    """Yield (row indices, their rollouts) of the pieces that this process runs, reporting each when it is done.

    Where leaves lie in parts, a process with fewer pieces than another takes part in the others' passes by idle ones:
    a row of the batch, and no row indices. What such a pass gives belongs to no row; see `of_rows`.
    """
    cut = own_pieces(rollouts, microbatch)
    done, total = 0, sum(len(rows) for rows in cut)
    for rows in cut:
        yield rows, take(rollouts, rows)
        done += len(rows)
        if progress is not None:
            progress(what, done, total)
    if policy.is_sharded:
        most = max(len(_cut_share(rollouts, mine, microbatch)) for mine in world().shares(rollouts))
        first = torch.zeros(1, dtype=torch.int64, device=rollouts.ids.device)
        yield from ((first[:0], take(rollouts, first)) for _ in range(most - len(cut)))


def own_pieces(rollouts: Rollouts, microbatch: Microbatch) -> list[Tensor]:
    """Return the row indices of every piece that this process runs: all of them, or its share among others."""
    own = world()
    if own.size == 1:
        return list(microbatches(rollouts, microbatch))
    return _cut_share(rollouts, own.shares(rollouts)[own.rank], microbatch)


def _cut_share(rollouts: Rollouts, mine: Tensor, microbatch: Microbatch) -> list[Tensor]:
    """Return the row indices of the pieces of a process whose rows are `mine`."""
    if not len(mine):
        return []
    return [mine[rows.to(mine.device)] for rows in microbatches(take(rollouts, mine), microbatch)]


def of_rows(found: Found, rows: Tensor) -> Found:
    """Return the findings of a pass that belong to its rows: all of them, or none where it was an idle one."""
    return found if len(rows) else optree.tree_map(lambda x: x[:0], found)  # type: ignore[arg-type, return-value]


def gather(parts: list[tuple[Tensor, TokenScores]], rollouts: Rollouts) -> TokenScores:
    """Return the scores of the whole batch, in its order, from those of the microbatches of every process."""
    own = world()
    if own.size == 1:
        return in_order(parts, rollouts)
    shares = own.shares(rollouts)
    ordered = in_order(parts, rollouts) if parts else None
    names = own.all_of(None if ordered is None else list(ordered.extra))
    extra = next(found for found in names if found is not None)
    width = rollouts.completion_mask.shape[1]
    stacked = rollouts.weight.new_zeros(2 + len(extra), 0, width) if ordered is None else fields(ordered)
    logp, entropy, *rest = own.gathered(stacked.double(), shares)
    return TokenScores(logp, entropy, dict(zip(extra, rest, strict=True)))


def in_order(parts: list[tuple[Tensor, TokenScores]], rollouts: Rollouts) -> TokenScores:
    """Put the scores of microbatches back into the order of their rows, functionally: vmap may be watching."""
    order = torch.argsort(torch.cat([rows for rows, _ in parts]))
    width = rollouts.completion_mask.shape[1]

    def join(*parts: Tensor) -> Tensor:
        padded = [torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in parts]
        return torch.cat(padded)[order.to(parts[0].device)]

    return each(join, *(scores for _, scores in parts))


def detached(scores: TokenScores) -> TokenScores:
    """Return the scores as constants, `extra` included: an anchor, or the point at which a cotangent is taken."""
    return each(Tensor.detach, scores)


def each(function: Callable[..., Tensor], *scores: TokenScores) -> TokenScores:
    """Return the scores whose every field is `function` of the corresponding fields."""
    return optree.tree_map(function, *scores)  # type: ignore[arg-type, return-value]


def fields(scores: TokenScores) -> Tensor:
    """Return the fields of the scores, statistics included, stacked along a new first axis."""
    return torch.stack([scores.logp, scores.entropy, *scores.extra.values()])


def finite(scores: TokenScores, rows: Tensor, what: str) -> TokenScores:
    """Return the scores of the given rows of the batch, if all of them are finite.

    A statistic is a score: where it is infinite its change is NaN, times a cotangent of 0 as well.

    Raises:
        NumericsError: Naming the sequences, otherwise.
    """
    asked = {
        "The model returned log-probabilities": (
            scores.logp.detach() + scores.entropy.detach(),
            "check the weights, or load the model in a wider dtype",
        )
    }
    for name, x in scores.extra.items():
        asked[f"The statistic '{name}' has values"] = (
            x.detach(),
            "return a number for every token, 0 where there is none",
        )
    for found, (x, then) in asked.items():
        healthy = torch.isfinite(x).all(dim=1)
        if not bool(healthy.all()):
            bad = listed(sorted(rows.to(healthy.device)[~healthy].tolist()))
            raise NumericsError(f"{found} that are not finite for sequence {bad} (in: {what}); {then}.")
    return scores
