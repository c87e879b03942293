"""Comparison of several updates of one θ, measured on one E, with the differences between them paired by prompt.

Objectives, clip ranges, token masks, entropy bonuses, optimizers and learning rates are all just updates. Their common
work is done once: gradients of one objective on one U, ∇F in reverse mode, and in forward mode the scores of E at θ,
once for every `chunk` of updates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Unpack

from funcprobe import tree
from funcprobe.analysis.probe import provenance_of
from funcprobe.arguments import checked
from funcprobe.errors import EffectiveSampleSizeError, InputError, NumericsError, placed
from funcprobe.estimators.divergence import kl
from funcprobe.estimators.observables import entropy
from funcprobe.estimators.returns import expected_reward
from funcprobe.measurement.cautions import step
from funcprobe.measurement.first_order import FirstOrder, first_orders
from funcprobe.measurement.measure import measure
from funcprobe.measurement.measurement import Measurement, Observables
from funcprobe.measurement.messages import Messages
from funcprobe.measurement.move import Move
from funcprobe.measurement.options import OF_ONE_STEP, Given, options_of
from funcprobe.measurement.outcome import Outcome
from funcprobe.measurement.update import Update, take_gradients
from funcprobe.results.comparison import Comparison
from funcprobe.types import Observable, Progress, Rollouts

#: Bytes of tangents that share a pass at most; of updates that are larger, each has its gradient only while it is used.
TOGETHER = 2**30


@checked
def compare(
    updates: Mapping[str, Update],
    evaluation: Rollouts,
    observables: Observables = None,
    *,
    chunk: int = 4,
    progress: Progress | None = None,
    **options: Unpack[Given],
) -> Comparison:
    """Return the changes of observables on `evaluation` under several updates, and their differences from the first.

    Estimands: ΔF and δF₁ of every update, as in `probe`, each with its error bar over prompts; and their differences
    between updates. All are measured on the same rollouts, so most of the sampling error is common to them: the error
    of a difference is taken from differences prompt by prompt and is often far below that of either term.

    Args:
        updates: Updates of one policy at one θ by name; the first is what the others are compared with. `Update.vary`
            makes one of another, with a learning rate, an objective or a batch of its own.
        evaluation: Rollouts E, drawn at θ, apart from U.
        observables: One, or several by name; by default the entropy, the expected reward where E has rewards, and
            KL(θ′‖θ).
        chunk: How many updates share a forward-mode pass over E, as long as their tangents take no more than a
            gibibyte: 1 + 2·chunk forward passes in place of 3·chunk.
        progress: Called as progress(what, done, total).
        **options: See `Options`; rounding, top_k, keep_delta and keep_scores can do nothing here.

    Raises:
        InputError: If there are no updates, they are not of one θ, or an option, a batch or an optimizer state does not
            fit; naming the update.
        NumericsError: If something is not finite; naming the update.
        ForwardModeError: As in `probe`.
        EffectiveSampleSizeError: With `on_low_ess="raise"`, as in `probe`.
    """
    several = _checked(updates)
    if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
        raise InputError(f"chunk is {chunk!r}; expected how many updates go together, 1 or more.")
    given = options_of(options, "a comparison", OF_ONE_STEP, rounding=False)
    wanted = _observables(evaluation) if observables is None else observables
    base = next(iter(updates.values()))
    measurement = Measurement.of(base, evaluation, wanted, given, progress, quiet=True)
    outcomes: dict[str, Outcome] = {}
    shared: FirstOrder | None = None
    names = list(several)
    chunk = min(chunk, max(1, TOGETHER // max(1, tree.bytes_of(base.params))))
    for start in range(0, len(names), chunk):
        # a gradient that no later update shares goes with its update
        own = {name: several.pop(name) for name in names[start : start + chunk]}
        with measurement.passes.clock("gradient on U"):
            take_gradients(list(own.values()), progress)
        taken = {name: _taken(measurement, name, update) for name, update in own.items()}
        del own
        if shared is None:
            firsts = first_orders(measurement, base.params, [each.move.delta for each in taken.values()])
            shared = firsts[0] if firsts[0].along is None else None
        else:
            firsts = [shared] * len(taken)
        for (name, each), first in zip(taken.items(), firsts, strict=True):
            with _naming(name):
                outcomes[name] = measure(each.measurement, each.move, first, each.info)[0]
            if progress is not None:
                progress("updates compared", len(outcomes), len(names))
    return Comparison(
        outcomes=outcomes,
        provenance=provenance_of(measurement, base, "forward" if shared is None else "reverse"),
        level=given.level,
        notes=tuple(dict.fromkeys(measurement.messages.notes)),
    )


class _Taken(NamedTuple):
    """One update's step, and the measurement that its own remarks go to."""

    measurement: Measurement
    move: Move
    info: Mapping[str, float]


def _taken(measurement: Measurement, name: str, update: Update) -> _Taken:
    independent = update.is_independent_of(measurement.passes.evaluation)
    own = measurement._replace(messages=Messages(quiet=True), independent=independent)
    with _naming(name):
        return _Taken(own, *step(own, update))


def _checked(updates: Mapping[str, Update]) -> dict[str, Update]:
    """Return the updates by name; those of one objective on one batch share a gradient.

    Raises:
        InputError: If there are none, or they are not updates of one policy at one θ.
    """
    if not isinstance(updates, Mapping) or not updates:
        raise InputError("There are no updates to compare; give at least one, such as {'grpo': Update.from_step(...)}.")
    done: dict[str, Update] = {}
    for name, update in updates.items():
        if not isinstance(update, Update):
            raise InputError(
                f"'{name}' is a {type(update).__name__}, no update; expected what Update.from_step(...), "
                "from_gradient(...) or from_delta(...) returns."
            )
        base = next(iter(done.values()), update)
        if update.policy is not base.policy or update.params is not base.params:
            raise InputError(
                f"'{name}' is an update of another policy or another θ than '{next(iter(done))}'; make all of them of "
                "the same policy and the same params; of a checkpoint, run.update(...) and between(run, folder) are."
            )
        known = next((other for other in done.values() if update.shares_gradient(other)), None)
        own = update.unheld() if tree.bytes_of(update.params) > TOGETHER else update
        done[str(name)] = own if known is None else update.sharing(known)
    return done


def _observables(evaluation: Rollouts) -> dict[str, Observable]:
    reward: dict[str, Observable] = {} if evaluation.rewards is None else {"reward": expected_reward()}
    return {"entropy": entropy(), **reward, "kl": kl()}


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Let an error say of which update it speaks, and where another optimizer's state is to come from.

    Raises:
        InputError: With the hint of its own, where the state is another optimizer's.
    """
    with placed(f"Update '{name}'", InputError, NumericsError, EffectiveSampleSizeError):
        try:
            yield
        except InputError as error:
            if error.kind != "optimizer state":
                raise
            own = f"{error.hint}; give update.vary(..., opt_state=optimizer.init(params)), or its own state"
            raise error.but(own) from error
