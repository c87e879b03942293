"""Methods that rank the tokens of U by their effect on a functional: the forms of attribution, and rivals to them.

Every method gives a number a token, up to an unknown positive scale; the lowest ones are those that are said to lower F
most. Attributions and published predictors have a sign of their own. Magnitudes (`abs_advantage`, `surprisal`,
`entropy`, `activation`) have none and are ranked as they are: which end of them matters is for a counterfactual to say.

Sources: `discriminant` arXiv 2602.03392; `cov_pg`, `cov_npg` arXiv 2505.22617; `sgd` is the first-order dot product of
TracIn, arXiv 2002.08484, by token: the step's optimizer is left out of it; `activation` is the activation difference of
arXiv 2510.13900, by token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe import engine, tree
from funcprobe.attribution.activations import activation_differences
from funcprobe.attribution.predictors import STATS, predictions
from funcprobe.attribution.step_parts import StepParts
from funcprobe.errors import InputError
from funcprobe.objectives.advantages import by_token
from funcprobe.training.response import respond
from funcprobe.types import Leaves, Params, Rollouts, TokenScores

#: A method of a direction u: a token's score is `(∂loss/∂s) · ṡ` with tangents along u.
Direction = Callable[[StepParts, Params], Leaves]

#: A method of the scores of U and its prepared rollouts alone.
Reading = Callable[[TokenScores, Rollouts], Tensor]

#: A method that runs the model itself.
Running = Callable[[StepParts], Tensor]


class Method(NamedTuple):
    """One way to rank tokens: along a direction, by a reading of scores, or by passes of its own."""

    meaning: str
    along: Direction | None = None
    reading: Reading | None = None
    running: Running | None = None


def _carried(form: str) -> Direction:
    def direction(parts: StepParts, gradient_of_f: Params) -> Leaves:
        given = parts.rule, parts.params, parts.opt_state, parts.gradient, gradient_of_f, parts.lr
        return respond(*given, form).direction  # type: ignore[arg-type]

    return direction


def _predicted(name: str) -> Reading:
    return lambda scores, prepared: predictions(scores, prepared).tokens[name]


def _abs_advantage(scores: TokenScores, prepared: Rollouts) -> Tensor:
    assert prepared.advantages is not None
    return by_token(prepared.advantages.double(), prepared.completion_mask).abs().expand_as(scores.logp)


def _activation(parts: StepParts) -> Tensor:
    after = tree.add(parts.params, parts.delta)  # in the dtype of θ, as θ′ is stored
    return activation_differences(parts.step.policy, parts.params, after, parts.prepared, parts.microbatch)


#: The methods by name; a new one is a line here.
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "additive": Method("contribution in the additive form", _carried("additive")),
        "jacobian": Method("contribution through the step's Jacobian", _carried("jacobian")),
        "sgd": Method("dot product of gradients, the optimizer left out", lambda _, g: tree.map_(torch.neg, g)),
        "cov_pg": Method("covariance, policy gradient (2505.22617)", reading=_predicted("cov_pg")),
        "cov_npg": Method("covariance, natural gradient (2505.22617)", reading=_predicted("cov_npg")),
        "discriminant": Method("entropy discriminant (2602.03392)", reading=_predicted("discriminant")),
        "abs_advantage": Method("|advantage|", reading=_abs_advantage),
        "surprisal": Method("−log π of the token", reading=lambda scores, _: -scores.logp),
        "entropy": Method("entropy of the token's distribution", reading=lambda scores, _: scores.entropy),
        "activation": Method("‖h(θ′) − h(θ)‖ of the state that the token is drawn from", running=_activation),
    }
)


def check_methods(methods: Sequence[str]) -> tuple[str, ...]:
    """Return the names of methods, each once.

    Raises:
        InputError: If there is none, or one is unknown.
    """
    if isinstance(methods, str) or not methods or (unknown := [m for m in methods if m not in METHODS]):
        shown = methods if isinstance(methods, str) or not methods else unknown[0]
        raise InputError(f"Unknown methods {shown!r}; expected a list of some of {', '.join(METHODS)}.")
    return tuple(dict.fromkeys(methods))


def rankings(parts: StepParts, gradient_of_f: Params, methods: Sequence[str]) -> dict[str, Tensor]:
    """Return the score of every token of U `[B, T]` by method, float64: one forward-mode pass over U for all of them.

    Raises:
        InputError: If the optimizer has not the form of a method.
        ForwardModeError: If the model has no forward derivative.
    """
    ways = {name: along for name in methods if (along := METHODS[name].along) is not None}
    directions = [along(parts, gradient_of_f) for along in ways.values()]
    stats = {**STATS, **parts.step.objective.stats}
    given, cut = (parts.step.policy, parts.params), parts.microbatch
    if directions:
        several = engine.directional_of_many(
            *given, directions, parts.prepared, as_training=True, stats=stats, microbatch=cut
        )
        scores = several[0].scores
    else:
        several, scores = [], engine.scores(*given, parts.prepared, stats=stats, microbatch=cut)
    found = {name: _contributed(parts.on_batch, along) for name, along in zip(ways, several, strict=True)}
    for name in methods:
        if (reading := METHODS[name].reading) is not None:
            found[name] = reading(engine.detached(scores), parts.prepared)
        if (running := METHODS[name].running) is not None:
            found[name] = running(parts)
    mask = parts.prepared.completion_mask
    return {name: torch.where(mask, found[name].detach().double(), 0.0) for name in methods}


def _contributed(cotangents: TokenScores, along: engine.Directional) -> Tensor:
    """Return `Σ_fields c ⊙ ṡ` `[B, T]`, of the fields that the loss reads."""
    tangents = along.tangents._replace(extra={name: along.tangents.extra[name] for name in cotangents.extra})
    return engine.fields(engine.each(torch.mul, cotangents, tangents)).sum(0)
