"""What is asked of one or many steps: on which rollouts, which observables, and how."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

from funcprobe.engine.passes import Passes
from funcprobe.errors import InputError
from funcprobe.measurement.messages import Messages
from funcprobe.measurement.readings import BarMethod
from funcprobe.types import Observable

Mode = Literal["auto", "forward", "reverse"]
MeasureMethod = Literal["auto", "difference", "path"]

#: Two rules that agree to this fraction of Σ|terms| have converged as far as float32 forward passes go.
PATH_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Options:
    """How a step is measured; see `probe` for what each option means.

    Raises:
        InputError: If one is out of range, or asks for what its mode cannot give.
    """

    mode: Mode = "auto"
    method: MeasureMethod = "auto"
    tolerance: float = PATH_TOLERANCE
    order: Literal[1, 2] = 1
    bars: BarMethod | None = "auto"
    level: float = 0.95
    seed: int = 0
    rounding: bool | Literal["auto"] = "auto"
    ess_threshold: float = 0.1
    on_low_ess: Literal["warn", "raise"] = "warn"

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, get_args(Mode))
        _one_of("method", self.method, get_args(MeasureMethod))
        _one_of("order", self.order, (1, 2))
        _one_of("bars", self.bars, ("auto", "jackknife", "infinitesimal", "bootstrap", None))
        _one_of("on_low_ess", self.on_low_ess, ("warn", "raise"))
        if not (math.isfinite(self.ess_threshold) and 0 <= self.ess_threshold <= 1):
            raise InputError(
                f"ess_threshold is {self.ess_threshold}; expected a fraction of the sample between 0 and 1."
            )
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise InputError(f"tolerance is {self.tolerance}; expected a number above 0, such as 1e-5.")
        if not 0 < self.level < 1:
            raise InputError(f"level is {self.level}; expected a coverage between 0 and 1, such as 0.95.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InputError(f"seed is {self.seed!r}; expected a whole number.")
        if self.mode == "reverse" and (self.order == 2 or self.method == "path"):
            wanted = "order=2" if self.order == 2 else "method='path'"
            raise InputError(f"{wanted} is made of forward-mode passes; use mode='auto' or 'forward' with it.")


def options_of(**given: Any) -> Options:
    """Return the options of those names.

    Raises:
        InputError: If there is no option of a name, or as `Options`.
    """
    known = [field.name for field in fields(Options)]
    if unknown := [name for name in given if name not in known]:
        raise InputError(f"There is no option '{unknown[0]}' here; the options are {', '.join(known)}.")
    return Options(**given)


class Inquiry(NamedTuple):
    """What is asked."""

    passes: Passes  #: over E
    observables: Mapping[str, Observable]  #: the first one is what ESS, rounding and exchange rates refer to
    options: Options
    said: Messages  #: told what should be known beside the numbers
    independent: bool  #: whether Δθ was made without E

    def check(self) -> None:
        """Refuse what no pass over E could give, before any is made.

        Raises:
            InputError: If error bars were asked for by name, and E has one prompt.
        """
        rollouts = self.passes.evaluation
        prompts = int(rollouts.group_ids[rollouts.weight > 0].unique().numel())
        if self.options.bars not in (None, "auto") and prompts < 2:
            raise InputError(
                f"E holds {prompts} prompt (group) that carries weight, and bars='{self.options.bars}' needs 2 or "
                "more; use bars=None, or 'auto'."
            )

    @property
    def main(self) -> tuple[str, Observable]:
        """The first observable and its name."""
        return next(iter(self.observables.items()))


def named(observables: Observable | Mapping[str, Observable]) -> dict[str, Observable]:
    """Return observables by name; a single one goes by its own.

    Raises:
        InputError: If there is none, or one is not an observable.
    """
    found: dict[Any, Observable] = dict(observables) if isinstance(observables, Mapping) else {None: observables}
    if not found:
        raise InputError("No observable was given; expected at least one, such as {'entropy': entropy()}.")
    for o in found.values():
        if not isinstance(o, Observable) or isinstance(o, type):
            raise InputError(
                f"{o!r} is no observable: it needs name, unit and stats, and to be callable. Call the factory, as in "
                "entropy(), or decorate a function of (scores, anchor, rollouts) with "
                'funcprobe.observable("its name", "its unit").'
            )
    return {o.name if name is None else str(name): o for name, o in found.items()}


def _one_of(option: str, found: object, choices: tuple[object, ...]) -> None:
    if found not in choices:
        listed = ", ".join(repr(c) for c in choices[:-1])
        raise InputError(f"Unknown {option} {found!r}; expected {listed} or {choices[-1]!r}.")
