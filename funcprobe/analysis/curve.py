"""The change of observables as a function of the learning rate, from one gradient and a few derivatives."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Unpack

from funcprobe.analysis.sweep import swept
from funcprobe.arguments import checked
from funcprobe.measurement.bounds import check_positive
from funcprobe.measurement.measurement import Observables
from funcprobe.measurement.options import Given
from funcprobe.measurement.update import Update
from funcprobe.results.any_lr import CurveResult
from funcprobe.types import Progress, Rollouts

#: The table that a curve comes with: so many learning rates a decade, and so many decades.
EACH_DECADE, DECADES = 4, 4


@checked
def curve(
    update: Update,
    evaluation: Rollouts,
    lr_max: float,
    observables: Observables = None,
    *,
    lrs: Sequence[float] | None = None,
    journal: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Unpack[Given],
) -> CurveResult:
    """Return the change of observables on `evaluation` as a function of the learning rate, up to a largest one.

    For an optimizer whose step is proportional to the learning rate, `Δθ(η) = η d`, the scores of E move along a line.
    Forward mode gives scores and tangents at θ. Scores at three more learning rates fix a polynomial from there, where
    rounding leaves them good enough for `tolerance`; tangents at n of them do elsewhere, by
    `s(η) = s(0) + ∫₀^η ṡ(θ + x d)[d] dx`. Every reading, bar and effective sample is a function of the scores, and
    nothing cancels at the small end. A part of E decides which, and all of E whether it was right; no model is run for
    a point. `method="path"` takes tangents only.

    Where no curve of few nodes is that good up to `lr_max`, because θ′ is another policy there, it ends earlier (its
    `reach`), and what the table has beyond is scored. Where there is none at all (see `sweep`) the table is a sweep.

    Args:
        update: θ and how it is about to change: an update that knows its gradient. Its own learning rate is not used.
        evaluation: Rollouts E, drawn at θ, apart from U.
        lr_max: The largest learning rate.
        observables: One, or several by name; by default the entropy per token.
        lrs: The learning rates of the table, rising, up to `lr_max`; by default sixteen over four decades.
        journal: A file in which the derivatives and finished points are kept; see `sweep`.
        progress: Called as progress(what, done, total).
        **options: See `Options`; `tolerance` is the error of ΔF at every learning rate, relative to |ΔF|, or to 1 % of
            Σ|terms| where ΔF cancels below that, and each reading says its own estimate, `float_error`. rounding,
            top_k, keep_delta and keep_scores can do nothing here.

    Raises:
        InputError: If a learning rate is out of range; or as in `probe`.
        NumericsError: As in `probe`.
        ForwardModeError: As in `probe`.
        EffectiveSampleSizeError: As in `probe`.
    """
    check_positive("lr_max", lr_max)
    table = spread(lr_max) if lrs is None else lrs
    result, scores = swept(
        update,
        evaluation,
        table,
        observables,
        options,
        "a curve",
        lr_max=lr_max,
        journal=journal,
        progress=progress,
    )
    nodes, reach = (0, 0.0) if scores is None else (scores.nodes, scores.reach)
    return CurveResult(**vars(result), nodes=nodes, reach=reach, scores=scores)


def spread(lr_max: float) -> list[float]:
    """Return learning rates evenly spread by factors over some decades, the last of them `lr_max`.

    Example:
        >>> [f"{lr:.2g}" for lr in spread(1e-3)[-4:]]
        ['0.00018', '0.00032', '0.00056', '0.001']
    """
    return [lr_max * 10 ** (-k / EACH_DECADE) for k in reversed(range(EACH_DECADE * DECADES))]
