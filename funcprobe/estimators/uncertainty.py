"""Error bars over prompts: jackknife, its infinitesimal form, bootstrap.

Rollouts of one prompt are not independent of one another, so the unit that is left out or drawn again is the prompt
(`group_ids`), never the row. Everything is conditional on the step: Δθ is held, the evaluation prompts vary. No model
is run: a quantity is a function of base weights, and leaving a prompt out is giving its rows the weight 0.

    def quantities(a):                                    # [B] -> [2]: ΔF and δF₁ of one observable
        E = rollouts._replace(weight=a)
        before, slope = torch.func.jvp(lambda s: F(s, anchor, E), (anchor,), (tangents,))
        return torch.stack([F(after, anchor, E) - before, slope])

    left_out = replicates(quantities, rollouts)
    bar(left_out)                                         # ΔF
    bar(left_out, lambda q: q[0] - q[1])                  # the remainder
    bar(left_out, lambda q: q[1] / q[0])                  # the ratio

A function of several quantities takes its own bar from the replicates, so their correlation (ΔF and δF₁ of one batch
are nearly one number) is in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from funcprobe.errors import InputError, NumericsError
from funcprobe.types import Rollouts

Method = Literal["jackknife", "infinitesimal", "bootstrap"]

#: Base weights [B] -> quantities [K]: pure, differentiable, vmappable, and the same for c·a as for a.
Quantities = Callable[[Tensor], Tensor]

#: Score entries (prompts left out x B x T) up to which "auto" takes the exact jackknife: 5 to 8 s an observable on one
#: core, at the 40 to 60 ns an entry that ΔF and δF₁ took together.
EXACT_LIMIT = 2**27

#: Score entries that one chunk of replicates may hold, at least one replicate: 8 MiB an array. Larger is not faster.
CHUNK = 2**20

#: What the promise of nominal coverage asks for; benchmarks/coverage.py measures it inside and outside.
FEWEST_PROMPTS, LEAST_ESS = 30, 0.9


class Replicates(NamedTuple):
    """The values of quantities on the whole sample and on its resamplings over prompts."""

    estimate: Tensor  #: [K] float64: the quantities on the whole sample
    values: Tensor  #: [R, K] float64: with one prompt left out, the same to first order, or on resampled prompts
    prompts: int  #: P, the prompts that carry weight
    method: Method  #: how `values` were made


class Bar(NamedTuple):
    """A number with its sampling error over prompts."""

    value: float  #: on the whole sample
    error: float  #: standard error over prompts; infinite where a replicate is not finite, so that nothing can be said
    low: float  #: lower end of the interval
    high: float  #: upper end
    level: float = 0.95  #: nominal coverage of the interval


def replicates(
    f: Quantities,
    rollouts: Rollouts,
    method: Method | Literal["auto"] = "jackknife",
    *,
    draws: int = 1000,
    generator: torch.Generator | None = None,
    cells: int | None = None,
) -> Replicates:
    """Return the quantities `f(a) [K]` on the whole sample and on its resamplings over prompts.

    With prompt p's rows weighed by `c_p a`, P prompts, and `s_p` the share of prompt p in Σ a:

        jackknife      f(c = 1 − e_p), one replicate a prompt
        infinitesimal  f − (∂f/∂c_p) / (1 − s_p) at c = 1: the same to first order in the *normalised* weights, by one
                       `torch.func.jacrev`; exact for weighted means, and off by O(1/P²) otherwise
        bootstrap      f(c), c multinomial counts of P prompts drawn with replacement, `draws` times
        auto           jackknife where `choose_method` finds it affordable, else infinitesimal

    Estimand: the sampling distribution of f over prompts, at a fixed step. `cells` is the number of score entries that
    one evaluation of f touches (default B·T); replicates are evaluated in chunks of at most `CHUNK` of them. A
    bootstrap draws from `generator` and never from the global one. References: Efron (1982); Jaeckel (1972).

    Raises:
        InputError: If fewer than two prompts carry weight, f does not return a vector, the method is unknown, `draws`
            is below 2, or a bootstrap has no generator.
        NumericsError: If f is not finite on the whole sample or on a replicate; the message names which.
    """
    a = rollouts.weight
    prompts = torch.unique(rollouts.group_ids[a > 0])
    count = len(prompts)
    _check(method, draws, generator, count)
    # rows of a prompt without weight get any index: their weight is 0 whatever it is multiplied with
    member = torch.searchsorted(prompts, rollouts.group_ids).clamp(max=count - 1)
    cells = rollouts.completion_mask.numel() if cells is None else cells
    chunk = max(1, CHUNK // max(1, cells))

    chosen = choose_method(count, cells) if method == "auto" else method

    def weighed(c: Tensor) -> Tensor:
        return f(a * c[member])

    with torch.no_grad():
        estimate = _vector(weighed(a.new_ones(count)))
        _check_finite(estimate.unsqueeze(0), lambda _: "on the whole sample")
        if generator is not None and chosen == "bootstrap":
            values = torch.vmap(weighed, chunk_size=chunk)(_counts(draws, count, generator).to(a))
            _check_finite(values, lambda r: f"on bootstrap draw {r}")
        else:
            share = a.new_zeros(count).index_add(0, member, a) / a.sum()
            exact = chosen == "jackknife"
            values = _left_out(weighed, share, chunk) if exact else estimate - _influence(weighed, share, chunk)
            _check_finite(values, lambda r: f"without prompt (group) {int(prompts[r])}")
    return Replicates(estimate.detach().double().cpu(), values.detach().double().cpu(), count, chosen)


def bar(replicates: Replicates, h: Callable[[Tensor], Tensor] | None = None, level: float = 0.95) -> Bar:
    """Return h of the quantities with its standard error and an interval of nominal coverage `level`.

    `h` maps a vector `[K]` of quantities to a scalar and is vmapped over the replicates; by default it is the first.

        jackknife, infinitesimal  SE² = (P−1)/P Σ_p (h_p − mean h)²;  h ± t_{P−1} · SE
        bootstrap                 SE² = Σ_r (h_r − mean h)² / (R−1);  from the quantile α of h_r to the quantile 1 − α,
                                  α = Φ(−√(P/(P−1)) t_{P−1}): percentiles moved out to the width that t would have

    For a mean over prompts the jackknife is the textbook s/√P exactly, and the bootstrap expects √((P−1)/P) of it.
    The bootstrap's interval follows the skew of its replicates (the expanded percentile interval of Hesterberg 2015,
    The American Statistician 69:371). Where h is not finite on a replicate, the bar is infinitely wide.

    Raises:
        InputError: If `level` is not between 0 and 1.

    Example:
        >>> left_out = torch.tensor([[6.0], [4.0], [2.0]]).double()  # the means of 0, 4, 8 without each of them
        >>> bar(Replicates(torch.tensor([4.0]).double(), left_out, 3, "jackknife"))
        Bar(value=4.0, error=2.309, low=-5.936, high=13.936, level=0.95)
    """
    if not 0 < level < 1:
        raise InputError(f"The level is {level}; expected a coverage between 0 and 1, such as 0.95.")
    h = h or (lambda q: q[0])
    value, each = float(h(replicates.estimate)), torch.vmap(h)(replicates.values)
    if not bool(torch.isfinite(each).all()):
        return Bar(value, math.inf, -math.inf, math.inf, level)
    freedom = replicates.prompts - 1
    t = _student(freedom, (1 + level) / 2)
    if replicates.method == "bootstrap":
        tail = float(torch.special.ndtr(torch.tensor(-t * math.sqrt((freedom + 1) / freedom), dtype=torch.float64)))
        low, high = torch.quantile(each, each.new_tensor([tail, 1 - tail])).tolist()
        return Bar(value, float(each.std()), low, high, level)
    error = float(each.std(correction=0)) * math.sqrt(freedom)
    return Bar(value, error, value - t * error, value + t * error, level)


def choose_method(prompts: int, cells: int) -> Method:
    """Return the exact jackknife where `prompts · cells` score entries are affordable, else the infinitesimal one.

    `cells` is B·T, the score entries of one evaluation.

    Example:
        >>> choose_method(64, 256 * 128), choose_method(512, 4096 * 1024)
        ('jackknife', 'infinitesimal')
    """
    return "jackknife" if prompts * cells <= EXACT_LIMIT else "infinitesimal"


def promise_broken(prompts: int, ess_fraction: float, independent: bool) -> tuple[str, ...]:
    """Return why a bar is optimistic, as fragments to print beside it; empty where its coverage is promised.

    The promise, measured in `benchmarks/coverage.py`: at least 30 prompts, an effective sample of at least 90 % on the
    weights that the observable uses (`WeightHealth.fraction`), and Δθ independent of the evaluation rollouts.

    Example:
        >>> promise_broken(12, 0.534, True)
        ('12 prompts, 30 are needed', 'effective sample 53 %, 90 % is needed')
    """
    sample = f"effective sample {math.floor(100 * ess_fraction)} %, {LEAST_ESS * 100:g} % is needed"
    reasons = (
        (prompts < FEWEST_PROMPTS, f"{prompts} prompts, {FEWEST_PROMPTS} are needed"),
        (ess_fraction < LEAST_ESS, sample),
        (not independent, "the step was made from the same prompts"),
    )
    return tuple(text for broken, text in reasons if broken)


def _left_out(weighed: Quantities, share: Tensor, chunk: int) -> Tensor:
    """Return [P, K]: the quantities without each prompt in turn."""
    every = torch.arange(len(share), device=share.device)
    return torch.vmap(lambda p: weighed((every != p).to(share.dtype)), chunk_size=chunk)(every)


def _influence(weighed: Quantities, share: Tensor, chunk: int) -> Tensor:
    """Return [P, K]: the decrease of the quantities, to first order, without each prompt in turn.

    When prompt p leaves, its normalised weight goes from s_p to 0 and the others grow by 1/(1 − s_p). The quantities
    have no slope along a common factor, so of that direction −e_p/(1 − s_p) is left.
    """
    slope = torch.func.jacrev(weighed, chunk_size=chunk)(torch.ones_like(share))  # [K, P]
    return (slope / (1 - share)).T


def _counts(draws: int, prompts: int, generator: torch.Generator) -> Tensor:
    """Return [draws, P] float64: how often each prompt is drawn when P are drawn with replacement."""
    drawn = torch.randint(prompts, (draws, prompts), generator=generator, device=generator.device)
    once = torch.ones_like(drawn, dtype=torch.float64)
    return torch.zeros_like(once).scatter_add(1, drawn, once)


def _student(freedom: int, probability: float) -> float:
    """Return the quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, probability))


