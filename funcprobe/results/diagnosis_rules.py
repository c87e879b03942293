"""Rules of a diagnosis: pure functions from numbers to verdicts. All of their thresholds stand in one table.

A difference from 0 is told where the interval over prompts leaves 0 out. The half-width of an interval goes with
1/√prompts, so that `prompts · ((half-width / |ΔF|)² − 1)` more of them would tell it, rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from funcprobe.errors import InputError
from funcprobe.estimators.uncertainty import LEAST_ESS, Bar
from funcprobe.measurement.cautions import SAMPLER_MISMATCH
from funcprobe.measurement.move import WORTH_TELLING

#: How much a verdict asks of its reader.
Tone = Literal["plain", "alarm", "unknown"]

CANNOT_TELL, NOT_KNOWN = "cannot tell", "not known"

#: Verdicts that ask for something, and those that say that the question stays open.
ALARMS = frozenset({"too large", "stale", "another policy", "partly lost", "lost"})
OPEN = frozenset({CANNOT_TELL, NOT_KNOWN})


class Threshold(NamedTuple):
    """A number at which a verdict changes."""

    name: str
    value: float
    meaning: str


THRESHOLDS = (
    Threshold("leads", 0.6, "of Σ|rows of the ledger|: one row with at least that share did it; below, it is shared"),
    Threshold("prompts_tenth", 0.5, "of Σ|prompts of U|: concentrated, if the largest tenth of the prompts holds more"),
    Threshold("tokens_hundredth", 0.5, "of Σ|tokens of U|: likewise, the largest hundredth of the tokens"),
    Threshold("one_layer", 0.5, "of Σ|layers|: likewise, one layer"),
    Threshold("bends", 0.05, "|ΔF − δF₁| / |ΔF| up to which the step is small"),
    Threshold("too_large", 0.5, "|ΔF − δF₁| / |ΔF| above which the step is too large; it bends in between"),
    Threshold("least_ess", 0.5, "effective sample of E at θ′, below which the step is too large"),
    Threshold("acts", 0.01, "share of U's tokens that are clipped or masked, or of the norm cut off, that acts"),
    Threshold("ratio", 0.02, "mean |log π/π_old| of U, nats per token, above which it is stale"),
    Threshold("ratio_ess", LEAST_ESS, "effective sample of U by its ratios, below which it is stale"),
    Threshold("sampler_gap", SAMPLER_MISMATCH, "mean |log π − sampler's|, nats per token: above, another policy drew"),
    Threshold("rounding", WORTH_TELLING, "‖(θ′ − θ) − Δθ‖ / ‖Δθ‖ up to which the step is kept in storage"),
    Threshold("lost", 0.5, "‖(θ′ − θ) − Δθ‖ / ‖Δθ‖ above which it is lost; partly lost in between"),
)

#: Threshold by name.
LIMITS: Mapping[str, float] = {threshold.name: threshold.value for threshold in THRESHOLDS}


def tone_of(verdict: str) -> Tone:
    """Return how much a verdict asks of its reader."""
    return "alarm" if verdict in ALARMS else "unknown" if verdict in OPEN else "plain"


def is_told(found: Bar) -> bool:
    """Return whether an interval leaves 0 out."""
    return not found.low <= 0 <= found.high


def direction(value: float, found: Bar | None, *, lost: bool = False) -> str:
    """Return whether an observable falls or rises, as far as its interval, and its float error, tell.

    Example:
        >>> direction(-2.0, Bar(-2.0, 0.9, -3.8, -0.2)), direction(-2.0, Bar(-2.0, 1.1, -4.2, 0.2))
        ('falls', 'cannot tell')
    """
    if lost:
        return CANNOT_TELL
    if value == 0:
        return "does not move"
    if found is None:
        return NOT_KNOWN
    return CANNOT_TELL if not is_told(found) else "falls" if value < 0 else "rises"


def more_prompts(found: Bar, prompts: int) -> int | None:
    """Return how many more prompts would tell a value from 0: `⌈prompts · ((half-width / |value|)² − 1)⌉`.

    None where the value is 0, or the interval has no end: then no number of them can be named. 0 where it is told.

    Raises:
        InputError: If there are no prompts.

    Example:
        >>> more_prompts(Bar(-2.0, 1.1, -6.0, 2.0), 10)
        30
    """
    if prompts < 1:
        raise InputError(f"prompts is {prompts}; expected at least 1.")
    if is_told(found):
        return 0
    half = max(found.high - found.value, found.value - found.low)
    if found.value == 0 or not math.isfinite(half):
        return None
    needed = prompts * ((half / abs(found.value)) ** 2 - 1)
    return max(1, math.ceil(needed)) if math.isfinite(needed) else None


def culprit(ledger: Mapping[str, float], bars: Mapping[str, Bar]) -> str:
    """Return the row of a ledger that did it; "shared" where none leads, "cannot tell" where its interval holds 0."""
    whole = math.fsum(map(abs, ledger.values()))
    if not whole:
        return "nothing moved"
    leader = max(ledger, key=lambda row: abs(ledger[row]))
    if abs(ledger[leader]) < LIMITS["leads"] * whole:
        return "shared"
    return CANNOT_TELL if leader in bars and not is_told(bars[leader]) else leader


def held_by_largest(parts: Iterable[float], share: float) -> float:
    """Return the share of Σ|parts| that the largest `share` of them hold, at least one of them; 0 where all are 0.

    Example:
        >>> held_by_largest([3.0, -5.0, 1.0, 1.0], 0.25)
        0.5
    """
    sizes = sorted(map(abs, parts), reverse=True)
    whole = math.fsum(sizes)
    return math.fsum(sizes[: max(1, math.floor(share * len(sizes)))]) / whole if whole else 0.0


def concentration(prompts: float, tokens: float, layers: float) -> str:
    """Return whether few rows of U, or one layer, hold most of the parts."""
    held = {"prompts_tenth": prompts, "tokens_hundredth": tokens, "one_layer": layers}
    return "concentrated" if any(value > LIMITS[name] for name, value in held.items()) else "spread"


def step_size(nonlinearity: float, remainder: Bar | None, ess: float) -> str:
    """Return whether a step is small, bends, or is too large for first order, or for the rollouts that measure it.

    `remainder` is the bar of ΔF − δF₁: where it holds 0, a large share is no finding.
    """
    if ess < LIMITS["least_ess"]:
        return "too large"
    if math.isnan(nonlinearity):
        return CANNOT_TELL
    if nonlinearity <= LIMITS["bends"]:
        return "small"
    if remainder is not None and not is_told(remainder):
        return CANNOT_TELL
    return "too large" if nonlinearity > LIMITS["too_large"] else "bends"


def held_back(clipped: float, coefficient: float, masked: float) -> str:
    """Return whether clip range, norm clip or masks do anything: shares of tokens, and the factor of the gradient."""
    return "acts" if max(clipped, masked, 1 - coefficient) >= LIMITS["acts"] else "does nothing"


def origin(gaps: Iterable[float | None], differs: bool, log_ratio: float | None, ess: float | None) -> str:
    """Return whether batches are fresh, stale, or drawn by another policy.

    Args:
        gaps: Of the sampler's log-probabilities, of the batches that know them.
        differs: Whether a truncated sampler drew them, or they have several temperatures.
        log_ratio: mean |log r| of U; None without old log-probabilities.
        ess: The effective sample of U by its ratios.
    """
    known = [gap for gap in gaps if gap is not None]
    if differs or any(gap > LIMITS["sampler_gap"] for gap in known):
        return "another policy"
    if log_ratio is not None and ess is not None:
        return "stale" if log_ratio > LIMITS["ratio"] or ess < LIMITS["ratio_ess"] else "fresh"
    return "fresh" if known else NOT_KNOWN


def storage(rounding_ratio: float) -> str:
    """Return whether a step is kept, partly lost or lost when θ′ is stored."""
    if rounding_ratio <= LIMITS["rounding"]:
        return "kept"
    return "lost" if rounding_ratio > LIMITS["lost"] else "partly lost"


def remedy(change: float, gains: Mapping[str, Bar], prices: Mapping[str, Bar]) -> str | None:
    """Return the variant that counteracts a change at the least price; None where none can be told to do so.

    Of those whose paired difference is told from 0 and has the other sign than the change: the one of largest
    difference among those without a loss of reward that is told, else the one of least loss per difference.
    """
    against = {name: abs(bar.value) for name, bar in gains.items() if is_told(bar) and bar.value * change < 0}
    if not against:
        return None
    losses = {name: -prices[name].value for name in against if name in prices and _is_loss(prices[name])}
    free = {name: size for name, size in against.items() if name not in losses}
    return max(free, key=free.__getitem__) if free else min(losses, key=lambda name: losses[name] / against[name])


def _is_loss(price: Bar) -> bool:
    return is_told(price) and price.value < 0
