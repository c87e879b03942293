"""Observables of the user's own: any pure function of scores, named, and checked before it costs a pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import optree
import torch
from torch import Tensor

from funcprobe import engine
from funcprobe.errors import InputError
from funcprobe.types import Observable, Proposal, Rollouts, Statistic, TokenScores, Weighting

#: What a user writes: (scores, anchor, rollouts) -> scalar.
Function = Callable[[TokenScores, TokenScores, Rollouts], Tensor]


@dataclass(frozen=True)
class Custom:
    """An observable made of a function of scores; see `observable`."""

    function: Function
    name: str
    unit: str
    weighting: Weighting = "sequence"
    proposal: Proposal = "anchor"
    inclusive: bool = False
    stats: Mapping[str, Statistic] = field(default_factory=dict, repr=False, hash=False)

    def __call__(self, scores: TokenScores, anchor: TokenScores, rollouts: Rollouts) -> Tensor:
        """Return the function's value at `scores`, for rollouts drawn at `anchor`."""
        return self.function(scores, anchor, rollouts)


def observable(
    name: str,
    unit: str,
    *,
    stats: Mapping[str, Statistic] | None = None,
    weighting: Weighting = "sequence",
    proposal: Proposal = "anchor",
    inclusive: bool = False,
) -> Callable[[Function], Custom]:
    """Return a decorator that makes an observable of a pure function `(scores, anchor, rollouts) -> scalar`.

    The function says what the policy at `scores` would give, from rollouts that the policy at `anchor` drew: so it
    weighs them, with the weights of `importance`. Its derivative is taken through `scores` alone. `unit` is printed
    beside its numbers, `stats` are the named statistics it needs in `scores.extra`. `weighting`, `proposal` and
    `inclusive` (per-decision weights over s ≤ t) say by which effective sample size it is to be judged.
    Estimand and bias are the function's own.

    Raises:
        InputError: If the weighting or the proposal is unknown.

    Example:
        >>> from funcprobe.data.rollouts import rollouts_from_lists
        >>> from funcprobe.estimators.importance import log_ratios, sequence_weights
        >>> @observable("success rate", "share of completions")
        ... def success_rate(scores, anchor, rollouts):
        ...     solved = rollouts.rewards > 0.5
        ...     w = sequence_weights(log_ratios(scores, anchor, rollouts), rollouts.weight)
        ...     return (w * solved).sum()
        >>> rollouts = rollouts_from_lists([[1], [1]], [[2], [3, 4]], temperature=1.0, rewards=[1.0, 0.2])
        >>> before = TokenScores(torch.tensor([[-1.0, 0.0], [-2.0, -0.5]]).double(), torch.zeros(2, 2).double())
        >>> after = before._replace(logp=torch.tensor([[-0.5, 0.0], [-2.5, -0.5]]).double())
        >>> check_observable(success_rate, before, rollouts)
        >>> [round(float(success_rate(scores, before, rollouts)), 3) for scores in (before, after)]
        [0.5, 0.731]
    """
    for option, value, choices in (
        ("weighting", weighting, get_args(Weighting)),
        ("proposal", proposal, get_args(Proposal)),
    ):
        if value not in choices:
            raise InputError(f"observable(): unknown {option} '{value}'; expected one of {', '.join(choices)}.")
    return lambda function: Custom(function, name, unit, weighting, proposal, inclusive, dict(stats or {}))


def check_protocol(found: object) -> None:
    """Check that a value has all that an observable needs; nothing is called.

    Raises:
        InputError: If it has not, or is the class or the factory of one.
    """
    if not isinstance(found, Observable) or isinstance(found, type):
        raise InputError(
            f"{found!r} is no observable: it needs name, unit, stats, weighting, proposal and inclusive, and to be "
            "callable. Call the factory, as in entropy(), or decorate a function of (scores, anchor, rollouts) with "
            'funcprobe.observable("its name", "its unit").'
        )


def check_observable(observable: Observable, anchor: TokenScores, rollouts: Rollouts) -> None:
    """Return if the observable is a finite, differentiable scalar of the scores; it is called once, no model is run.

    Dependence is read off the graph and not off a value: at the anchor a divergence has gradient 0, and an expected
    reward does wherever all rewards are equal, and both do depend on the scores.

    Raises:
        InputError: If it is no observable, or returns anything but a scalar floating-point tensor, or one that is not
            finite, has no finite derivative at the anchor, or does not depend on the scores.
    """
    check_protocol(observable)
    said = f"The observable '{observable.name}' returned"
    leaves, constants = engine.each(lambda x: x.detach().clone().requires_grad_(), anchor), engine.detached(anchor)
    with torch.enable_grad():
        value = observable(leaves, constants, rollouts)
    _check_value(value, said)
    slopes = torch.autograd.grad(value, optree.tree_leaves(leaves), allow_unused=True) if value.requires_grad else ()  # type: ignore[arg-type]
    known = [slope for slope in slopes if slope is not None]
    if not known:
        raise InputError(
            f"{said} a number that does not depend on the scores: nothing differentiable leads from scores.logp, "
            "scores.entropy or scores.extra to it; expected a function of those (item(), detach() and comparisons cut "
            "the way, and the anchor's scores are constants)."
        )
    if not all(bool(torch.isfinite(slope).all()) for slope in known):
        raise InputError(
            f"{said} a number whose derivative is not finite at the anchor; expected a finite one (a root or a "
            "logarithm of something that is 0 there has none)."
        )


def _check_value(value: Any, said: str) -> None:
    if not isinstance(value, Tensor):
        raise InputError(f"{said} a {type(value).__name__}; expected a scalar tensor, made of the scores by torch.")
    if value.shape != ():
        raise InputError(
            f"{said} a tensor of shape {list(value.shape)}; expected a scalar; sum over sequences and tokens, with "
            "importance weights."
        )
    if not value.dtype.is_floating_point:
        raise InputError(f"{said} a tensor of dtype {value.dtype}; expected a floating-point one, such as the scores'.")
    if not bool(torch.isfinite(value)):
        raise InputError(
            f"{said} {value.detach().item()} at the anchor, where nothing has moved; expected a finite number (does it "
            "divide by 0, or take a logarithm of it?)."
        )
