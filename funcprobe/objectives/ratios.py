"""Importance ratios and the KL term that they multiply, within the range of float64.

A stale row of some hundred tokens has log-ratios whose exponential is no float64. Where a clip range holds the ratio,
the loss there is a constant and its gradient exactly 0, however large the ratio: `0 · ∞` must not make NaN of it. So
beyond `LARGEST` a ratio is the constant `e^LARGEST`, and `check_range` refuses the tokens whose loss really is that
large.
"""

from __future__ import annotations

import torch
from torch import Tensor

from funcprobe.errors import NumericsError

#: Nats up to which an exponential is taken: e^700 is 1e304, and float64 ends at e^709.8. A loss beyond it has a
#: gradient that no dtype holds.
LARGEST = 700.0


#: Nats at which a token's ratio is cut off where it is only reported: a mean of any number of e^600 is finite.
LARGEST_REPORTED = 600.0


def bounded_exp(log: Tensor) -> Tensor:
    """Return `e^log`, and the constant `e^LARGEST` beyond it."""
    return torch.exp(torch.where(log > LARGEST, LARGEST, log))


def reported(log: Tensor) -> Tensor:
    """Return a log-ratio as reports count it: detached, at most `LARGEST_REPORTED`."""
    return log.detach().clamp(max=LARGEST_REPORTED)


def k3(d: Tensor) -> Tensor:
    """Return `e^d − d − 1`, and that of `LARGEST`, a constant, beyond it."""
    d = torch.where(d > LARGEST, LARGEST, d)
    return torch.exp(d) - d - 1


def weighted_k3(d: Tensor, log_ratio: Tensor) -> Tensor:
    """Return `(e^d − d − 1) e^log_ratio` `[B, T]`, also where one factor is too large and their product is not.

    For d beyond `LARGEST` it is taken as `e^(d + log_ratio) − (d + 1) e^log_ratio`, which there cancels nothing.
    """
    far = d > LARGEST
    ratio = bounded_exp(log_ratio)
    near = torch.where(far, 0.0, d)  # k3 and its slope are 0 at 0, so the other form alone is left where d is far
    together = bounded_exp(torch.where(far, d + log_ratio, 0.0))
    return torch.where(far, together - (d + 1) * ratio, (torch.exp(near) - near - 1) * ratio)


def check_range(log: Tensor, beyond: Tensor, losses: Tensor, what: str) -> Tensor:
    """Return the token losses `[B, T]`, infinite where `beyond` says that one is; outside differentiation refuse them.

    A pass over slices of a batch differentiates the loss of each, where a row has another number. It hands infinities
    on, and the value on the whole batch that it ends with names the row.

    Raises:
        NumericsError: If a loss is beyond the range of float64; the message names its row and the log-ratio.
    """
    beyond = torch.broadcast_to(beyond, losses.shape)
    if not losses.requires_grad and bool(beyond.any()):
        row, t = beyond.nonzero()[0].tolist()
        value = float(torch.broadcast_to(log, losses.shape)[row, t])
        raise NumericsError(
            f"Row {row}: {what} is e^{value:.6g}, which float64 does not hold, and nothing clips it; leave the row "
            "out, give log-probabilities of a policy nearer to this one, or bound the ratio (delta)."
        )
    return torch.where(beyond, torch.inf, losses)
