"""The parts that a step is made of: gradient on U, optimizer state, cotangents of the loss; and their pieces of Δθ."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from funcprobe import engine
from funcprobe.attribution.parameter_parts import PARAMETER_TABLES, read_name
from funcprobe.data.rollouts import members, take, to_device
from funcprobe.errors import FuncprobeWarning
from funcprobe.measurement.move import Move
from funcprobe.measurement.update import Update
from funcprobe.optimizers.unreached import with_zeros
from funcprobe.training.response import Response, offsets_of, respond
from funcprobe.training.rule import Rule
from funcprobe.training.step import Step
from funcprobe.types import Gradients, Leaves, Microbatch, OptState, Params, Rollouts, TokenScores


@dataclass(frozen=True)
class StepParts:
    """A step taken on a batch, with everything that it was made of, from which its parts and their Δθ follow."""

    step: Step
    params: Params  #: θ
    opt_state: OptState
    gradient: Gradients  #: of the loss, before clipping
    delta: Leaves  #: Δθ
    lr: float | None
    prepared: Rollouts  #: U, with advantages
    on_batch: TokenScores  #: cotangents of the loss on U
    microbatch: Microbatch
    form: Literal["additive", "jacobian"]

    @classmethod
    def of(cls, update: Update, move: Move, cut: Microbatch, form: Literal["additive", "jacobian"]) -> StepParts:
        """Return the parts of an update that was made from a batch.

        The cotangents of the loss are those of the gradient, taken at its very scores: those of forward mode differ by
        rounding, and where the loss picks tokens by rank, or clips them, they would now and then pick others.
        """
        step, batch, loss = update.step, update.batch, update.gradient()
        assert step is not None
        assert batch is not None
        assert update.opt_state is not None
        assert loss.scores is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FuncprobeWarning)  # issued when the gradient was taken
            prepared = to_device(step.objective.prepare(batch), step.policy.device)
        on_batch = engine.cotangents(lambda s: step.objective(s, prepared)[0], loss.scores)
        made = step, update.params, update.opt_state, loss.gradient, move.delta, update.lr
        return cls(*made, prepared, on_batch, cut, form)

    @property
    def rule(self) -> Rule:
        """The half of the step that needs no model."""
        return self.step.rule

    def carried(self, covector: Params) -> Response:
        """Return a ∇F carried back through the step."""
        return respond(self.rule, self.params, self.opt_state, self.gradient, covector, self.lr, self.form)

    def pieces(self, table: str) -> Iterator[tuple[str, Leaves]]:
        """Yield (label, piece of Δθ) for every row of a table, in the additive form; one exists at a time."""
        if table == "ledger":
            yield "gradient on U", self._moved_by(with_zeros(self.gradient, self.params))
            yield from offsets_of(self.rule, self.params, self.opt_state, self.gradient, self.lr).items()
        elif table in ("prompts", "sequences"):
            for number, rows in members(self.prepared, table):
                yield str(number), self._moved_by(self.gradient_of(rows))
        else:
            label_of = PARAMETER_TABLES.get(table)
            labels = {n: n if label_of is None else label_of(read_name(n)) for n in self.delta}
            for label in dict.fromkeys(found for found in labels.values() if found is not None):
                yield label, {n: u if labels[n] == label else torch.zeros_like(u) for n, u in self.delta.items()}

    def gradient_of(self, rows: Tensor, among: Tensor | None = None) -> Params:
        """Return the part of some rows of U in the gradient of the loss on all of it.

        With `among [B, T]`, the part of those of their tokens where it is True.
        """
        part = take(self.prepared, rows)
        chosen = self.on_batch if among is None else engine.each(lambda c: c * among.to(c), self.on_batch)
        c = engine.rows_of(chosen, rows, part)
        stats = self.step.objective.stats
        return engine.pull_back(
            c, self.step.policy, self.params, part, as_training=True, stats=stats, microbatch=self.microbatch
        )

    def _moved_by(self, gradient: Params) -> Leaves:
        """Return `scale ⊙ g_j`: the map from gradients to steps is diagonal, so it is its own transpose."""
        return respond(self.rule, self.params, self.opt_state, self.gradient, gradient, self.lr, "additive").direction
