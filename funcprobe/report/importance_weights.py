"""The figure of the importance weights: how much of the sample still counts after a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from funcprobe.errors import InputError
from funcprobe.estimators.importance import effective_sample_size, log_ratios, pareto_khat, sequence_weights
from funcprobe.measurement.evidence import Evidence
from funcprobe.report.canvas import legend_outside, new_axes
from funcprobe.results.probe import ProbeResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: What can be drawn: the scores of a step, or the log-weight of every sequence.
Weighed = ProbeResult | Evidence | Tensor | NDArray[np.floating] | Sequence[float]


class Sizes(NamedTuple):
    """The weights of the sequences that count."""

    logs: Tensor  #: [N] float64: log p(θ′) − log p(θ) of a sequence, nats
    shares: Tensor  #: [N] float64: self-normalised weights, base weights in them; they sum to 1
    ess: float  #: of the shares, in sequences
    ess_base: float  #: of the base weights alone: N, where they are equal
    khat: float | None  #: Pareto k̂ of exp(logs)


def plot_weights(weighed: Weighed, ax: Axes | None = None) -> Axes:
    """Draw how many sequences have which importance log-weight, and (outlined) how much those count for.

    The bars count sequences; the outline shows N times the share of the total weight that falls into the same bin, so
    it is as high as the bar where a sequence counts once. Where the sample still carries the estimate, both agree; a
    tall outline far to the right is the few sequences that a heavy tail leaves. The title gives the effective sample
    size and the Pareto k̂, below .7 where the sample is large enough (Vehtari et al., arXiv 1507.02646).

    Args:
        weighed: Log-weights, one for every sequence, of equal base weight; or a result of
            `probe(keep_scores=True)`, or its scores, whose rollouts
            bring base weights: these multiply the shares and leave out rows of weight 0, and the ESS is given beside
            what the base weights alone would leave. k̂ is of the log-weights without them, as in `WeightHealth`.
        ax: Where to draw; by default on a figure of its own.

    Raises:
        InputError: If the log-weights are not a vector of finite numbers with at least one entry.
        MissingExtraError: If matplotlib is not installed.
    """
    sizes = sizes_of(weighed)
    ax = new_axes() if ax is None else ax
    logs, count = sizes.logs.numpy(), len(sizes.logs)
    edges = _edges(logs)
    ax.hist(logs, edges, color="#d9dde6", edgecolor="0.6", linewidth=0.8, label="sequences")
    outline: dict[str, Any] = {"histtype": "step", "color": "#1b2a49", "linewidth": 1.6}
    ax.hist(logs, edges, weights=count * sizes.shares.numpy(), label="their share of the\nweight, times N", **outline)
    ax.axvline(0.0, color="0.35", linestyle="--", linewidth=1, label="as likely as before")
    ax.set_xlabel("sequence log-weight log p(θ′) − log p(θ), nats")
    ax.set_ylabel("sequences")
    khat = "not fitted" if sizes.khat is None else f"{sizes.khat:.2f}"
    of = f"{count} sequences" if abs(sizes.ess_base - count) < 1e-6 else f"{sizes.ess_base:.1f} by base weight alone"
    ax.set_title(
        f"Importance weights after the step\nESS {sizes.ess:.1f} of {of}, Pareto k̂ {khat}", loc="left", size=10
    )
    legend_outside(ax)
    return ax


def sizes_of(weighed: Weighed) -> Sizes:
    """Return the weights and how healthy they are.

    Raises:
        InputError: If the log-weights are not a vector of finite numbers with at least one entry, or a result kept no
            scores.
    """
    if isinstance(weighed, ProbeResult):
        if weighed.evidence is None:
            raise InputError("This result kept no scores; probe with keep_scores=True to draw its weights.")
        weighed = weighed.evidence
    if isinstance(weighed, Evidence):
        a = weighed.rollouts.weight.detach().cpu().double()
        logs = log_ratios(weighed.after, weighed.anchor, weighed.rollouts).detach().cpu().double().sum(-1)[a > 0]
        a = a[a > 0]
    else:
        logs = torch.as_tensor(weighed, dtype=torch.float64).detach().cpu()
        a = torch.ones_like(logs)
    if logs.ndim != 1 or not len(logs):
        raise InputError(f"The log-weights have shape {tuple(logs.shape)}; expected one for every sequence, [N].")
    if wrong := int((~torch.isfinite(logs)).sum()):
        raise InputError(f"{wrong} of {len(logs)} log-weights are not finite; leave those sequences out.")
    shares = sequence_weights(logs.unsqueeze(-1), a)
    ess, ess_base = (float(effective_sample_size(w)) for w in (shares, a))
    return Sizes(logs, shares, ess, ess_base, pareto_khat(logs))


def _edges(logs: NDArray[np.float64]) -> list[float]:
    """Return the edges of an odd number of bins, about 2 N^⅓; one value alone stands in the middle of them."""
    low, high = float(logs.min()), float(logs.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - 0.5, high + 0.5
    bins = min(41, max(7, 2 * round(len(logs) ** (1 / 3)) + 1))
    return np.linspace(low, high, bins + 1).tolist()
