"""Published predictors of the entropy change, as baselines: covariances and the discriminant, from one pass over U.

They see batch U alone: no evaluation rollouts, no gradient, no optimizer. Each is the exact first order of a
*tabular* softmax policy, in which every context has logits z of its own, p = softmax(z), and a step moves the logits of
the contexts in U and no others. With `dH/dz_v = −S_v` and `S_v = p_v (h + log p_v)`, a step Δz of one context gives

    δh = −Σ_v S_v Δz_v = −Cov_p(log p, Δz)

and the predictors differ in the Δz that they suppose:

| predictor | Δz of a context | δh there |
|---|---|---|
| `cov_pg` | `η p_v A_v`, the policy gradient where A has mean 0 under p | `−η Cov_p(log p, p A)` |
| `cov_npg` | `η A_v`, the natural gradient | `−η Cov_p(log p, A)` |
| `discriminant` | `η A (e_y − p)`, the policy gradient of the one token y drawn | `−η (S_y − E_p S) A` |

A network shares its parameters between contexts and its optimizer rescales them, so all three carry **an unknown
scale**: compare by sign and by rank, or after fitting one scalar. `benchmarks/predictors.py` measures what is left.

Sources: Cui et al., "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models", arXiv 2505.22617
(`cov_pg`, `cov_npg`); Wang et al., "On the Entropy Dynamics in Reinforcement Fine-Tuning of Large Language Models",
arXiv 2602.03392 (`discriminant`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe import engine
from funcprobe.errors import InputError, NumericsError, listed
from funcprobe.objectives.advantages import by_token
from funcprobe.optimizers.groups import check_lr
from funcprobe.types import Objective, Rollouts, Statistic, TokenScores

#: What each predictor is, by name.
PREDICTORS: Mapping[str, str] = MappingProxyType(
    {
        "cov_pg": "covariance of log-probability and probability-weighted advantage, policy gradient (2505.22617)",
        "cov_npg": "covariance of log-probability and advantage, natural gradient (2505.22617)",
        "discriminant": "entropy discriminant of every drawn token against its expectation (2602.03392)",
    }
)


class Predictions(NamedTuple):
    """Predicted entropy changes by predictor (see `PREDICTORS`), each in nats per token up to an unknown scale."""

    tokens: dict[str, Tensor]  #: [B, T] float64; 0 where the completion mask or the row's base weight is 0
    totals: dict[str, float]  #: the mean over completion tokens, weighted by the rows' base weights


def sum_p2(log_probs: Tensor, token: Tensor) -> Tensor:
    """Return `Σ_v p_v²` `[n]` of distributions given as log-probabilities `[n, V]`, without a derivative."""
    return (2 * log_probs.detach()).exp().sum(-1, dtype=torch.float64)


def sum_p2_logp(log_probs: Tensor, token: Tensor) -> Tensor:
    """Return `Σ_v p_v² log p_v` `[n]` of distributions given as log-probabilities `[n, V]`, without a derivative."""
    fixed = log_probs.detach()
    return ((2 * fixed).exp() * fixed).sum(-1, dtype=torch.float64)


#: The statistics that `predictions` reads from `scores.extra`: `E_p S = h Σp² + Σp² log p`. Constants to forward mode.
STATS: Mapping[str, Statistic] = MappingProxyType({"sum_p2": sum_p2, "sum_p2_logp": sum_p2_logp})


def check_stats(objective: Objective) -> None:
    """Refuse an objective that calls a statistic of its own by a name that the predictors use.

    Raises:
        InputError: If it does.
    """
    for name, statistic in objective.stats.items():
        if STATS.get(name, statistic) is not statistic:
            raise InputError(
                f"The objective '{objective.name}' declares a statistic '{name}', which is what the predictors call "
                "one of theirs; rename it, or use predictors.STATS."
            )


def predictions(scores: TokenScores, rollouts: Rollouts, lr: float = 1.0) -> Predictions:
    """Return the predictors of scores `[B, T]` that carry `STATS`, for rollouts with advantages; no model is run.

    With `π = exp(logp)`, A the advantage of the row, `S = π (h + logp)`, `E_π S = h Σp² + Σp² log p`, and means over
    completion tokens weighted by the rows' base weights, every token of

    * `cov_pg` is `−η (logp − mean logp)(π A − mean πA)`,
    * `cov_npg` is `−η (logp − mean logp)(A − mean A)`,
    * `discriminant` is `−η (S − E_π S) A`,

    in nats per token up to an unknown scale; a total is the mean. A row of base weight 0 does not count.

    Estimand: δh of a tabular policy (see the module), averaged over the contexts of U. With one context and every
    action weighted by its probability all three are exact. `discriminant` is exact as well, times 1/(n τ²), for the SGD
    step on the mean of `A log π` over n tokens whose contexts differ, at temperature τ. A covariance centred over the
    whole batch, as published, also holds the covariance *between* contexts of the means of logp and πA (or A), which
    moves no entropy: that is its bias, and it does not fall with the size of the batch. All ignore token weights of the
    loss, ratios and clipping, momentum, and that a step on one context moves the others.

    Raises:
        InputError: If advantages or a statistic are missing, or no completion token has a weight above 0.
        NumericsError: If a score or an advantage is not finite; the message names the sequences.

    Example:
        >>> import funcprobe as fp
        >>> p = torch.tensor([[0.6], [0.3], [0.1]], dtype=torch.float64)  # one context, every action, weighted by p
        >>> every = {"temperature": 1.0, "weight": p[:, 0], "advantages": [1, 0, -6]}
        >>> U = fp.rollouts_from_lists([[0]] * 3, [[0], [1], [2]], **every)
        >>> extra = {"sum_p2": p * 0 + (p**2).sum(), "sum_p2_logp": p * 0 + (p**2 * p.log()).sum()}
        >>> entropy = p * 0 - (p * p.log()).sum()
        >>> predictions(TokenScores(p.log(), entropy, extra), U).totals
        {'cov_pg': -0.224, 'cov_npg': -1.075, 'discriminant': -0.224}
    """
    lr, scores = check_lr(lr), engine.detached(scores)
    share = _shares(rollouts, scores)
    advantage = _advantages(rollouts, scores)
    counted = share > 0
    _check_finite(scores, advantage, counted)
    pi = scores.logp.exp()
    distance = pi * (scores.entropy + scores.logp) - _expected(scores)  # S − E_π S

    def mean(x: Tensor) -> Tensor:
        return torch.where(counted, share * x, 0.0).sum()

    def centred(x: Tensor) -> Tensor:
        return x - mean(x)

    found = {
        "cov_pg": centred(scores.logp) * centred(pi * advantage),
        "cov_npg": centred(scores.logp) * centred(advantage),
        "discriminant": distance * advantage,
    }
    tokens = {name: torch.where(counted, -lr * x, 0.0) for name, x in found.items()}
    return Predictions(tokens, {name: float(mean(x)) for name, x in tokens.items()})


def _expected(scores: TokenScores) -> Tensor:
    """Return `E_π S = h Σp² + Σp² log p` `[B, T]`.

    Raises:
        InputError: If a statistic is missing.
    """
    if missing := [name for name in STATS if name not in scores.extra]:
        raise InputError(
            f"The scores have no statistic '{missing[0]}', which the discriminant needs; pass predictors.STATS as "
            "stats to the pass that makes them."
        )
    return scores.entropy * scores.extra["sum_p2"] + scores.extra["sum_p2_logp"]


def _shares(rollouts: Rollouts, scores: TokenScores) -> Tensor:
    """Return every token's share `[B, T]` of a mean: `a m / Σ a m`.

    Raises:
        InputError: If the rollouts are not those that were scored, or hold nothing that counts.
    """
    weighted = rollouts.completion_mask.double() * rollouts.weight.double()[:, None]
    if weighted.shape != scores.logp.shape:
        raise InputError(
            f"The scores are {list(scores.logp.shape)} and the completion mask is {list(weighted.shape)}; pass the "
            "rollouts that were scored."
        )
    total = weighted.sum()
    if not float(total) > 0:
        raise InputError("The batch has no completion token with a weight above 0; there is nothing to predict from.")
    return (weighted / total).to(scores.logp.device)


def _advantages(rollouts: Rollouts, scores: TokenScores) -> Tensor:
    """Return the advantages `[B, 1]`, or `[B, T]` where tokens have their own.

    Raises:
        InputError: If there are none.
    """
    if rollouts.advantages is None:
        raise InputError(
            "The rollouts have no advantages, which every predictor needs; pass what the objective's prepare returns."
        )
    place = scores.logp.device
    return by_token(rollouts.advantages.to(place).double(), rollouts.completion_mask.to(place))


def _check_finite(scores: TokenScores, advantage: Tensor, counted: Tensor) -> None:
    healthy = torch.isfinite(engine.fields(scores)).all(0) & torch.isfinite(advantage)
    bad = (counted & ~healthy).any(1).nonzero().flatten().tolist()
    if bad:
        raise NumericsError(
            f"Scores or advantages are not finite for sequence {listed(bad)}; check the weights and the rewards, or "
            "load the model in a wider dtype."
        )
