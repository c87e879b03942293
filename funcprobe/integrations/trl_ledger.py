"""The ledger of a TRL run: a callback, and the batches that the trainer's `compute_loss` gets.

    ledger = LedgerCallback("runs/ledger", every=1)
    trainer = GRPOTrainer(...)
    ledger.watch(trainer)
    trainer.train()
    print(ledger.books.summary())

Public things alone are used: the callback's hooks, `trainer.compute_loss`, which is wrapped and not changed, and
`trainer.args`. The rollouts of a generation are what `compute_loss` gets first after it; the gradient is `.grad` as it
stands before the optimizer steps, clipped, whatever loss made it.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from funcprobe.checkpoints.live import LivePair, from_training
from funcprobe.errors import FuncprobeError, FuncprobeWarning, InputError, missing_extra
from funcprobe.integrations.trackers import sinks_of
from funcprobe.integrations.trl_batches import Inputs, chosen_tokens, evaluation_from_trl, rollouts_from_trl
from funcprobe.integrations.trl_objectives import objective_from_config
from funcprobe.live.ledger import Draw, Ledger
from funcprobe.live.sinks import Sink
from funcprobe.measurement.measurement import Observables
from funcprobe.measurement.options import Given
from funcprobe.measurement.update import Update
from funcprobe.parallel.batches import gather_rollouts
from funcprobe.parallel.world import world
from funcprobe.policy.module import Policy
from funcprobe.results.books import Books
from funcprobe.types import Rollouts

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise missing_extra("transformers", "trl", "The callback of a TRL trainer") from error

#: policy -> how rollouts are drawn from its parameters: what `LedgerCallback(draw=...)` takes.
Drawing = Callable[[Policy], Draw]


class LedgerCallback(TrainerCallback):
    """The ledger of a GRPOTrainer's or RLOOTrainer's run; see `Ledger`.

    Training is left as it is: parameters, moments, random numbers and logs have the bits that they have without it.
    What the ledger cannot do ends the ledger, in one warning, and not the run.

    Args:
        folder: Where `ledger.jsonl` is kept; None is "ledger" in the trainer's output_dir.
        observables: As in `Ledger`.
        trackers: Told of every window beside the file: "tensorboard", "wandb", "mlflow", "trackio", the name of another
            package's, or a `Sink`; see `funcprobe.integrations.trackers`.
        draw: A function of the policy that returns how rollouts are drawn from parameters; None takes the trainer's
            own generations.
        marks: Likewise; draws rollouts before the first step and after the last, against which the books close.
        **options: Those of `Ledger`: every, rows, split, open_every, tokens, and those of a measurement.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        observables: Observables = None,
        *,
        every: int = 1,
        rows: int | None = None,
        split: bool = True,
        open_every: int = 0,
        tokens: bool = False,
        trackers: Sequence[str | Sink] = (),
        draw: Drawing | None = None,
        marks: Drawing | None = None,
        **options: Unpack[Given],
    ) -> None:
        self.folder, self.observables, self.draw, self.marks = folder, observables, draw, marks
        self.trackers = trackers
        self.kept = {"every": every, "rows": rows, "split": split, "open_every": open_every, "tokens": tokens}
        self.options = options
        self.ledger: Ledger | None = None
        self._pair: LivePair | None = None
        self._tokenizer: Any = None
        self._seen: list[tuple[Inputs, bool]] = []  #: micro-batches of this step, and whether they are of this θ
        self._calls, self._drawn_at = 0, -1  #: of compute_loss; the step before which a generation was drawn
        self._steps = 0
        self._watched, self._ended = False, False
        self._books: Books | None = None

    @property
    def books(self) -> Books | None:
        """The ledger's books: those so far, or those of the whole run; None before its first step."""
        return self._books if self.ledger is None else self.ledger.books

    def watch(self, trainer: Any) -> LedgerCallback:
        """Look at the batches that a trainer trains on, be called by it, and return this callback.

        Raises:
            InputError: If the trainer has no compute_loss.
        """
        inner = getattr(trainer, "compute_loss", None)
        if not callable(inner):
            raise InputError(f"{type(trainer).__name__} has no compute_loss; expected a GRPOTrainer or RLOOTrainer.")

        @functools.wraps(inner)
        def compute_loss(model: nn.Module, inputs: Any, *more: Any, **named: Any) -> Any:
            if model.training:
                self._see(inputs, trainer.args)
            return inner(model, inputs, *more, **named)

        trainer.compute_loss = compute_loss
        self._watched, self._tokenizer = True, getattr(trainer, "processing_class", None)
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse, before the first step, a run that the ledger could not follow.

        Raises:
            InputError: If it sees no batches, or parameters lie in shards.
        """
        if not self._watched:
            raise InputError(
                "The ledger sees no batches: call watch(trainer) of the callback once the trainer is made."
            )
        for name, of in (("deepspeed", "DeepSpeed"), ("fsdp", "FSDP")):
            if getattr(args, name, None):
                raise InputError(
                    f"The run is set up with {of}, which keeps gradients or parameters in shards that a live ledger "
                    "does not read; train without it, or compare saved checkpoints with funcprobe.between."
                )

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look out for the batches of a step, which come now."""
        self._seen, self._steps = [], state.global_step

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Give the ledger the step, and before it the rollouts of a new generation."""
        with self._ending():
            if self._ended:
                return
            pair = self._now(args, model, optimizer)
            assert self.ledger is not None
            fresh = [inputs for inputs, of_now in self._seen if of_now]
            if fresh:
                self.ledger.generation(pair.params, self._evaluation(args, fresh))
            update = pair.update_from_grad()
            of_batch = self._of_batch(args, pair) if self.ledger.opens else None
            self.ledger.before_step(update, state.global_step, of_batch=of_batch)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Hold the step that was taken against our own."""
        with self._ending():
            if self.ledger is not None and not self._ended:
                self.ledger.after_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Keep the numbers that the trainer logs beside the ledger's own."""
        if self.ledger is not None and not self._ended:
            self.ledger.note(logs or {})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the ledger."""
        with self._ending():
            if self.ledger is not None:
                self._finish()
                self._books = self.ledger.close()
        self.ledger = self._pair = None

    def _finish(self) -> None:
        """End the last window and take the last value, on rollouts of their own."""
        if self.marks is None or self._pair is None or self._ended:
            return
        assert self.ledger is not None
        params, draw = self._pair.params, self.marks(self._pair.policy)
        if self.draw is None:
            self.ledger.generation(params, draw(params))
        self.ledger.mark(params, draw(params))

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """Let an error end the ledger, in one warning, and not the run."""
        try:
            yield
        except (FuncprobeError, OSError, torch.OutOfMemoryError) as error:
            self._ended = True
            warnings.warn(f"The ledger ends here, and training goes on: {error}", FuncprobeWarning, stacklevel=4)

    def _see(self, inputs: Inputs, args: Any) -> None:
        """Note a micro-batch; every `steps_per_generation · num_iterations` of them the trainer draws anew."""
        every = (getattr(args, "steps_per_generation", None) or 1) * (getattr(args, "num_iterations", None) or 1)
        if self._calls % every == 0:
            self._drawn_at = self._steps
        repeated = (self._calls % every) // (getattr(args, "steps_per_generation", None) or 1)
        self._calls += 1
        self._seen.append((dict(inputs), self._drawn_at == self._steps and not repeated))

    def _now(self, args: Any, model: Any, optimizer: Any) -> LivePair:
        """Return the live pair of this moment; the copy of the model is made, and proved, once."""
        if self._pair is not None:
            return self._pair.again(optimizer)
        self._pair = from_training(model, optimizer)
        folder = self.folder or Path(args.output_dir) / "ledger"
        draw = None if self.draw is None else self.draw(self._pair.policy)
        self.ledger = Ledger(
            self._pair.policy,
            folder,
            self.observables,
            tokenizer=self._tokenizer if hasattr(self._tokenizer, "decode") else None,
            draw=draw,
            sinks=sinks_of(self.trackers, Path(folder)) if world().is_first else (),
            **self.kept,  # type: ignore[arg-type]
            **self.options,
        )
        if self.marks is not None:
            self.ledger.mark(self._pair.params, self.marks(self._pair.policy)(self._pair.params))
        return self._pair

    def _evaluation(self, args: Any, inputs: Sequence[Inputs]) -> Rollouts | None:
        if self.draw is not None:
            return None
        return gather_rollouts(evaluation_from_trl(inputs, **_sampling(args), max_length=args.max_completion_length))

    def _of_batch(self, args: Any, pair: LivePair) -> Update | None:
        """Return the step made from its batch; None, with a warning, where its objective is not expressible."""
        inputs = [inputs for inputs, _ in self._seen]
        if world().size > 1:
            self._unopened("those of a run of several processes are not told.")
            return None
        try:
            objective = objective_from_config(args, inputs)
        except InputError as error:
            self._unopened(str(error))
            return None
        if not any(bool(chosen_tokens([each], each["completion_ids"].shape[1]).any()) for each in inputs):
            return None  # every completion was truncated and left out: there is no token to tell of
        batch = rollouts_from_trl(inputs, **_sampling(args))
        return pair.update(objective, batch, max_grad_norm=args.max_grad_norm or None)

    def _unopened(self, reason: str) -> None:
        warnings.warn(f"Steps are not opened to their tokens: {reason}", FuncprobeWarning, stacklevel=5)
        assert self.ledger is not None
        self.ledger.open_every = 0


def _sampling(args: Any) -> dict[str, Any]:
    """Return how the trainer samples, as batches are read: a nucleus of 1 and a top_k of 0 restrict nothing."""
    top_p, top_k = getattr(args, "top_p", None), getattr(args, "top_k", None)
    return {
        "temperature": args.temperature,
        "top_p": top_p if top_p is not None and top_p < 1 else None,
        "top_k": top_k or None,
    }
