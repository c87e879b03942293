"""Changes to the token loss of a policy gradient: the choice of tokens that train, and terms added to them.

`token loss_t = keep_t (−surrogate_t) + Σ penalty_t + beta · kl_t`: a modifier sees the terms of every token and returns
the factor `keep`, the added `penalty`, or both. Averaging is left as it is, so a token that is kept out still counts in
the denominator, and the KL term to the reference stays on every token. Several modifiers see the same terms: their
factors multiply and their penalties add, in any order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from funcprobe.objectives.checks import check_number
from funcprobe.types import Rollouts


class TokenTerms(NamedTuple):
    """The input of a modifier: `[B, T]` each, finite everywhere, of no meaning where `counted` is False."""

    logp: Tensor  #: nats, log-probability of the token
    log_ratio: Tensor  #: nats, logp − old log-probability; 0 with its gradient where there is no old one
    ratio: Tensor  #: the importance ratio that the objective uses, of the token or of its sequence
    advantage: Tensor  #: the advantage of the token's row
    entropy: Tensor  #: nats, entropy of the distribution that the token was drawn from
    clipped: Tensor  #: bool, whether the clip range holds the ratio already
    counted: Tensor  #: bool, completion tokens of rows whose base weight is above 0


class Change(NamedTuple):
    """The change that a modifier makes to the token losses; None leaves them alone."""

    keep: Tensor | None = None  #: [B, T] factor of the surrogate term, without gradient
    penalty: Tensor | None = None  #: [B, T] added to the token loss
    chosen: Tensor | None = None  #: [B, T] bool, the tokens that it singles out; its share of the counted is reported


class Modifier(ABC):
    """A change to the token losses, as a pure function of the terms of all tokens given."""

    name: ClassVar[str]  #: what stands in the objective's name
    separable: ClassVar[bool]  #: whether the change to a token depends on that token alone
    adds: ClassVar[str | None] = None  #: what trains even where every advantage is 0

    @abstractmethod
    def __call__(self, terms: TokenTerms) -> Change:
        """Return the change to the token losses."""

    def caution(self, rollouts: Rollouts) -> str | None:
        """Return the caution about a step on these rollouts, advantages included, if there is any."""
        return None


def modified(
    losses: Tensor, terms: TokenTerms, modifiers: Sequence[Modifier]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the token losses `[B, T]` after all modifiers, where a surrogate is kept, and shares of counted tokens.

    `keep (−surrogate) + Σ penalty`, with `keep` the product of all factors, kept where that is not 0. The share of
    counted tokens that a modifier singles out is called `NAME_fraction`.
    """
    changes = {modifier.name: modifier(terms) for modifier in modifiers}
    kept = torch.ones_like(terms.counted)
    for change in changes.values():
        losses = losses if change.keep is None else losses * change.keep
        kept = kept if change.keep is None else kept & (change.keep != 0)
    for change in changes.values():
        losses = losses if change.penalty is None else losses + change.penalty
    tokens = terms.counted.sum().clamp(min=1)
    shares = {name: c.chosen.sum().double() / tokens for name, c in changes.items() if c.chosen is not None}
    return losses, kept, {f"{name}_fraction": share for name, share in shares.items()}


@dataclass(frozen=True)
class EntropyBonus(Modifier):
    """`−entropy_coef · H_t` on every token: entropy averaged as the objective averages tokens, and raised."""

    name = "entropy_bonus"
    separable = True
    adds = "the entropy bonus"

    entropy_coef: float = 1e-3  #: per nat; below 0 it lowers the entropy

    def __post_init__(self) -> None:
        check_number("entropy_coef", self.entropy_coef, "a finite number", lambda x: True)

    def __call__(self, terms: TokenTerms) -> Change:
        """Return the penalty `−entropy_coef · H`, with its gradient."""
        return Change(penalty=-self.entropy_coef * terms.entropy)


@dataclass(frozen=True)
class DropNegatives(Modifier):
    """Tokens of rows with an advantage below 0 do not train."""

    name = "drop_negatives"
    separable = True

    def __call__(self, terms: TokenTerms) -> Change:
        """Return the factor `1[A ≥ 0]`."""
        negative = terms.advantage < 0
        return Change(keep=(~negative).to(terms.logp.dtype), chosen=negative & terms.counted)

    def caution(self, rollouts: Rollouts) -> str | None:
        """Say that nothing is left, where advantages are below 0 and none above."""
        assert rollouts.advantages is not None
        there = rollouts.completion_mask.any(1) & (rollouts.weight > 0)
        signs = torch.sign(rollouts.advantages[there])
        if bool((signs > 0).any()) or not bool((signs < 0).any()):
            return None
        return "No advantage is above 0, so drop_negatives leaves no token to the policy gradient, which is zero."
