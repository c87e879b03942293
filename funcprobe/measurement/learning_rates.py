"""The steps that one gradient makes at different learning rates: each of them a point, all of them one first order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from funcprobe import engine, tree
from funcprobe.errors import EffectiveSampleSizeError, InputError, NumericsError
from funcprobe.measurement.cautions import left_alone
from funcprobe.measurement.first_order import First, first_order
from funcprobe.measurement.measure import measure_step
from funcprobe.measurement.messages import Messages
from funcprobe.measurement.move import Move
from funcprobe.measurement.options import Inquiry
from funcprobe.optimizers.stored import is_stored
from funcprobe.measurement.outcome import Outcome
from funcprobe.training.step import Step
from funcprobe.types import Gradients, OptState, Params, StepResult, TokenScores

#: Two updates are multiples of one another if they agree to this fraction of their norm: they are kept in float32.
PROPORTIONAL = 1e-5


class Family:
    """The steps that one gradient makes at different learning rates."""

    def __init__(
        self,
        asked: Inquiry,
        step: Step,
        params: Params,
        opt_state: OptState,
        gradient: Gradients,
        info: dict[str, float],
        reference_lr: float,
    ) -> None:
        self.asked, self.reference_lr = asked, reference_lr
        self._step, self._params, self._opt_state, self._gradient = step, params, opt_state, gradient
        taken = self._taken(reference_lr)
        self.info = info | {name: x for name, x in taken.info.items() if name != "lr"}
        self.reference_update, self.size = taken.update, Move.of(params, taken.params, taken.update).size
        del taken  # θ′ of the reference is not needed any more
        self.first = first_order(asked, params, self.reference_update)
        asked.said.notes += left_alone(gradient)

    def move(self, lr: float) -> Move:
        """Return the step at a learning rate; no model is run."""
        taken = self._taken(lr)
        return Move.of(self._params, taken.params, taken.update, narrow=is_stored(self._step.optimizer))

    def first_order(self, move: Move, lr: float, said: Messages) -> First:
        """Return the first order of a step: the reference's, scaled, where the update is a multiple of it."""
        c = lr / self.reference_lr
        if self.first.along is None:
            return self.first
        if _off(move.update, self.reference_update, c) <= PROPORTIONAL * move.size.norm:
            return self.first.scaled(c)
        said.notes.append("the update is not proportional to the learning rate, so its derivative was taken anew")
        return first_order(self.asked._replace(said=Messages(quiet=True)), self._params, move.update)

    def points(self, lrs: Sequence[float], chunk: int = 1) -> Iterator[Outcome]:
        """Yield what the step does at each learning rate, `chunk` of them scored at a time."""
        if chunk > 1 and self.first.choices:
            self.asked.said.notes.append(
                "learning rates were scored one at a time, because tokens go to other experts at each of them"
            )
        for start in range(0, len(lrs), chunk):
            together = lrs[start : start + chunk]
            moves = [self.move(lr) for lr in together]
            with _naming(*together):
                scores = self._scores(moves)
            for lr, move, after in zip(together, moves, scores, strict=True):
                yield self.point(lr, move, after)

    def point(self, lr: float, move: Move, after: TokenScores | None = None) -> Outcome:
        """Return what the step does at one learning rate."""
        said = Messages(quiet=True)
        with _naming(lr):
            first, own = self.first_order(move, lr, said), self.asked._replace(said=said)
            return measure_step(own, move, first, {"lr": lr, **self.info}, after)[0]

    def _taken(self, lr: float) -> StepResult:
        with self.asked.passes.clock("optimizer steps"), _naming(lr):
            return self._step.apply(self._params, self._opt_state, self._gradient, lr=lr)

    def _scores(self, moves: list[Move]) -> list[TokenScores] | list[None]:
        """Return the scores at several θ′ in one pass; None, for each to be scored on its own, where there is one.

        In reverse mode the anchor was scored by the model's own attention, which has no batching rule; and experts are
        sent other tokens at every θ′, which is watched one at a time.
        """
        passes = self.asked.passes
        alone = self.asked.options.method == "path" or self.first.along is None or self.first.choices
        if len(moves) == 1 or alone:
            return [None] * len(moves)
        with passes.clock("E at θ′"), _vmap_errors(len(moves)):
            return engine.scores_of_many(
                passes.policy,
                [move.after for move in moves],
                passes.evaluation,
                stats=passes.stats,
                microbatch=passes.microbatch,
                progress=passes.progress,
                what=f"E at {len(moves)} θ′",
                order=self.asked.options.order,
            )


def _off(update: Params, reference: Params, c: float) -> float:
    """Return ‖Δθ − c·Δθ₀‖₂, a leaf at a time."""
    each = (tree.norm({n: u - c * reference[n]}) for n, u in update.items())
    return math.sqrt(sum(float(norm) ** 2 for norm in each))


@contextmanager
def _naming(*lrs: float) -> Iterator[None]:
    """Let an error say at which learning rates it arose.

    Raises:
        NumericsError: With the learning rates before what it said.
        EffectiveSampleSizeError: The same.
    """
    try:
        yield
    except (NumericsError, EffectiveSampleSizeError) as error:
        raise type(error)(f"At lr {', '.join(f'{lr:g}' for lr in lrs)}: {error}") from error


@contextmanager
def _vmap_errors(together: int) -> Iterator[None]:
    """Turn torch's words for a model that vmap cannot run into ours.

    Raises:
        InputError: In their place.
        RuntimeError: Any other one, as it came.
    """
    try:
        yield
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        said = str(error).strip().splitlines()[0]
        raise InputError(
            f"{together} learning rates cannot be scored together, because vmap cannot run the model "
            f'("{said}"); use chunk=1.'
        ) from error
