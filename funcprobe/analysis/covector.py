"""∇F at θ as a value, from which the first order of any update of that θ follows."""

from __future__ import annotations

from typing import Unpack

from funcprobe.arguments import checked
from funcprobe.measurement.covector import Covector
from funcprobe.measurement.measurement import Measurement, Observables
from funcprobe.measurement.options import OF_A_CHANGE, OF_ONE_STEP, Given, options_of
from funcprobe.measurement.update import Update
from funcprobe.types import Progress, Rollouts


@checked
def covector(
    update: Update,
    evaluation: Rollouts,
    observable: Observables = None,
    *,
    progress: Progress | None = None,
    **options: Unpack[Given],
) -> Covector:
    """Return ∇F at the θ of an update, by a backward pass over E; `attribute(..., covector=...)` takes it.

    Several batches U at one θ then cost a gradient and a forward-mode pass over U each, and no pass over E. It is a
    tree of the size of the parameters.

    Args:
        update: Any update of θ; what it does to θ is not looked at.
        evaluation: Rollouts E, drawn at θ.
        observable: F, by default the entropy per token.
        progress: Called as progress(what, done, total).
        **options: See `Options`; of them microbatch has a meaning here.

    Raises:
        InputError: If an option is of no use here, or the observable cannot be used on these rollouts.
        NumericsError: If scores are not finite.
        ReverseModeError: If the model has no backward pass.
    """
    without = {*OF_A_CHANGE, *OF_ONE_STEP, "mode", "bars"}
    chosen = options_of(options, "a covector", without, mode="reverse", bars=None)
    return Covector.of(Measurement.of(update, evaluation, observable, chosen, progress), update.params, evaluation)
