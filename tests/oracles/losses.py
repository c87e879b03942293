"""The losses and advantages of the table in objectives.py, one token at a time and with nothing shared.

Everything is written from the published formulas with loops, Python branches and scalar tensors, so that autograd
gives a second gradient too. Base weights are 1. What a variant does to a token is a `Change`, found by loops as well.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

#: What a variant does to the token (b, t): the factor of its surrogate term, and what is added.
Change = Callable[[int, int], tuple[float, Tensor | float]]
Place = tuple[int, int]


def advantages(rewards: list[float], groups: list[int], scale: str) -> list[float]:
    """(R − group mean) / (unbiased std + 1e-4), the std of the group, of the batch, or none."""
    result = []
    for reward, group in zip(rewards, groups, strict=True):
        mine = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        spread = {"group": lambda mine=mine: statistics.stdev(mine), "batch": lambda: statistics.stdev(rewards)}
        result.append((reward - statistics.fmean(mine)) / (spread[scale]() + 1e-4 if scale != "none" else 1.0))
    return result


def leave_one_out(rewards: list[float], groups: list[int]) -> list[float]:
    """R − mean of the other rewards of the group."""
    rows = range(len(rewards))
    return [rewards[i] - statistics.fmean(rewards[j] for j in rows if j != i and groups[j] == groups[i]) for i in rows]


def loss(
    name: str,
    logp: Tensor,
    mask: list[list[bool]],
    advantage: list[float],
    old: Tensor | None = None,
    ref: Tensor | None = None,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    bias_correction: bool = True,
    aggregation: str = "sequence_mean",
    max_completion_length: int | None = None,
    changes: tuple[Change, ...] = (),
) -> Tensor:
    """The loss at logp [B, T]; `aggregation` is for reinforce only, the others fix their own."""
    high = epsilon if epsilon_high is None else epsilon_high
    rows = [[t for t, on in enumerate(row) if on] for row in mask]
    per_row: list[list[Tensor]] = []  # the token losses of every sequence
    for b, tokens in enumerate(rows):
        log_r = [logp[b, t] - (logp[b, t].detach() if old is None else old[b, t]) for t in tokens]
        token_losses = []
        for k, t in enumerate(tokens):
            if name == "gspo":
                r = torch.exp(sum(log_r) / len(tokens))
            elif name == "rloo":
                r = torch.exp(sum(log_r))
            else:
                r = torch.exp(log_r[k])
            if name == "reinforce":
                value = -advantage[b] * logp[b, t]
            elif name == "cispo":
                value = -min(float(r.detach()), high) * advantage[b] * logp[b, t]
            else:
                value = _clipped(r, advantage[b], epsilon, high, delta)
            if name == "rloo":
                value = value / len(tokens)  # one term a sequence, spread over its tokens
            value = value * math.prod(change(b, t)[0] for change in changes)
            value = value + sum(change(b, t)[1] for change in changes)
            if beta != 0:
                d = ref[b, t] - logp[b, t]
                value = value + beta * (torch.exp(d) - d - 1) * (r if bias_correction else 1.0)
            token_losses.append(value)
        per_row.append(token_losses)
    return _aggregate[_AGGREGATION.get(name, aggregation)](per_row, mask, max_completion_length)


def _clipped(r: Tensor, a: float, epsilon: float, high: float, delta: float | None) -> Tensor:
    """−min(min(r, delta) A, clip(r) A), by comparing numbers."""
    first = r if delta is None or float(r.detach()) <= delta else torch.tensor(delta, dtype=r.dtype)
    if float(r.detach()) > 1 + high:
        second = torch.tensor(1 + high, dtype=r.dtype)
    elif float(r.detach()) < 1 - epsilon:
        second = torch.tensor(1 - epsilon, dtype=r.dtype)
    else:
        second = r
    return -first * a if float(first.detach()) * a <= float(second.detach()) * a else -second * a


def _sequence_mean(per_row: list[list[Tensor]], mask: list[list[bool]], limit: int | None) -> Tensor:
    return sum(sum(row) / len(row) for row in per_row if row) / len(per_row)


def _token_mean(per_row: list[list[Tensor]], mask: list[list[bool]], limit: int | None) -> Tensor:
    return sum(sum(row) for row in per_row if row) / sum(len(row) for row in per_row)


def _fixed_length(per_row: list[list[Tensor]], mask: list[list[bool]], limit: int | None) -> Tensor:
    longest = max(t + 1 for row in mask for t, on in enumerate(row) if on)
    return sum(sum(row) for row in per_row if row) / (len(per_row) * (limit or longest))


def _sequence_sum(per_row: list[list[Tensor]], mask: list[list[bool]], limit: int | None) -> Tensor:
    return sum(sum(row) for row in per_row if row) / len(per_row)


_aggregate: dict[str, Callable[..., Tensor]] = {
    "sequence_mean": _sequence_mean,
    "token_mean": _token_mean,
    "fixed_length": _fixed_length,
    "sequence_sum": _sequence_sum,
}
_AGGREGATION = {
    "grpo": "sequence_mean",
    "gspo": "sequence_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "dr_grpo": "fixed_length",
    "rloo": "sequence_sum",
}


def clip_cov(
    logp: Tensor,
    mask: list[list[bool]],
    advantage: list[float],
    old: Tensor | None,
    *,
    share: float,
    lower: float,
    upper: float,
    seed: int,
    epsilon: float,
    epsilon_high: float,
) -> Change:
    """Tokens of a covariance between the bounds, not clipped, that hold the lowest of the numbers drawn for all."""
    places, cov = _places(mask), _covariances(logp, mask, advantage)
    drawn = torch.rand(len(places), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    candidates = []
    for number, (b, t) in zip(drawn, places, strict=True):
        r = 1.0 if old is None else math.exp(float(logp[b, t].detach() - old[b, t]))
        clipped = (advantage[b] > 0 and r > 1 + epsilon_high) or (advantage[b] < 0 and r < 1 - epsilon)
        if lower < cov[b, t] < upper and not clipped:
            candidates.append((number, (b, t)))
    out = {place for _, place in sorted(candidates)[: max(1, int(share * len(places)))]}
    return lambda b, t: (0.0 if (b, t) in out else 1.0, 0.0)


def kl_cov(
    logp: Tensor,
    mask: list[list[bool]],
    advantage: list[float],
    old: Tensor | None,
    *,
    share: float,
    coefficient: float,
) -> Change:
    """The tokens with the largest covariance pay for their distance from the old log-probability."""
    places, cov = _places(mask), _covariances(logp, mask, advantage)
    paying = sorted(places, key=lambda place: -cov[place])[: max(1, int(share * len(places)))]

    def change(b: int, t: int) -> tuple[float, Tensor | float]:
        if (b, t) not in paying or old is None:
            return 1.0, 0.0
        d = logp[b, t] - old[b, t]
        return 1.0, coefficient * (d if float(d.detach()) > 0 else -d)

    return change


def entropy_bonus(entropy: Tensor, coefficient: float) -> Change:
    """Every token is paid for its entropy."""
    return lambda b, t: (1.0, -coefficient * entropy[b, t])


def top_entropy_quantile(entropy: Tensor, mask: list[list[bool]], share: float) -> Change:
    """Tokens at or above the interpolated quantile of the entropies train."""
    ordered = sorted(float(entropy[place].detach()) for place in _places(mask))
    position = round((1 - share) * (len(ordered) - 1), 9)  # .3 of 10 is 3, and not 3.0000000000000004
    below, above = ordered[math.floor(position)], ordered[math.ceil(position)]
    threshold = below + (position - math.floor(position)) * (above - below)
    return lambda b, t: (1.0 if float(entropy[b, t].detach()) >= threshold else 0.0, 0.0)


def drop_negatives(advantage: list[float]) -> Change:
    """Rows with a negative advantage do not train."""
    return lambda b, t: (0.0 if advantage[b] < 0 else 1.0, 0.0)


def _places(mask: list[list[bool]]) -> list[Place]:
    return [(b, t) for b, row in enumerate(mask) for t, on in enumerate(row) if on]


def _covariances(logp: Tensor, mask: list[list[bool]], advantage: list[float]) -> dict[Place, float]:
    """(logp − mean logp)(A − mean A) of every completion token, the means over all of them."""
    places = _places(mask)
    mean_logp = statistics.fmean(float(logp[place].detach()) for place in places)
    mean_advantage = statistics.fmean(advantage[b] for b, _ in places)
    return {(b, t): (float(logp[b, t].detach()) - mean_logp) * (advantage[b] - mean_advantage) for b, t in places}
