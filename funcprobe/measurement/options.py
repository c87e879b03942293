"""`Options`: how an update is measured. The defaults, the meaning of every option and its limits stand here, once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

from funcprobe.errors import InputError
from funcprobe.estimators.uncertainty import Method
from funcprobe.types import Microbatch, TokenBudget

Mode = Literal["auto", "forward", "reverse"]
MeasureMethod = Literal["auto", "difference", "path"]
Order = Literal["auto", 1, 2]
BarMethod = Method | Literal["auto"]
LowEss = Literal["warn", "raise"]


def _option(default: Any, expected: str, meaning: str, **limits: float) -> Any:
    """Return the field of an option: its default, the values that it takes, its meaning in a line, and its limits."""
    metadata = {"expected": expected, "meaning": meaning, "limits": limits}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """How an update is measured; every verb takes these by keyword, the configuration and `--help` read them here.

    Attributes:
        mode: How the first order is taken. "auto" takes forward mode, and reverse mode where an operation of the model
            has no forward derivative.
        method: How ΔF is measured: by "difference" of two evaluations, along a "path" from θ to θ + Δθ on which
            nothing cancels, or, with "auto", by the path where the float error of the difference is above 0.1 % of it.
            A difference sees θ′ as stored, a path Δθ itself: they differ by the rounding row. Where that is above 1 %
            of Δθ (a bfloat16 run), both are measured, as the reading's `exact` and `stored`, each by this method; with
            a `stored` optimizer and "auto" the change itself is then that of θ + Δθ. A path is an integral of
            derivatives and misses jumps: where tokens change experts, or the difference disagrees with it beyond float
            error, "auto" takes the difference and says so, and "path" is refused.
        tolerance: The error of a path, relative to Σ|terms|, or of a curve over learning rates, relative to |ΔF|. None
            is 1e-5 for a path and 1e-4 for a curve.
        order: 2 adds `δF₂ = ½ D²F[Δθ, Δθ]` and the crossover learning rate. "auto" is 2 in a sweep, where forward mode
            can be used, and 1 elsewhere. Where a curve over learning rates is taken, the second order is its bend at
            θ, good to a hundredth or two of itself; elsewhere nested forward mode.
        exact: Whether the second order of a curve is by nested forward mode too, at the cost of two or three passes.
        bars: Error bars over prompts: "jackknife", "infinitesimal", "bootstrap", None, or "auto": the exact jackknife
            where it is cheap, and no bars where there is one prompt only.
        level: Coverage of the bars' intervals.
        seed: Of the bootstrap.
        rounding: Whether the row `⟨∇F, (θ′ − θ) − Δθ⟩` is computed. It is free in reverse mode; in forward mode it
            takes one more pass, which "auto" spends only where rounding is above 0.1 % of Δθ.
        ess_threshold: The least effective sample, as a fraction of E.
        on_low_ess: Whether to "warn" or to "raise" below it.
        microbatch: How E is cut for the model, and U where the step does not say; it changes memory and no result.
        top_k: How many of the most moved leaves are listed.
        keep_delta: Whether the result carries Δθ.
        keep_scores: Whether the result carries the scores that it was read from, for `plot_weights` and the like; they
            are not saved.

    Raises:
        InputError: If one is out of range, or asks for what its mode cannot give.
    """

    mode: Mode = _option("auto", "auto, forward or reverse", "how δF₁ is taken; auto: forward where the model allows")
    method: MeasureMethod = _option(
        "auto", "auto, difference or path", "how ΔF is measured; auto: by a path where float32 cannot subtract"
    )
    tolerance: float | None = _option(
        None, "a number > 0, or none", "error of a path, relative to Σ|terms|, or of a curve, to |ΔF|", gt=0
    )
    order: Order = _option("auto", "auto, 1 or 2", "2 adds δF₂ and the crossover; auto: in a sweep, not in a run")
    exact: bool = _option(False, "true or false", "of a sweep: δF₂ by nested forward mode, not as the curve bends")
    bars: BarMethod | None = _option(
        "auto", "auto, jackknife, infinitesimal, bootstrap or none", "error bars over prompts"
    )
    level: float = _option(0.95, "a number between 0 and 1", "coverage of the bars' intervals", gt=0, lt=1)
    seed: int = _option(0, "an integer ≥ 0", "of the bootstrap", ge=0)
    rounding: bool | Literal["auto"] = _option(
        "auto", "auto, true or false", "true, false or auto: the effect of storing θ′ in its dtype"
    )
    ess_threshold: float = _option(0.1, "a number from 0 to 1", "least effective sample, of all rollouts", ge=0, le=1)
    on_low_ess: LowEss = _option("warn", "warn or raise", "warn or raise below ess_threshold")
    microbatch: Microbatch = _option(TokenBudget(4096), "sequences, a token budget, or none", "how E is cut")
    top_k: int = _option(10, "an integer ≥ 0", "how many of the most moved leaves are listed", ge=0)
    keep_delta: bool = _option(False, "true or false", "write Δθ beside the result, as safetensors")
    keep_scores: bool = _option(False, "true or false", "keep the scores that the result was read from")

    def __post_init__(self) -> None:
        for name, kind in (("mode", Mode), ("method", MeasureMethod), ("order", Order), ("on_low_ess", LowEss)):
            _one_of(name, getattr(self, name), get_args(kind))
        _one_of("bars", self.bars, ("auto", "jackknife", "infinitesimal", "bootstrap", None))
        if not (math.isfinite(self.ess_threshold) and 0 <= self.ess_threshold <= 1):
            raise InputError(
                f"ess_threshold is {self.ess_threshold}; expected a fraction of the sample between 0 and 1."
            )
        if self.tolerance is not None and not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise InputError(f"tolerance is {self.tolerance}; expected a number above 0, such as 1e-5.")
        if not 0 < self.level < 1:
            raise InputError(f"level is {self.level}; expected a coverage between 0 and 1, such as 0.95.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InputError(f"seed is {self.seed!r}; expected a whole number.")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise InputError(f"top_k is {self.top_k!r}; expected a whole number of at least 0.")
        if self.mode == "reverse" and (self.order == 2 or self.method == "path"):
            wanted = "order=2" if self.order == 2 else "method='path'"
            raise InputError(f"{wanted} is made of forward-mode passes; use mode='auto' or 'forward' with it.")

    @property
    def path_tolerance(self) -> float:
        """The error of a path, relative to Σ|terms|: by default as far as float32 forward passes go."""
        return 1e-5 if self.tolerance is None else self.tolerance

    @property
    def curve_tolerance(self) -> float:
        """The error of a curve, relative to |ΔF|."""
        return 1e-4 if self.tolerance is None else self.tolerance

    @property
    def degree(self) -> Literal[1, 2]:
        """The highest order that is taken; "auto" is 1 where a verb does not say otherwise."""
        return 2 if self.order == 2 else 1


#: Options that can do nothing where there are several steps, which share no such rows.
OF_ONE_STEP = ("rounding", "top_k", "keep_delta", "keep_scores")

#: Options of a measured change, its float error, its bars and its weights.
OF_A_CHANGE = ("method", "tolerance", "order", "exact", "level", "seed", "rounding", "ess_threshold", "on_low_ess")


class Given(TypedDict, total=False):
    """The options by keyword, all of them optional; see `Options` for their meaning and their defaults."""

    mode: Mode
    method: MeasureMethod
    tolerance: float | None
    order: Order
    exact: bool
    bars: BarMethod | None
    level: float
    seed: int
    rounding: bool | Literal["auto"]
    ess_threshold: float
    on_low_ess: LowEss
    microbatch: Microbatch
    top_k: int
    keep_delta: bool
    keep_scores: bool


def options_of(given: Mapping[str, Any], verb: str, without: Collection[str] = (), **settled: Any) -> Options:
    """Return the options that were given by keyword to a verb, those that it settles itself, and defaults.

    Args:
        given: By name.
        verb: Named in a refusal.
        without: Options that can do nothing in this verb.
        **settled: Values of such options.

    Raises:
        InputError: If there is no option of a name, the verb has no use for it, or as `Options`.
    """
    known = [f.name for f in dataclasses.fields(Options) if f.name not in without]
    for name in given:
        if name in without:
            raise InputError(f"{name} can do nothing in {verb}; leave it out.")
        if name not in known:
            raise InputError(f"There is no option '{name}' here; the options are {', '.join(known)}.")
    return Options(**{**settled, **given})


def _one_of(option: str, found: object, choices: tuple[object, ...]) -> None:
    if found not in choices:
        listed = ", ".join(repr(c) for c in choices[:-1])
        raise InputError(f"Unknown {option} {found!r}; expected {listed} or {choices[-1]!r}.")
