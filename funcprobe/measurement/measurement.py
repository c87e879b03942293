"""`Measurement`: everything that the numbers of an update depend on beside the update itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from funcprobe.engine.clock import Clock
from funcprobe.engine.passes import Passes
from funcprobe.errors import InputError
from funcprobe.estimators.custom import check_observable, check_protocol
from funcprobe.estimators.observables import entropy
from funcprobe.measurement.messages import Messages
from funcprobe.measurement.options import Options
from funcprobe.measurement.update import Update
from funcprobe.types import Observable, Progress, Rollouts, TokenScores

#: What a verb takes: one observable, several by name, or None for the entropy per token.
Observables = Observable | Mapping[str, Observable] | None

#: Rao–Blackwell, per decision, per token.
DEFAULT_OBSERVABLE: Observable = entropy()


class Measurement(NamedTuple):
    """The observables, the rollouts and the options of a measurement."""

    passes: Passes  #: over E
    observables: Mapping[str, Observable]  #: the first one is what ESS, rounding and exchange rates refer to
    options: Options
    messages: Messages  #: told what should be known beside the numbers
    independent: bool  #: whether Δθ was made without E

    @classmethod
    def of(
        cls,
        update: Update,
        evaluation: Rollouts,
        observables: Observables,
        options: Options,
        progress: Progress | None = None,
        *,
        quiet: bool = False,
    ) -> Measurement:
        """Return a measurement of an update on E; refused early where no pass over E could give it.

        Raises:
            InputError: If an observable cannot be used on these rollouts, or bars were asked for by name and E has one
                prompt.
        """
        named = checked(observables, evaluation)
        passes = Passes.over(update.policy, evaluation, named, options.microbatch, progress, Clock())
        made = cls(passes, named, options, Messages(quiet=quiet), update.is_independent_of(evaluation))
        made._check_bars()
        return made

    @property
    def main(self) -> tuple[str, Observable]:
        """The first observable and its name."""
        return next(iter(self.observables.items()))

    def _check_bars(self) -> None:
        rollouts = self.passes.evaluation
        prompts = int(rollouts.group_ids[rollouts.weight > 0].unique().numel())
        if self.options.bars not in (None, "auto") and prompts < 2:
            raise InputError(
                f"E holds {prompts} prompt (group) that carries weight, and bars='{self.options.bars}' needs 2 or "
                "more; use bars=None, or 'auto'."
            )


def named(observables: Observables) -> dict[str, Observable]:
    """Return observables by name; a single one goes by its own.

    Raises:
        InputError: If there is none, or one is not an observable.
    """
    one = DEFAULT_OBSERVABLE if observables is None else observables
    found: dict[Any, Observable] = dict(one) if isinstance(one, Mapping) else {None: one}
    if not found:
        raise InputError("No observable was given; expected at least one, such as {'entropy': entropy()}.")
    for o in found.values():
        check_protocol(o)
    return {o.name if name is None else str(name): o for name, o in found.items()}


def checked(observables: Observables, evaluation: Rollouts) -> dict[str, Observable]:
    """Return observables by name, each checked on made-up scores of the evaluation rollouts: no model is run.

    Raises:
        InputError: If one is no observable, or cannot be used on these rollouts.
    """
    if torch.is_inference_mode_enabled():
        raise InputError(
            "torch.inference_mode is on, in which nothing can be differentiated; leave it, or use no_grad."
        )
    found = named(observables)
    mask = evaluation.completion_mask.double()
    for o in found.values():
        check_observable(o, TokenScores(-0.7 * mask, 0.5 * mask, dict.fromkeys(o.stats, 0.3 * mask)), evaluation)
    return found
