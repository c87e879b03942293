"""The second order of one update by itself: δF₁, δF₂, and how well two ways of taking it agree."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from funcprobe import engine
from funcprobe.arguments import checked
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.measurement import Measurement
from funcprobe.measurement.options import Mode, Options
from funcprobe.measurement.second_order import curved, second_by_reverse
from funcprobe.measurement.update import Update
from funcprobe.types import Microbatch, Observable, Progress, Rollouts

_DEFAULT = Options()


class SecondOrder(NamedTuple):
    """The expansion of one observable along Δθ to second order."""

    first_order: float  #: δF₁ = DF[Δθ]
    second_order: float  #: δF₂ = ½ D²F[Δθ, Δθ]
    mode: Literal["forward", "reverse"]  #: nested forward mode, or forward over reverse
    disagreement: float  #: |nested − forward over reverse| / Σ|terms| on the sequences that were checked
    magnitude: float  #: Σ|terms| of the first order: what its rounding is relative to

    @property
    def crossover(self) -> float:
        """The multiple of Δθ at which |δF₂| = |δF₁|; infinite where there is no curvature."""
        return abs(self.first_order / self.second_order) if self.second_order else math.inf

    @property
    def linear_until(self) -> float:
        """The multiple of Δθ at which first order is 5 % off: a twentieth of the crossover."""
        return self.crossover / 20


@checked
def second_order(
    update: Update,
    evaluation: Rollouts,
    observable: Observable | None = None,
    *,
    mode: Mode = _DEFAULT.mode,
    microbatch: Microbatch = _DEFAULT.microbatch,
    progress: Progress | None = None,
) -> SecondOrder:
    """Return δF₁ and `δF₂ = ½ D²F(θ)[Δθ, Δθ]` of an observable along the Δθ of an update.

    `D²F[v, v] = f″[ṡ, ṡ] + f′·s̈` with ṡ, s̈ from nested forward mode: one pass, nothing stored. Forward over reverse
    gives `f′·s̈` by other formulas; on the beginnings of a few sequences, with fixed cotangents, the two are always held
    against each other, and where they disagree, because an operation's second derivative is wrong, `mode="auto"` takes
    forward over reverse throughout. Reverse over forward would not do as a check: it shares the first-order forward
    formulas, which is where torch's `layer_norm` is at fault (see `engine.kernels`).

    Args:
        update: θ and how it is about to change; any depth will do.
        evaluation: Rollouts E, drawn at θ.
        observable: By default the entropy per token.
        mode: "forward" insists on nested forward mode, "reverse" takes forward over reverse.
        microbatch: How E is cut for the model; it changes memory and no result.
        progress: Called as progress(what, done, total).

    Raises:
        InputError: If the mode is unknown, or the observable cannot be used.
        ForwardModeError: If an operation of the model has no forward derivative.
        NumericsError: With `mode="forward"`, if the two disagree.
    """
    measurement = Measurement.of(update, evaluation, observable, Options(microbatch=microbatch), progress)
    passes, (_, main), direction = measurement.passes, measurement.main, update.move(progress)[0].delta
    eps = engine.arithmetic(update.policy, update.params).eps
    along, disagreement = curved(passes, update.params, direction, eps, mode)
    evidence = Evidence(passes.evaluation, along.scores, along.scores, along)
    magnitude = float(engine.fields(engine.contributions(evidence.of(main), along)).abs().sum())
    first = float(evidence.first_order(main))
    if along.curvatures is not None:
        second = float(evidence.second_order(main))
    else:
        second = second_by_reverse(passes, update.params, direction, main, along)
    used: Literal["forward", "reverse"] = "reverse" if along.curvatures is None else "forward"
    return SecondOrder(first, second, used, disagreement, magnitude)
