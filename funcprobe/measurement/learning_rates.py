"""One gradient at several learning rates: every step of it is measured by itself, and all share one first order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from funcprobe import engine, tree
from funcprobe.engine.kernels import without_batching_rule
from funcprobe.errors import EffectiveSampleSizeError, InputError, NumericsError, placed
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.first_order import FirstOrder, first_order
from funcprobe.measurement.measure import measure
from funcprobe.measurement.measurement import Measurement
from funcprobe.measurement.messages import Messages
from funcprobe.measurement.move import Move
from funcprobe.measurement.outcome import Outcome
from funcprobe.measurement.readings import sample_orders
from funcprobe.measurement.update import Update
from funcprobe.policy.running import first_sentence
from funcprobe.types import Leaves, TokenScores

#: Two steps are multiples of one another if they agree to this fraction of their norm: they are kept in float32.
PROPORTIONAL = 1e-5


class LearningRates:
    """The steps that one gradient makes at different learning rates."""

    def __init__(self, measurement: Measurement, update: Update, reference_lr: float) -> None:
        self.measurement, self.reference_lr = measurement, reference_lr
        self._update = update
        self.reference, info = self._taken(reference_lr)
        self.info = {name: x for name, x in info.items() if name != "lr"}
        self.first = self._settled(first_order(measurement, update.params, self.reference.delta))

    @property
    def stores_narrower(self) -> bool:
        """Whether the run stores its parameters in narrower numbers than it steps."""
        return self._update.stores_narrower

    def move(self, lr: float) -> Move:
        """Return the step at a learning rate; no model is run."""
        return self._taken(lr)[0]

    def first_order(self, move: Move, lr: float, messages: Messages) -> FirstOrder:
        """Return the first order of a step: the reference's, scaled, where the step is a multiple of it."""
        if self.first.along is None:
            return self.first
        if self.is_multiple(move, lr):
            return self.first.scaled(lr / self.reference_lr)
        messages.note("not proportional", NOT_PROPORTIONAL)
        return first_order(self.measurement._replace(messages=Messages(quiet=True)), self._update.params, move.delta)

    def bend(self, curvature: TokenScores) -> None:
        """Take s̈ along the reference's step, where the first order has come without."""
        if self.first.along is not None and self.first.along.curvatures is None:
            self.first = self._settled(self.first._replace(along=self.first.along._replace(curvatures=curvature)))

    def _settled(self, first: FirstOrder) -> FirstOrder:
        """Return the first order with δF₂ of every observable, which goes with the square of the learning rate."""
        if first.along is None or first.along.curvatures is None:
            return first
        evidence = Evidence(self.measurement.passes.evaluation, first.scores, first.scores, first.along)
        seconds = {n: first.second(n, o, evidence) for n, o in self.measurement.observables.items()}
        return first._replace(seconds={name: second for name, second in seconds.items() if second is not None})

    def resample(self) -> None:
        """Take δF₁ and δF₂ of the reference's step on resampled prompts, once for all steps in proportion."""
        options, along = self.measurement.options, self.first.along
        if options.bars is None or along is None or self.first.orders is not None:
            return
        evidence = Evidence(self.measurement.passes.evaluation, along.scores, along.scores, along)
        try:
            generator = torch.Generator().manual_seed(options.seed)
            orders = sample_orders(evidence, self.measurement.observables, options.bars, generator)
        except (InputError, NumericsError):
            return  # it is said where the bars of a point are made
        self.first = self.first._replace(orders=orders)

    def is_multiple(self, move: Move, lr: float) -> bool:
        """Return whether the step at a learning rate is a multiple of the reference's."""
        return _off(move.delta, self.reference.delta, lr / self.reference_lr) <= PROPORTIONAL * move.size.norm

    def points(self, lrs: Sequence[float], chunk: int = 1) -> Iterator[Outcome]:
        """Yield the outcome of the step at each learning rate, `chunk` of them scored at a time."""
        if chunk > 1 and self.first.choices:
            self.measurement.messages.note("one at a time", ONE_AT_A_TIME)
        for start in range(0, len(lrs), chunk):
            together = lrs[start : start + chunk]
            moves = [self.move(lr) for lr in together]
            with naming(*together):
                scores = self._scores(moves)
            for lr, move, after in zip(together, moves, scores, strict=True):
                yield self.point(lr, move, after)

    def point(self, lr: float, move: Move, after: TokenScores | None = None) -> Outcome:
        """Return the outcome of the step at one learning rate."""
        own = self.measurement._replace(messages=Messages(quiet=True))
        self.resample()
        with naming(lr):
            first = self.first_order(move, lr, own.messages)
            return measure(own, move, first, {"lr": lr}, after)[0]

    def _taken(self, lr: float) -> tuple[Move, dict[str, float]]:
        with self.measurement.passes.clock("optimizer steps"), naming(lr):
            return self._update.at(lr).move()

    def _scores(self, moves: list[Move]) -> list[TokenScores] | list[None]:
        """Return the scores at several θ′ in one pass; None, for each to be scored on its own, where there is one.

        In reverse mode the anchor was scored by the model's own attention, which has no batching rule; and experts are
        sent other tokens at every θ′, which is watched one at a time.
        """
        passes, options = self.measurement.passes, self.measurement.options
        alone = options.method == "path" or self.first.along is None or self.first.choices
        if len(moves) == 1 or alone:
            return [None] * len(moves)
        with passes.clock("E at θ′"), _vmap_errors(len(moves)):
            return engine.scores_of_many(
                passes.policy,
                [dict(move.after) for move in moves],
                passes.evaluation,
                stats=passes.stats,
                microbatch=passes.microbatch,
                progress=passes.progress,
                what=f"E at {len(moves)} θ′",
                order=options.degree,
            )


NOT_PROPORTIONAL = "the step is not proportional to the learning rate, so its derivative was taken anew"
ONE_AT_A_TIME = "learning rates were scored one at a time, because tokens go to other experts at each of them"


def _off(delta: Leaves, reference: Leaves, c: float) -> float:
    """Return ‖Δθ − c·Δθ₀‖₂, a leaf at a time."""
    each = (tree.norm({n: d - c * reference[n]}) for n, d in delta.items())
    return math.sqrt(sum(float(norm) ** 2 for norm in each))


def naming(*lrs: float) -> AbstractContextManager[None]:
    """Return a context in which an error says at which learning rates it arose."""
    return placed(f"At lr {', '.join(f'{lr:g}' for lr in lrs)}", NumericsError, EffectiveSampleSizeError)


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
        if not without_batching_rule(error):
            raise
        raise InputError(
            f"{together} learning rates cannot be scored together, because vmap cannot run the model "
            f'("{first_sentence(error)}"); use chunk=1.'
        ) from error
