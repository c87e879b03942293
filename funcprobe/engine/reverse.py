"""Reverse mode: a scalar of a batch and its gradient, by pulling cotangents of the scores back through the model.

The backward pass is plain autograd's, on leaves of its own: whatever trains by `loss.backward()` has a gradient here,
functions of the old kind, checkpointed blocks and sparse embeddings among it. `.grad` is never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe import tree
from funcprobe.data.rollouts import take, to_device
from funcprobe.engine.batches import (
    Stats,
    detached,
    fields,
    finite,
    gather,
    in_order,
    of_rows,
    own_pieces,
    pieces,
    scores,
)
from funcprobe.engine.forward import cotangents, rows_of
from funcprobe.engine.kernels import EveryRow, whole_derivative
from funcprobe.engine.tangent import few, hold, values, zeros_of
from funcprobe.errors import ReverseModeError
from funcprobe.parallel.phases import phase
from funcprobe.parallel.world import world
from funcprobe.policy.module import Policy
from funcprobe.policy.running import first_sentence
from funcprobe.policy.scoring import score
from funcprobe.types import Microbatch, Params, Progress, Rollouts, TokenScores

#: A scalar function of scores that also reports: (scores, rollouts) -> (value, info).
ScoresFunction = Callable[[TokenScores, Rollouts], tuple[Tensor, dict[str, Tensor]]]


#: From the scores of a slice, its row indices and its rollouts to its cotangents.
CotangentsAt = Callable[[TokenScores, Tensor, Rollouts], TokenScores]


class Gradient(NamedTuple):
    """A scalar of a batch and its gradient."""

    value: Tensor  #: f(scores), a float64 scalar
    gradient: Params  #: ∂f/∂params, in the dtype of the parameters
    scores: TokenScores  #: [B, T], the scores of the whole batch, at which the cotangents were taken
    info: dict[str, Tensor]  #: what f reported on the whole batch
    unreached: frozenset[str] = frozenset()  #: leaves that no score depends on; their gradient reads 0


def gradient(
    f: ScoresFunction,
    policy: Policy,
    params: Params,
    rollouts: Rollouts,
    *,
    separable: bool = False,
    as_training: bool = True,
    offload: torch.device | str | None = None,
    stats: Stats | None = None,
    microbatch: Microbatch = None,
    progress: Progress | None = None,
    what: str = "gradient",
) -> Gradient:
    """Return `f(scores)` and its gradient in the parameters, by reverse mode.

    `∂f/∂θ = Σ_microbatches (∂s/∂θ)ᵀ ∂f/∂s`. In general the cotangents `∂f/∂s` depend on every score, so a pass
    without gradients comes first, unless the batch is run in one piece. A *separable* f (the value of a batch is the
    sum of its slices' values) takes its cotangents from the slice at hand, and one pass does. `as_training` leaves out
    the row `padding_idx` of an embedding, as torch's backward pass does; without it the gradient is the derivative,
    whatever the policy reads.

    A leaf that no score of the batch depends on (an expert that no token reaches, an adapter that is not active) is
    `unreached`: a training loop leaves its `.grad` None, which is another thing than 0.

    With `offload` the gradient is summed on that device: each leaf goes there after every microbatch.

    Raises:
        NumericsError: If a score is not finite; the message names the sequences.
        ReverseModeError: If the model has no backward pass.
    """
    (found,) = gradients(
        [Wanted(f, rollouts, separable)],
        policy,
        params,
        as_training=as_training,
        offload=offload,
        stats=stats,
        microbatch=microbatch,
        progress=progress,
        what=what,
    )
    return found


class Wanted(NamedTuple):
    """A scalar function of scores whose gradient is wanted, and its batch."""

    f: ScoresFunction
    rollouts: Rollouts  #: the rows are those of the others; what f reads beside scores may differ
    separable: bool = False


def gradients(
    wanted: Sequence[Wanted],
    policy: Policy,
    params: Params,
    *,
    as_training: bool = True,
    offload: torch.device | str | None = None,
    stats: Stats | None = None,
    microbatch: Microbatch = None,
    progress: Progress | None = None,
    what: str = "gradient",
) -> list[Gradient]:
    """Return the results of `gradient` for several functions of the scores of one batch, which share forward passes.

    A microbatch is run once, and pulled back through once for each function: one and 2K forward passes in place of 3K.
    All K gradients exist at once. `stats` are those of all functions.

    Raises:
        NumericsError: If a score is not finite; the message names the sequences.
        ReverseModeError: If the model has no backward pass.
    """
    wanted = [each._replace(rollouts=to_device(each.rollouts, policy.device)) for each in wanted]
    rollouts, known = wanted[0].rollouts, None
    if not as_training:
        _check_gradient(policy, params)
    if not all(each.separable for each in wanted) and not _in_one_piece(rollouts, microbatch):
        known = scores(
            policy, params, rollouts, stats=stats, microbatch=microbatch, progress=progress, what=f"{what}: scores"
        )
    options = _Options(as_training, stats, microbatch, progress, what, offload)
    ways = [_cotangents_of(each, known) for each in wanted]
    pulled, gathered = _pass(ways, policy, params, rollouts, options)
    found = []
    for each, own in zip(wanted, pulled, strict=True):
        # those that the cotangents were taken at: they differ by rounding
        at = gathered if each.separable or known is None else known
        value, info = each.f(at, each.rollouts)
        found.append(Gradient(value, _with_zeros(own, params), at, info, frozenset(params) - own.keys()))
    return found


def _cotangents_of(wanted: Wanted, known: TokenScores | None) -> CotangentsAt:
    """Return the function from a slice's scores to its cotangents: of the slice alone, or its part of the batch's."""
    if wanted.separable:
        return lambda at, rows, _: cotangents(lambda s: wanted.f(s, take(wanted.rollouts, rows))[0], at)

    def of_batch(whole: TokenScores) -> TokenScores:
        return cotangents(lambda s: wanted.f(s, wanted.rollouts)[0], whole)

    if known is None:  # the slice is the batch, in another order of rows
        return lambda at, rows, part: rows_of(of_batch(in_order([(rows, at)], wanted.rollouts)), rows, part)
    fixed = of_batch(known)
    return lambda _, rows, part: rows_of(fixed, rows, part)


def _in_one_piece(rollouts: Rollouts, microbatch: Microbatch) -> bool:
    """Return whether this process runs the whole batch at once, so that its scores are known when they are needed."""
    return world().size == 1 and len(own_pieces(rollouts, microbatch)) == 1


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
        ReverseModeError: If the model has no backward pass.
    """
    rollouts = to_device(rollouts, policy.device)
    if not as_training:
        _check_gradient(policy, params)
    options = _Options(as_training, stats, microbatch, progress, what)
    (pulled,), _ = _pass([lambda _, rows, part: rows_of(fixed, rows, part)], policy, params, rollouts, options)
    return _with_zeros(pulled, params)


class _Options(NamedTuple):
    """How a reverse-mode pass is made."""

    as_training: bool
    stats: Stats | None
    microbatch: Microbatch
    progress: Progress | None
    what: str
    offload: torch.device | str | None = None


def _pass(
    ways: Sequence[CotangentsAt], policy: Policy, params: Params, rollouts: Rollouts, options: _Options
) -> tuple[list[Params], TokenScores]:
    """Return each way's sum of all microbatches' pulled-back cotangents, of leaves that are reached, and the scores."""
    totals: list[Params] = [{} for _ in ways]
    ours: list[set[str]] = [set() for _ in ways]  # names whose entry is a sum of ours, which may be added to in place
    found: list[tuple[Tensor, TokenScores]] = []
    flat = False  # whether the entropy of the slice before had no cotangent
    with phase(options.what):
        for rows, part in pieces(policy, rollouts, options.microbatch, options.progress, options.what):
            run = partial(_score, policy, rows=rows, rollouts=part, options=options)

            def checked(at: TokenScores, rows: Tensor = rows, part: Rollouts = part) -> list[TokenScores]:
                if not len(rows):  # an idle pass
                    return [at for _ in ways]
                at = finite(at, rows, options.what)
                return [way(at, rows, part) for way in ways]

            part_scores, pulled, flat = _pulled_back(run, params, checked, flat)
            found.append((rows, part_scores))
            for total, own, more in zip(totals, ours, pulled, strict=True):
                _accumulate(total, more, own, options.offload)
    # what is pulled back to parts of leaves is the sum already
    summed = totals if policy.is_sharded else [world().summed(total, params, options.offload) for total in totals]
    return summed, gather(found, rollouts)


def _score(
    policy: Policy, params: Params, rows: Tensor, rollouts: Rollouts, options: _Options, constant_entropy: bool
) -> TokenScores:
    """Return the rows' scores with a graph: of the part that training derives, or of all that the policy computes."""
    run = partial(score, policy, params, rollouts, options.stats, rematerialise=True, constant_entropy=constant_entropy)
    if options.as_training:
        return of_rows(run(), rows)
    with EveryRow(), whole_derivative(policy):
        return of_rows(run(), rows)


def _check_gradient(policy: Policy, params: Params) -> None:
    """Hold the first gradient that is asked of a policy against a finite difference along a random direction."""
    if policy.checks is None or "reverse" in policy.checks.tangents:
        return
    generator = torch.Generator().manual_seed(0)
    rollouts = few(policy)
    c = _noise(values(zeros_of(rollouts), rollouts.completion_mask), generator)  # first: it is the same for all parts
    v = {n: _noise(p, generator) * p.float().square().mean().sqrt().to(p.dtype) for n, p in params.items()}

    def slope(at: Rollouts) -> Tensor:
        n = len(c) // 2
        mask = at.completion_mask
        place = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
        fixed = TokenScores(place.masked_scatter(mask, c[:n]), place.masked_scatter(mask, c[n:]))
        options = _Options(False, None, None, None, "gradient check")
        (pulled,), _ = _pass([lambda _, rows, part: rows_of(fixed, rows, part)], policy, params, at, options)
        return tree.dot(pulled, tree.select(v, pulled)).reshape(1)

    if not hold("reverse", policy, params, v, slope, c):
        policy.checks.found(
            "tangent",
            "the gradient of the model is not its derivative: on a few tokens it disagrees with a finite difference, "
            "so first orders in reverse mode are those of the gradient that training takes",
            warns=True,
        )


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(device=like.device, dtype=like.dtype)


def _pulled_back(
    run: Callable[..., TokenScores],
    params: Params,
    cotangents_at: Callable[[TokenScores], list[TokenScores]],
    constant_entropy: bool,
) -> tuple[TokenScores, list[Params], bool]:
    """Return a slice's scores, its pulled-back gradients, and whether its entropy had no cotangent.

    Most objectives are functions of logp alone. Once a slice has shown it, the entropy's graph is not built for the
    next one; should that one need it after all, the slice is run again with it.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    with torch.enable_grad():
        found = run(leaves, constant_entropy=constant_entropy)
        stacked = fields(found)
    at = detached(found)
    several = cotangents_at(at)
    flat = not tree.anywhere(any(bool(mine.entropy.any()) for mine in several), params)
    if constant_entropy and not flat:
        return _pulled_back(run, params, cotangents_at, False)
    if not stacked.requires_grad:
        return at, [{} for _ in several], flat
    pulled: list[Params] = []
    for mine in several:
        kept = len(pulled) + 1 < len(several)  # the graph, for the next one
        with _backward_errors():
            of = torch.autograd.grad(stacked, list(leaves.values()), fields(mine), allow_unused=True, retain_graph=kept)
        pulled.append({n: _dense(g) for n, g in zip(leaves, of, strict=True) if g is not None})
    return at, pulled, flat


def _accumulate(total: Params, more: Params, ours: set[str], device: torch.device | str | None) -> None:
    """Add `more`, which is emptied, to `total`; in place once an entry is a sum of ours: autograd's may alias."""
    for name in list(more):
        g = more.pop(name) if device is None else more.pop(name).to(device)
        if name not in total:
            total[name] = g
        elif name in ours:
            total[name].add_(g)
        else:
            total[name] = total[name] + g
            ours.add(name)


def _with_zeros(pulled: Params, params: Params) -> Params:
    return {name: pulled[name] if name in pulled else torch.zeros_like(p) for name, p in params.items()}


def _dense(gradient: Tensor) -> Tensor:
    """Return the gradient of an embedding with `sparse=True` as any other."""
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


@contextmanager
def _backward_errors() -> Iterator[None]:
    """Turn torch's errors about a backward pass that cannot be made into one sentence of ours.

    Raises:
        ReverseModeError: In its place.
        torch.OutOfMemoryError: As it came.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise ReverseModeError(
            f'The model has no backward pass here ("{first_sentence(error)}"); a reentrant torch.utils.checkpoint '
            "in its forward is made non-reentrant by use_reentrant=False, and anything else has to train by "
            "loss.backward() first."
        ) from error
