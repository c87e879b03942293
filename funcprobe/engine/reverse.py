"""Reverse mode: a scalar of a batch and its gradient, by pulling cotangents of the scores back through the model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe import tree
from funcprobe.data.rollouts import to_device
from funcprobe.engine.batches import Stats, finite, gather, pieces, scores
from funcprobe.engine.forward import cotangents, rows_of
from funcprobe.engine.kernels import EveryRow
from funcprobe.policy.module import Policy
from funcprobe.policy.scoring import score
from funcprobe.types import Microbatch, Params, Progress, Rollouts, TokenScores

#: A scalar function of scores that also reports: (scores, rollouts) -> (value, info).
ScoresFunction = Callable[[TokenScores, Rollouts], tuple[Tensor, dict[str, Tensor]]]


class Gradient(NamedTuple):
    """A scalar of a batch and its gradient."""

    value: Tensor  #: f(scores), a float64 scalar
    gradient: Params  #: ∂f/∂params, in the dtype of the parameters
    scores: TokenScores  #: [B, T], the scores of the whole batch, at which the cotangents were taken
    info: dict[str, Tensor]  #: what f reported on the whole batch


def gradient(
    f: ScoresFunction,
    policy: Policy,
    params: Params,
    rollouts: Rollouts,
    *,
    separable: bool = False,
    as_training: bool = True,
    stats: Stats | None = None,
    microbatch: Microbatch = None,
    progress: Progress | None = None,
    what: str = "gradient",
) -> Gradient:
    """Return `f(scores)` and its gradient in the parameters, by reverse mode.

    `∂f/∂θ = Σ_microbatches (∂s/∂θ)ᵀ ∂f/∂s`. In general the cotangents `∂f/∂s` depend on every score, so a pass
    without gradients comes first. A *separable* f (the value of a batch is the sum of its slices' values) takes its
    cotangents from the slice at hand, and one pass does. `as_training` leaves out the row `padding_idx` of an
    embedding, as torch's backward pass does; without it the gradient is the derivative, whatever the policy reads.

    Raises:
        NumericsError: If a score is not finite; the message names the sequences.
    """
    rollouts = to_device(rollouts, policy.device)
    if separable:

        def cotangents_at(at: TokenScores, rows: Tensor, part: Rollouts) -> TokenScores:
            return cotangents(lambda s: f(s, part)[0], at)

    else:
        known = scores(
            policy, params, rollouts, stats=stats, microbatch=microbatch, progress=progress, what=f"{what}: scores"
        )
        fixed = cotangents(lambda s: f(s, rollouts)[0], known)

        def cotangents_at(at: TokenScores, rows: Tensor, part: Rollouts) -> TokenScores:
            return rows_of(fixed, rows, part)

    options = _Options(as_training, stats, microbatch, progress, what)
    pulled, gathered = _pass(cotangents_at, policy, params, rollouts, options)
    at = gathered if separable else known  # those that the cotangents were taken at: they differ by rounding
    value, info = f(at, rollouts)
    return Gradient(value, pulled, at, info)


def pull_back(
    fixed: TokenScores,
    policy: Policy,
    params: Params,
    rollouts: Rollouts,
    *,
    as_training: bool = False,
    stats: Stats | None = None,
    microbatch: Microbatch = None,
    progress: Progress | None = None,
    what: str = "gradient",
) -> Params:
    """Return `(∂s/∂θ)ᵀ c` for cotangents c `[B, T]` that are known, by one reverse-mode pass.

    With `c = ∂f/∂s` it is the gradient of f; with all rows of c but one set to 0, what that row contributes to it.

    Raises:
        NumericsError: If a score is not finite; the message names the sequences.
    """
    rollouts = to_device(rollouts, policy.device)
    options = _Options(as_training, stats, microbatch, progress, what)
    return _pass(lambda _, rows, part: rows_of(fixed, rows, part), policy, params, rollouts, options)[0]


class _Options(NamedTuple):
    """How a reverse-mode pass is made."""

    as_training: bool
    stats: Stats | None
    microbatch: Microbatch
    progress: Progress | None
    what: str


def _pass(
    cotangents_at: Callable[[TokenScores, Tensor, Rollouts], TokenScores],
    policy: Policy,
    params: Params,
    rollouts: Rollouts,
    options: _Options,
) -> tuple[Params, TokenScores]:
    """Return the sum of all microbatches' pulled-back cotangents, and the scores of the batch."""
    total: Params | None = None
    found: list[tuple[Tensor, TokenScores]] = []
    flat = False  # whether the entropy of the slice before had no cotangent
    embeddings = nullcontext() if options.as_training else EveryRow()
    for rows, part in pieces(rollouts, options.microbatch, options.progress, options.what):
        run = partial(score, policy, rollouts=part, stats=options.stats, rematerialise=True)

        def checked(at: TokenScores, rows: Tensor = rows, part: Rollouts = part) -> TokenScores:
            return cotangents_at(finite(at, rows, options.what), rows, part)

        with embeddings:
            part_scores, pulled, flat = _pulled_back(run, params, checked, flat)
        found.append((rows, part_scores))
        total = _accumulate(total, pulled, fresh=len(found) > 2)
        del pulled
    assert total is not None  # validated rollouts have at least one row
    return {name: g.detach() for name, g in total.items()}, gather(found, rollouts)


def _pulled_back(
    run: Callable[..., TokenScores],
    params: Params,
    cotangents_at: Callable[[TokenScores], TokenScores],
    constant_entropy: bool,
) -> tuple[TokenScores, Params, bool]:
    """Return a slice's scores, its pulled-back gradient, and whether its entropy had no cotangent.

    Most objectives are functions of logp alone. Once a slice has shown it, the entropy's graph is not built for the
    next one; should that one need it after all, the slice is run again with it.
    """
    found, pull = torch.func.vjp(partial(run, constant_entropy=constant_entropy), params)  # type: ignore[misc]
    mine = cotangents_at(found)
    flat = not bool(mine.entropy.any())
    if constant_entropy and not flat:
        return _pulled_back(run, params, cotangents_at, False)
    (pulled,) = pull(mine, retain_graph=False, create_graph=False)
    return found, pulled, flat


def _accumulate(total: Params | None, more: Params, *, fresh: bool) -> Params:
    """Add `more`; in place once `total` is a sum of ours, since what autograd returns may alias between leaves."""
    if total is None:
        return more
    if not fresh:
        return tree.add(total, more)
    for name, g in total.items():
        g.add_(more[name])
    return total
