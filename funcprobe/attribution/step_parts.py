"""What a step was made of (gradient on U, optimizer state, cotangents of the loss), and what follows from that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from funcprobe import engine
from funcprobe.attribution.parameter_parts import PARAMETER_TABLES, read_name
from funcprobe.data.rollouts import members, take
from funcprobe.optimizers.unreached import with_zeros
from funcprobe.training.response import Response, offsets_of, respond
from funcprobe.training.step import Step
from funcprobe.types import Gradients, Microbatch, OptState, Params, Rollouts, TokenScores


@dataclass(frozen=True)
class Grounds:
    """A step with what it was made of, from which its parts and their pieces of Δθ follow."""

    step: Step
    params: Params
    opt_state: OptState
    gradient: Gradients  #: of the loss, before clipping
    update: Params  #: Δθ
    lr: float | None
    prepared: Rollouts  #: U, with advantages
    on_update: TokenScores  #: cotangents of the loss on U
    microbatch: Microbatch
    form: Literal["additive", "jacobian"]

    def carried(self, covector: Params) -> Response:
        """Return a ∇F carried back through the step."""
        return respond(self.step, self.params, self.opt_state, self.gradient, covector, self.lr, self.form)

    def pieces(self, table: str) -> Iterator[tuple[str, Params]]:
        """Yield (label, piece of Δθ) for every row of a table, in the additive form; one exists at a time."""
        if table == "ledger":
            yield "gradient on U", self._moved_by(with_zeros(self.gradient, self.params))
            yield from offsets_of(self.step, self.params, self.opt_state, self.gradient, self.lr).items()
        elif table in ("prompts", "sequences"):
            for number, rows in members(self.prepared, table):
                yield str(number), self._moved_by(self._gradient_of(rows))
        else:
            label_of = PARAMETER_TABLES.get(table)
            labels = {n: n if label_of is None else label_of(read_name(n)) for n in self.update}
            for label in dict.fromkeys(found for found in labels.values() if found is not None):
                yield label, {n: u if labels[n] == label else torch.zeros_like(u) for n, u in self.update.items()}

    def _gradient_of(self, rows: Tensor) -> Params:
        part = take(self.prepared, rows)
        c = engine.rows_of(self.on_update, rows, part)
        stats = self.step.objective.stats
        return engine.pull_back(
            c, self.step.policy, self.params, part, as_training=True, stats=stats, microbatch=self.microbatch
        )

    def _moved_by(self, gradient: Params) -> Params:
        """Return `scale ⊙ g_j`: the map from gradients to steps is diagonal, so it is its own transpose."""
        return respond(self.step, self.params, self.opt_state, self.gradient, gradient, self.lr, "additive").direction
