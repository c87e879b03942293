"""`Ledger`: the change of entropy over a run in progress, window by window, without sampling anything.

    ledger = fp.Ledger(policy, "runs/ledger")
    for rollouts in training:
        ledger.generation(params, rollouts)         # closes a window and opens the next
        for update in steps_on(rollouts):
            ledger.before_step(update)              # θ, U and gradient of this moment
            ...                                     # the trainer's own step
            ledger.after_step()
    print(ledger.close().summary())

A window runs from one generation of rollouts to a later one and is measured from its end, on the rollouts that are
there anyway; see `looking_back`. It may hold several steps, each with its own θ, U and gradient. Nothing of it changes
training: it reads tensors, copies those that it has to keep, and draws from generators of its own.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Literal, Unpack

import torch

from funcprobe import engine
from funcprobe.arguments import checked
from funcprobe.attribution.parameter_parts import PARAMETER_TABLES, rolled_up
from funcprobe.data.rollouts import split
from funcprobe.errors import FuncprobeError, FuncprobeWarning, InputError
from funcprobe.live import tables
from funcprobe.live.log import Log
from funcprobe.live.looking_back import LookedBack, look_back, observables_of
from funcprobe.live.marks import value_at
from funcprobe.live.opened import Told, opened
from funcprobe.live.sinks import Sink, tell
from funcprobe.live.steps import Steps, split_of
from funcprobe.measurement.measure import LOW_PRECISION
from funcprobe.measurement.measurement import Observables
from funcprobe.measurement.options import OF_ONE_STEP, Given, options_of
from funcprobe.measurement.update import Update
from funcprobe.policy.module import Policy
from funcprobe.results.books import Books
from funcprobe.results.ledger_lines import Resumed
from funcprobe.results.provenance import BatchCounts
from funcprobe.results.window import Lost, Mark, Window
from funcprobe.types import Gradients, Params, Progress, Rollouts
from funcprobe.visible_text import message

#: θ -> rollouts drawn from it: how a ledger draws its own, where it is asked to.
Draw = Callable[[Params], Rollouts]


class Ledger:
    """The books of a run: one line a window, on disk as it closes.

    Args:
        policy: The policy that is trained.
        folder: Where `ledger.jsonl` is kept; one that is there already is gone on with.
        observables: One, or several by name, of which the first is split; by default the entropy per token.
        every: Generations in a window. The steps of all of them are in it, so the books close whatever it is.
        rows: Rows of E at most, whole prompts drawn at random; None takes all. Cost and error bars go with it.
        split: Whether every step is split into gradient, momentum and decay, and held against the one that was taken:
            ten times the arithmetic of the optimizer's own step. Without it a step costs next to nothing.
        open_every: Every so many windows the steps of its last generation are opened down to prompts and tokens; 0
            never. It takes steps that know their batch.
        tokens: Whether all tokens of opened steps are kept, as parquet, and not the largest alone.
        tokenizer: Decodes token ids for prompts and tokens.
        sinks: Trackers that are told of every window beside the file; see `Sink`.
        draw: Draws E from θ, in place of the trainer's generations: a fixed set of prompts, say.
        on_error: Whether a window that cannot be measured is a line that says so ("warn"), or raises.
        progress: Called as progress(what, done, total).
        **options: See `Options`. mode is "reverse", the cheapest (five forward passes over E and a readout a window),
            and "auto" with order=2, and where the model's arithmetic is coarser than float32, in which a subtraction
            would drown.

    Raises:
        InputError: If an option is out of range, or the folder is another run's.
    """

    @checked
    def __init__(
        self,
        policy: Policy,
        folder: str | os.PathLike[str],
        observables: Observables = None,
        *,
        every: int = 1,
        rows: int | None = None,
        split: bool = True,
        open_every: int = 0,
        tokens: bool = False,
        tokenizer: Any = None,
        sinks: Sequence[Sink] = (),
        draw: Draw | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        progress: Progress | None = None,
        **options: Unpack[Given],
    ) -> None:
        for name, value, least in (("every", every, 1), ("open_every", open_every, 0), ("rows", rows, 1)):
            _check_count(name, value, least)
        if on_error not in ("warn", "raise"):
            raise InputError(f"Unknown on_error {on_error!r}; expected 'warn' or 'raise'.")
        self.policy, self.every, self.rows, self.open_every = policy, every, rows, open_every
        self.split, self.tokens, self.tokenizer, self.draw = split, tokens, tokenizer, draw
        self.on_error, self.progress, self.sinks = on_error, progress, tuple(sinks)
        forward = options.get("order") == 2 or options.get("method") == "path"  # which reverse mode cannot give
        self._cheapest = "mode" not in options and not forward
        own = {"mode": "auto" if forward else "reverse", "rounding": False}
        self.options = options_of({**own, **options}, "a ledger", OF_ONE_STEP[1:])
        self.observables = observables_of(observables)
        self._log = Log(folder)
        self._steps: Steps | None = None  #: of the window that is open
        self._generations = 0  #: in it
        self._latest: Rollouts | None = None  #: E of the last window
        self._own_marks = False  #: whether generations serve as marks, for want of others
        self._live: Params | None = None  #: the trainer's own leaves, as the last step knew them
        self._next: int | None = None  #: number of the next step
        self._logged: dict[str, float] = {}
        self._seconds = 0.0

    @property
    def books(self) -> Books:
        """The lines so far."""
        return Books.of(self._log.lines)

    @property
    def opens(self) -> bool:
        """Whether the steps of this moment are to be opened to their tokens, so that they have to know their batch."""
        last, number = self._generations == self.every, len(self._log.lines.windows)
        return self._steps is not None and self.open_every > 0 and last and number % self.open_every == 0

    def generation(self, params: Params, rollouts: Rollouts | None = None) -> Window | None:
        """Take the rollouts that were drawn from θ at this moment: they close a window, which is returned, or open one.

        Args:
            params: θ of this moment.
            rollouts: Drawn from it; None where the ledger draws its own.

        Raises:
            InputError: If there are no rollouts; with `on_error="raise"` also if they cannot serve.
            FuncprobeError: With `on_error="raise"`, whatever kept the window from being measured.
        """
        if rollouts is None and self.draw is None:
            raise InputError("There are no rollouts; give those of this generation, or a ledger that draws its own.")
        with self._timed():
            window = None
            if self._steps is not None and self._steps.last >= self._steps.first:
                if self._generations < self.every:
                    self._generations += 1
                    return None
                window = self._close_window(params, rollouts)
            elif self._steps is None and not self._log.lines.marks and rollouts is not None:
                self._own_marks = True
                self._mark(params, rollouts)
            self._open_window(params)
        return None if window is None else self._keep(window)

    def before_step(self, update: Update, step: int | None = None, *, of_batch: Update | None = None) -> None:
        """Take a step that is about to be taken: θ, gradient and the optimizer's state of this moment.

        Args:
            update: The step; best of the gradient that is really used (`LivePair.update_from_grad`).
            step: Its number in the run; None counts on from the last one. A smaller one than before begins again there.
            of_batch: The same step made from its batch U, where `update` does not know its tokens.

        Raises:
            InputError: If gradient, state or learning rate do not fit.
            NumericsError: If the gradient is not finite.
        """
        with self._timed():
            self._count(step)
            self._live = update.params
            assert self._next is not None
            if self._steps is None:  # steps before the first generation that the ledger saw
                self._next += 1
                return
            number, self._next = self._next, self._next + 1
            with self._guarded(f"Step {number}", self._steps):
                self._steps.take(update, number, split=self.split)
                batch = update if update.depth == "batch" else of_batch
                if batch is not None and self.opens:
                    self._steps.keep(batch, _as_used(batch if update.depth == "delta" else update), number)

    def after_step(self, params: Params | None = None) -> None:
        """Hold the step that was taken against our own: one leaf, another one every time.

        Args:
            params: θ after it; None where the leaves of `before_step` were stepped in place.
        """
        with self._timed():
            self._live = self._live if params is None else params
            if self._steps is not None and self._live is not None:
                self._steps.check(self._live)

    def note(self, logged: Mapping[str, float]) -> None:
        """Keep the numbers that a trainer logs of its steps beside a window's own; of one name the last counts."""
        self._logged |= {str(name): float(value) for name, value in logged.items() if isinstance(value, int | float)}

    def mark(self, params: Params, rollouts: Rollouts) -> Mark:
        """Take the value of every observable at this moment, on rollouts of θ that serve nothing else: one pass.

        The books close between the first mark and the last.

        Raises:
            InputError: If the rollouts cannot serve an observable.
            NumericsError: If a score is not finite.
        """
        with self._timed():
            return self._mark(params, rollouts)

    def close(self, params: Params | None = None) -> Books:
        """End the ledger and return its books: one that draws its own closes the last window too, at `params`.

        Steps after the last generation are in no window, and said to be so.
        """
        now = self._live if params is None else params
        if self.draw is not None and now is not None and self._steps is not None:
            self.generation(now)
        elif self._steps is not None:
            if self._own_marks and self._latest is not None:
                with self._guarded("The last value"):
                    self._mark(self._steps.before, self._latest, self._steps.first)
            if self._steps.last >= self._steps.first:
                self._log.add(Lost(self._steps.first, self._steps.last, "the run ended before another generation"))
        self._steps, self._latest = None, None
        for sink in self.sinks if self._log.is_written else ():
            self._told(sink, sink.close)
        if waiting := self._log.close():
            warnings.warn(
                f"{waiting} lines of the ledger could not be written to {self._log.folder}; they are in what close() "
                "returned.",
                FuncprobeWarning,
                stacklevel=2,
            )
        return self.books

    def _count(self, step: int | None) -> None:
        """Set the number of the step; a run that was resumed from an earlier one begins again there.

        Raises:
            InputError: If steps are not counted one by one.
        """
        _check_count("step", step, 0)
        lines = self._log.lines
        ends = [window.last for window in lines.windows] + [lost.last for lost in lines.lost]
        after = max(ends, default=-1) + 1
        if self._next is None:
            self._next = after if step is None else step
            if self._next < after:
                self._log.add(Resumed(self._next))
            if self._steps is not None:  # opened before any step had a number
                self._steps.first, self._steps.last = self._next, self._next - 1
        elif step is not None and step != self._next:
            raise InputError(f"Step {step} came after step {self._next - 1}; steps are counted on, one by one.")

    def _open_window(self, params: Params) -> None:
        self._steps, self._generations = Steps.since(params, self._next or 0), 1

    def _close_window(self, params: Params, rollouts: Rollouts | None) -> Window | None:
        steps = self._steps
        assert steps is not None
        with self._guarded(f"The window of steps {steps.first} to {steps.last}", steps):
            evaluation = self._chosen(params, rollouts)
            if self._cheapest and engine.arithmetic(self.policy, params).eps > LOW_PRECISION:
                self.options = replace(self.options, mode="auto")  # where a subtraction would drown
            back = look_back(
                self.policy, params, steps.before, evaluation, self.observables, self.options, self.progress
            )
            told = [opened(kept, back.covector, self.options.microbatch, self.tokenizer) for kept in steps.kept]
            self._latest = evaluation
            return self._window(steps, params, evaluation, back, told)
        return None

    def _window(self, steps: Steps, params: Params, evaluation: Rollouts, back: LookedBack, told: list[Told]) -> Window:
        leaves = steps.leaves(back.covector, params)
        if self.tokens and self._log.is_written:
            for each in told:
                tables.write_tokens(self._log.folder, each.summary.step, each.tokens)
        return Window(
            number=len(self._log.lines.windows),
            first=steps.first,
            last=steps.last,
            generations=self._generations,
            readings=back.readings,
            split=split_of(leaves, steps.sums is not None),
            layers=rolled_up(leaves, PARAMETER_TABLES["layers"]),
            health=back.outcome.health,
            lr=steps.lr,
            delta_norm=back.outcome.delta_norm,
            grad_norm=steps.grad_norm,
            mismatch=steps.mismatch,
            sampler_gap=back.sampler_gap,
            evaluation=BatchCounts.of(evaluation),
            seconds=0.0,
            opened=tuple(each.summary for each in told),
            trainer=dict(self._logged),
            warnings=(*back.outcome.warnings, *(note for each in told for note in each.warnings)),
        )

    def _chosen(self, params: Params, rollouts: Rollouts | None) -> Rollouts:
        """Return E: rollouts of the ledger's own, or the trainer's, cut to whole prompts of about `rows` rows."""
        if self.draw is not None:
            return self.draw(params)
        assert rollouts is not None
        count = len(rollouts.ids)
        if self.rows is None or self.rows >= count or len(rollouts.group_ids.unique()) < 2:
            return rollouts
        generator = torch.Generator().manual_seed(self.options.seed + len(self._log.lines.windows))
        return split(rollouts, self.rows / count, generator)[0]

    def _mark(self, params: Params, rollouts: Rollouts, step: int | None = None) -> Mark:
        at = (self._next or 0) if step is None else step
        mark = value_at(self.policy, params, rollouts, self.observables, self.options, at, self.progress)
        self._log.add(mark)
        return mark

    def _keep(self, window: Window) -> Window:
        window = replace(window, seconds=self._seconds)
        self._log.add(window)
        self._seconds, self._logged = 0.0, {}
        if not self._log.is_written:
            return window
        with suppress(OSError):  # a full disk, of which the lines have told
            tables.write_windows(self._log.folder, self._log.lines.windows)
        for sink in self.sinks:
            self._told(sink, lambda sink=sink: tell(sink, window))  # type: ignore[misc]
        return window

    def _told(self, sink: Sink, call: Callable[[], None]) -> None:
        """Call a tracker; one that fails is told of no more, in one warning, whatever it raises."""
        try:
            call()
        except Exception as error:
            self.sinks = tuple(other for other in self.sinks if other is not sink)
            text = f"{type(sink).__name__} failed ({type(error).__name__}: {error}), and is told of no more windows."
            warnings.warn(message(text), FuncprobeWarning, stacklevel=5)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - began

    @contextmanager
    def _guarded(self, what: str, steps: Steps | None = None) -> Iterator[None]:
        """Let an error become a line and a warning, so that training goes on.

        Raises:
            FuncprobeError: With `on_error="raise"`.
            OutOfMemoryError: Likewise.
        """
        try:
            yield
        except (FuncprobeError, torch.OutOfMemoryError) as error:
            if self.on_error == "raise":
                raise
            if steps is not None:
                self._log.add(Lost(steps.first, steps.last, message(str(error))))
                self._steps = None
            warnings.warn(f"{what} is not in the ledger: {error}", FuncprobeWarning, stacklevel=5)


def _as_used(update: Update) -> Gradients:
    """Return the gradient as it reaches the optimizer: clipped."""
    assert update.rule is not None
    return update.rule.clipped(update.gradient().gradient)[0]


def _check_count(name: str, value: object, least: int) -> None:
    """Check that a number is whole and large enough, where there is one.

    Raises:
        InputError: If it is not.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise InputError(f"{name} is {value!r}; expected a whole number of at least {least}.")