def _check(method: str, draws: int, generator: torch.Generator | None, prompts: int) -> None:
    if method not in ("jackknife", "infinitesimal", "bootstrap", "auto"):
        raise InputError(f"Unknown method '{method}'; expected 'jackknife', 'infinitesimal', 'bootstrap' or 'auto'.")
    if method == "bootstrap" and (not isinstance(draws, int) or draws < 2):
        raise InputError(f"The number of bootstrap draws is {draws!r}; expected a whole number of at least 2.")
    if method == "bootstrap" and generator is None:
        raise InputError("A bootstrap draws prompts and was given no generator; pass a seeded torch.Generator.")
    if prompts < 2:
        raise InputError(
            f"The rollouts hold {prompts} prompt (group) that carries weight; a bar over prompts needs 2 or more."
        )


def _vector(quantities: Tensor) -> Tensor:
    if quantities.ndim != 1:
        shape = tuple(quantities.shape)
        raise InputError(f"The function of base weights returned shape {shape}; expected a vector [K] of quantities.")
    return quantities


def _check_finite(values: Tensor, where: Callable[[int], str]) -> None:
    wrong = ~torch.isfinite(values)
    if bool(wrong.any()):
        row, k = wrong.nonzero()[0].tolist()
        value = float(values[row, k])
        raise NumericsError(
            f"Quantity {k} is {value} {where(row)}, so it has no error bar; check the scores, or what the quantity "
            "divides by.",
            quantity=k,
            found=value,
            expected=where(row),
        )
