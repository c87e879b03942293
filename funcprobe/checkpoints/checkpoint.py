"""`Checkpoint`: a policy at one moment of its training, with the optimizer that is about to step it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from funcprobe.errors import CheckpointError
from funcprobe.measurement.update import Update
from funcprobe.optimizers.stored import Storage
from funcprobe.parallel.sharding import shard
from funcprobe.parallel.shards import shard_state
from funcprobe.policy.module import Policy
from funcprobe.training.step import make_step
from funcprobe.types import Microbatch, Objective, Optimizer, OptState, Params, Rollouts


@dataclass(frozen=True)
class Checkpoint:
    """Everything that an update needs, keyed by the same names."""

    policy: Policy  #: the model as pure functions of its trainable leaves
    params: Params  #: the trainable leaves
    optimizer: Optimizer | None = None  #: with the run's hyperparameters; None where none was asked for
    opt_state: OptState | None = None  #: the run's moments by name; None where no optimizer was asked for
    tokenizer: Any = None  #: the folder's tokenizer; None where it has none, and for a live pair
    storage: Storage = field(default_factory=dict)  #: dtype by leaf, where the run keeps it in another than it computes
    eos_ids: tuple[int, ...] = ()  #: every token that ends a completion, by generation_config.json and the tokenizer
    offload: Literal["cpu"] | None = None  #: where gradients and moments are kept; None: beside the parameters

    def update(
        self,
        objective: Objective,
        batch: Rollouts,
        *,
        lr: float | None = None,
        max_grad_norm: float | None = None,
        microbatch: Microbatch = None,
    ) -> Update:
        """Return the update that one step of the run's optimizer on a batch makes.

        Args:
            objective: The loss, such as `grpo()`.
            batch: Rollouts U, which the step is taken on.
            lr: Learning rate; None takes the optimizer's.
            max_grad_norm: The global norm to which the gradient is clipped; no checkpoint stores it (TRL and
                transformers default to 1.0).
            microbatch: How U is cut for the model; it changes memory and no result.

        Raises:
            CheckpointError: If there is no optimizer.
            InputError: If the bound or the learning rate is out of range.
        """
        optimizer, state = self._steps()
        step = make_step(self.policy, objective, optimizer, max_grad_norm, microbatch, self.offload)
        return Update.from_step(step, self.params, state, batch, lr)

    def shard(self) -> Checkpoint:
        """Return the checkpoint with its leaves, and the optimizer's state, shared out over the processes of a run.

        Every process calls it, and lets this checkpoint go; see `funcprobe.shard`.

        Raises:
            InputError: As `funcprobe.shard`.
        """
        policy, params = shard(self.policy, self.params)
        state = None if self.opt_state is None else shard_state(self.opt_state, params)
        own = policy, params, self.optimizer, state, self.tokenizer, self.storage, self.eos_ids, self.offload
        return Checkpoint(*own)

    def _steps(self) -> tuple[Optimizer, OptState]:
        if self.optimizer is None or self.opt_state is None:
            raise CheckpointError(
                "There is no optimizer to step with; load the checkpoint with optimizer='auto' or 'fresh', or give "
                "from_training the live one."
            )
        return self.optimizer, self.opt_state
