"""One loss over several micro-batches, each averaged by itself, as under gradient accumulation.

`loss = Σ_k Σ_(b,t in k) m_bt · token loss_bt / n_k`. Where all n_k are equal this is the loss of the whole batch; where
a mean is taken over every micro-batch's own tokens it is not, and short micro-batches weigh more a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from funcprobe.errors import InputError
from funcprobe.objectives.policy_gradient import PolicyGradient
from funcprobe.types import Rollouts, Statistic, TokenScores


@dataclass(frozen=True)
class Accumulated:
    """A policy gradient over micro-batches: rows in order, `rows[k]` of them in micro-batch k.

    `divisors[k]` takes the place of the base's normaliser in micro-batch k; None leaves the base's weights as they are.
    A modifier that compares tokens compares those of one micro-batch.
    """

    base: PolicyGradient
    rows: tuple[int, ...]  #: rows of every micro-batch, in the order of the rollouts
    divisors: tuple[float, ...] | None = None  #: what every micro-batch's sum of token losses is divided by

    def __post_init__(self) -> None:
        if not self.rows or min(self.rows) < 1:
            raise InputError(f"The micro-batches have {self.rows} rows; expected at least one, each with a row.")
        if self.divisors is not None and (len(self.divisors) != len(self.rows) or not min(self.divisors) > 0):
            raise InputError(f"The divisors are {self.divisors}; expected {len(self.rows)} numbers above 0.")

    @property
    def name(self) -> str:
        """The base's name."""
        return self.base.name

    @property
    def separable(self) -> bool:
        """Whether the loss of a prepared batch is the sum of its slices' losses: if the base's is."""
        return self.base.separable

    @property
    def stats(self) -> Mapping[str, Statistic]:
        """The per-token statistics that the base needs."""
        return self.base.stats

    def prepare(self, rollouts: Rollouts) -> Rollouts:
        """Return the rollouts with advantages, and token weights `[B, T]` that divide by each micro-batch's own n_k.

        Raises:
            InputError: If there are not as many rows as the micro-batches have, or the base cannot use the rollouts.
        """
        self._check_rows(rollouts)
        prepared = self.base.prepare(rollouts)
        if self.divisors is None:
            return prepared
        sums = replace(self.base, normaliser=1.0).token_weights(rollouts)
        divisor = torch.tensor(self.divisors, dtype=sums.dtype, device=sums.device)
        of_row = divisor.repeat_interleave(torch.tensor(self.rows, device=sums.device))
        return prepared._replace(token_weights=sums / of_row[:, None])

    def __call__(self, scores: TokenScores, rollouts: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss, info) at scores `[B, T]`; info is the base's, over all tokens given.

        Raises:
            InputError: As `prepare`; and for a slice of the batch, where the base compares tokens with one another.
        """
        if rollouts.token_weights is None or rollouts.advantages is None:
            rollouts = self.prepare(rollouts)
        if self.separable:
            return self.base(scores, rollouts)
        self._check_rows(rollouts)
        found = [self.base(_scores(scores, part), _rows(rollouts, part)) for part in self._slices()]
        tokens = [rollouts.completion_mask[part].sum() for part in self._slices()]
        return torch.stack([loss for loss, _ in found]).sum(), _averaged([info for _, info in found], tokens)

    def _slices(self) -> list[slice]:
        ends = [sum(self.rows[: k + 1]) for k in range(len(self.rows))]
        return [slice(end - n, end) for end, n in zip(ends, self.rows, strict=True)]

    def _check_rows(self, rollouts: Rollouts) -> None:
        if len(rollouts.ids) != sum(self.rows):
            raise InputError(
                f"The batch has {len(rollouts.ids)} rows and the micro-batches {sum(self.rows)} in all; give the "
                "rollouts of the same micro-batches, in the same order."
            )


def _rows(rollouts: Rollouts, part: slice) -> Rollouts:
    fields: dict[str, Any] = {name: None if x is None else x[part] for name, x in rollouts._asdict().items()}
    return Rollouts(**fields)


def _scores(scores: TokenScores, part: slice) -> TokenScores:
    return TokenScores(scores.logp[part], scores.entropy[part], {name: x[part] for name, x in scores.extra.items()})


def _averaged(infos: Sequence[Mapping[str, Tensor]], tokens: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the means over all tokens, from those over each micro-batch's."""
    total = torch.stack(list(tokens)).sum().clamp(min=1)
    return {
        name: sum(
            (
                info[name] * n.to(info[name].device) / total.to(info[name].device)
                for info, n in zip(infos, tokens, strict=True)
            ),
            torch.zeros(()),
        )
        for name in infos[0]
    }
