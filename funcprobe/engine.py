"""Values, gradients and directional derivatives of any function of scores, by microbatch and exactly.

Everything expensive is a score. A scalar f of the scores of a whole batch is differentiated by the chain rule through
them: reverse mode takes the cotangents `c = ∂f/∂s` on the small float64 arrays and pulls each microbatch's slice of
them back through the model; forward mode pushes a tangent through each microbatch and contracts at the end. Neither
knows what f is, so there is nothing to scale and no mean of means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import NamedTuple

import optree
import torch
import torch.nn.functional
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from funcprobe import tree
from funcprobe.data.rollouts import microbatches, take, to_device
from funcprobe.errors import ForwardModeError, NumericsError
from funcprobe.policy.module import Policy
from funcprobe.policy.scoring import score
from funcprobe.types import Microbatch, Observable, Params, Progress, Rollouts, Statistic, TokenScores

#: A scalar function of scores that also reports: (scores, rollouts) -> (value, info).
ScoresFunction = Callable[[TokenScores, Rollouts], tuple[Tensor, dict[str, Tensor]]]

Stats = Mapping[str, Statistic]


class Gradient(NamedTuple):
    """A scalar of a batch and its gradient."""

    value: Tensor  #: f(scores), a float64 scalar
    gradient: Params  #: ∂f/∂params, in the dtype of the parameters
    scores: TokenScores  #: [B, T], the scores of the whole batch
    info: dict[str, Tensor]  #: what f reported on the whole batch


class Directional(NamedTuple):
    """The scores of a batch and their derivative along one direction of parameter space."""

    scores: TokenScores  #: [B, T]
    tangents: TokenScores  #: [B, T], d scores / dε at params + ε·direction


def scores(
    policy: Policy,
    params: Params,
    rollouts: Rollouts,
    *,
    stats: Stats | None = None,
    microbatch: Microbatch = None,
    progress: Progress | None = None,
    what: str = "scores",
) -> TokenScores:
    """Return the scores `[B, T]` of a batch, by microbatch and without a graph.

    Raises:
        NumericsError: If a score is not finite; the message names the sequences.
    """
    rollouts = to_device(rollouts, policy.device)
    with torch.no_grad():
        pieces = [
            (rows, _finite(score(policy, params, part, stats), rows, what))
            for rows, part in _pieces(rollouts, microbatch, progress, what)
        ]
        return _gather(pieces, rollouts)


def gradient(
    f: ScoresFunction,
    policy: Policy,
    params: Params,
    rollouts: Rollouts,
    *,
    separable: bool = False,
    stats: Stats | None = None,
    microbatch: Microbatch = None,
    progress: Progress | None = None,
    what: str = "gradient",
) -> Gradient:
    """Return `f(scores)` and its gradient in the parameters, by reverse mode.

    `∂f/∂θ = Σ_microbatches (∂s/∂θ)ᵀ ∂f/∂s`. In general the cotangents `∂f/∂s` depend on every score, so a pass
    without gradients comes first. A *separable* f (the value of a batch is the sum of its slices' values) takes its
    cotangents from the slice at hand, and one pass does.

    Raises:
        NumericsError: If a score is not finite; the message names the sequences.
    """
    rollouts = to_device(rollouts, policy.device)
    known = (
        None
        if separable
        else scores(
            policy, params, rollouts, stats=stats, microbatch=microbatch, progress=progress, what=f"{what}: scores"
        )
    )
    cotangents = None if known is None else _cotangents(f, known, rollouts)
    total: Params | None = None
    pieces: list[tuple[Tensor, TokenScores]] = []
    flat = False  # whether the entropy of the slice before had no cotangent
    for rows, part in _pieces(rollouts, microbatch, progress, what):
        run = partial(score, policy, rollouts=part, stats=stats, rematerialise=True)

        def cotangents_at(at: TokenScores, part: Rollouts = part, rows: Tensor = rows) -> TokenScores:
            _finite(at, rows, what)
            return _cotangents(f, at, part) if cotangents is None else _rows(cotangents, rows, part)

        part_scores, pulled, flat = _pulled_back(run, params, cotangents_at, flat)
        pieces.append((rows, part_scores))
        total = _accumulate(total, pulled, fresh=len(pieces) > 2)
        del pulled
    assert total is not None  # validated rollouts have at least one row
    gathered = _gather(pieces, rollouts)
    value, info = f(gathered, rollouts)
    return Gradient(value, {name: g.detach() for name, g in total.items()}, gathered, info)


def directional(
    policy: Policy,
    params: Params,
    direction: Params,
    rollouts: Rollouts,
    *,
    stats: Stats | None = None,
    microbatch: Microbatch = None,
    progress: Progress | None = None,
    what: str = "forward-mode derivative",
) -> Directional:
    """Return the scores of a batch and their tangents along `direction`, by one forward-mode pass.

    `ṡ = (∂s/∂θ) v`, with v taken in the dtype of the parameters. Nothing is stored for a backward pass. Attention
    runs in the math kernel, the one that has forward derivatives.

    Raises:
        ForwardModeError: If an operation of the model has no forward derivative.
        NumericsError: If a score is not finite; the message names the sequences.
    """
    rollouts = to_device(rollouts, policy.device)
    direction = tree.like(direction, params)
    primals, tangents = [], []
    with math_attention(), torch.no_grad(), _forward_mode_errors():
        for rows, part in _pieces(rollouts, microbatch, progress, what):
            s, ds = torch.func.jvp(partial(score, policy, rollouts=part, stats=stats), (params,), (direction,))  # type: ignore[misc]
            primals.append((rows, _finite(s, rows, what)))
            tangents.append((rows, ds))
        return Directional(_gather(primals, rollouts), _gather(tangents, rollouts))


def derivative(f: Callable[[TokenScores], Tensor], along: Directional) -> tuple[Tensor, Tensor]:
    """Return `f(s)` and `Df(s)[ṡ]` for scores and tangents that `directional` returned; no model is run."""
    value, slope = torch.func.jvp(f, (along.scores,), (along.tangents,))  # type: ignore[misc]
    return value, slope


def anchored(
    observable: Observable, policy: Policy, rollouts: Rollouts, params: Params, *, microbatch: Microbatch = None
) -> Callable[[Params], Tensor]:
    """Return `params -> observable`, importance-sampled on rollouts that were drawn at the given `params`.

    The anchor's scores are computed once, here, and held constant. The function returned is pure and goes through
    `torch.func.grad`, `jvp` and `vmap`; it runs attention in the math kernel, so that all of them see one arithmetic.
    Under `grad` it keeps the graph of the whole batch: `gradient` and `directional` do not.

    Raises:
        NumericsError: If a score at the anchor is not finite.
    """
    rollouts = to_device(rollouts, policy.device)
    with math_attention():
        anchor = scores(policy, params, rollouts, stats=observable.stats, microbatch=microbatch)

    def measured(params: Params) -> Tensor:
        with math_attention():
            pieces = [
                (rows, score(policy, params, part, observable.stats)) for rows, part in _pieces(rollouts, microbatch)
            ]
            return observable(_gather(pieces, rollouts), anchor, rollouts)

    return measured


def detached(scores: TokenScores) -> TokenScores:
    """Return the scores as constants, `extra` included: an anchor, or the point at which a cotangent is taken."""
    return _each(Tensor.detach, scores)


def math_attention() -> AbstractContextManager[None]:
    """Return a context in which scaled-dot-product attention uses the kernel that has forward derivatives."""
    return sdpa_kernel(SDPBackend.MATH)


def _pieces(
    rollouts: Rollouts, microbatch: Microbatch, progress: Progress | None = None, what: str = ""
) -> Iterator[tuple[Tensor, Rollouts]]:
    """Yield (row indices, their rollouts), reporting each piece when it is done."""
    done, total = 0, rollouts.ids.shape[0]
    for rows in microbatches(rollouts, microbatch):
        yield rows, take(rollouts, rows)
        done += len(rows)
        if progress is not None:
            progress(what, done, total)


def _gather(pieces: list[tuple[Tensor, TokenScores]], rollouts: Rollouts) -> TokenScores:
    """Put the scores of microbatches back into the order of the batch, functionally: vmap may be watching."""
    order = torch.argsort(torch.cat([rows for rows, _ in pieces]))
    width = rollouts.completion_mask.shape[1]

    def join(*parts: Tensor) -> Tensor:
        padded = [torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in parts]
        return torch.cat(padded)[order.to(parts[0].device)]

    return _each(join, *(scores for _, scores in pieces))


def _cotangents(f: ScoresFunction, at: TokenScores, rollouts: Rollouts) -> TokenScores:
    return torch.func.grad(lambda s: f(s, rollouts)[0])(detached(at))


def _rows(cotangents: TokenScores, rows: Tensor, part: Rollouts) -> TokenScores:
    width = part.completion_mask.shape[1]
    return _each(lambda x: x[rows.to(x.device), :width], cotangents)


def _each(function: Callable[..., Tensor], *scores: TokenScores) -> TokenScores:
    """Return the scores whose every field is `function` of the corresponding fields."""
    return optree.tree_map(function, *scores)  # type: ignore[arg-type, return-value]


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


def _finite(found: TokenScores, rows: Tensor, what: str) -> TokenScores:
    healthy = torch.isfinite(found.logp.detach() + found.entropy.detach()).all(dim=1)
    if not bool(healthy.all()):
        bad = rows.to(healthy.device)[~healthy].tolist()
        listed = ", ".join(str(b) for b in sorted(bad)[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise NumericsError(
            f"The model returned log-probabilities that are not finite for sequence {listed} (in: {what}); check the "
            "weights, or load the model in a wider dtype."
        )
    return found


@contextmanager
def _forward_mode_errors() -> Iterator[None]:
    """Turn torch's ways of saying 'no forward derivative' into one of ours.

    Raises:
        ForwardModeError: In their place.
        RuntimeError: Any other one, as it came.
    """
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        said = str(error)
        if any(mark in said for mark in ("forward AD", "forward mode AD", "jvp")):
            first = said.strip().splitlines()[0]
            raise ForwardModeError(
                f'The model has an operation without a forward derivative ("{first}"); use mode="reverse".'
            ) from error
        raise
