"""`Update`: a policy and how it is about to change, which every verb takes; its gradient is taken once, when needed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

from funcprobe import tree
from funcprobe.arguments import checked
from funcprobe.data.rollouts import overlap
from funcprobe.errors import FuncprobeError, InputError, Note, collected_notes
from funcprobe.measurement.line import on_line
from funcprobe.measurement.move import Move
from funcprobe.optimizers.groups import check_gradient, check_lr
from funcprobe.optimizers.stored import is_stored, storage_name
from funcprobe.policy.module import Policy
from funcprobe.training.rule import LazyStep, Rule
from funcprobe.training.step import LossGradient, Step, loss_gradients, share_passes
from funcprobe.types import Gradients, Leaves, Objective, Optimizer, OptState, Params, Progress, Rollouts, StepResult

#: How much an update knows, from least to most.
Depth = Literal["delta", "gradient", "batch"]

_DEPTHS: tuple[Depth, ...] = ("delta", "gradient", "batch")

#: Where two checkpoints tell only Δθ, the first one tells the rest.
_OF_A_RUN = "of a checkpoint with load_checkpoint(folder).update(objective, U)"

#: What an update of each depth has that one of less has not.
_KNOWS = {
    "gradient": "a gradient and an optimizer; make it with Update.from_step or Update.from_gradient, or " + _OF_A_RUN,
    "batch": "the tokens of U; make it from a batch, with Update.from_step, or " + _OF_A_RUN,
}


@dataclass
class _Held:
    """The gradient of a loss, once it was taken: updates that differ only in later steps share one."""

    loss: LossGradient | None = None
    warnings: tuple[Note, ...] = ()


@dataclass(frozen=True)
class Update:
    """A policy at θ and how it is about to change: the value that `probe`, `sweep`, `attribute` and `compare` take.

    Made `from_step` it knows the tokens of its batch U, the gradient, the optimizer and Δθ; `from_gradient` all but the
    tokens; `from_delta` Δθ alone. Nothing is computed before it is needed, the gradient on U only once, and nothing
    that is passed in changes. `params` are kept as they are given, not copied: they have to be those of this moment
    when the update is used.
    """

    policy: Policy  #: what scores rollouts
    params: Params  #: θ
    rule: Rule | None = None  #: how a gradient becomes Δθ; None for an update that was given as Δθ
    opt_state: OptState | None = None  #: the optimizer's state before the step
    lr: float | None = None  #: learning rate of this update; None takes the optimizer's
    step: Step | None = None  #: objective and rule; None for an update that was not made from a batch
    batch: Rollouts | None = None  #: rollouts U
    given: LazyStep | None = field(default=None, repr=False)  #: θ′ and Δθ, for an update that was given as Δθ
    _held: _Held = field(default_factory=_Held, repr=False, compare=False)

    @classmethod
    @checked
    def from_step(
        cls, step: Step, params: Params, opt_state: OptState, batch: Rollouts, lr: float | None = None
    ) -> Update:
        """Return the update that one pure step on a batch makes.

        Args:
            step: The pure step; see `make_step`. Its policy is the update's.
            params: θ.
            opt_state: The optimizer's state before the step.
            batch: Rollouts U, which the step is taken on.
            lr: Learning rate; None takes the optimizer's.

        Raises:
            InputError: If `step` is none, or the learning rate is out of range.
        """
        if not isinstance(step, Step):
            raise InputError(f"step is a {type(step).__name__}; expected what make_step(...) returns.")
        return cls(step.policy, params, step.rule, opt_state, _checked(lr), step, batch)

    @classmethod
    @checked
    def from_gradient(
        cls,
        policy: Policy,
        optimizer: Optimizer,
        params: Params,
        opt_state: OptState,
        gradient: Gradients,
        lr: float | None = None,
        max_grad_norm: float | None = None,
    ) -> Update:
        """Return the update that an optimizer makes of a gradient: momentum, decay and gradient are known, tokens not.

        Args:
            policy: What scores rollouts.
            optimizer: The pure optimizer.
            params: θ.
            opt_state: The optimizer's state before the step.
            gradient: By name; None at a leaf that is to be left alone.
            lr: Learning rate; None takes the optimizer's.
            max_grad_norm: The global norm to which the gradient is still to be clipped; None where it was.

        Raises:
            InputError: If the learning rate or the bound is out of range, or the gradient has other names or shapes.
        """
        check_gradient(params, gradient)
        held = _Held(LossGradient(gradient, {}, None))
        return cls(policy, params, Rule(optimizer, max_grad_norm), opt_state, _checked(lr), _held=held)

    @classmethod
    @checked
    def from_delta(cls, policy: Policy, params: Params, delta: Leaves, after: Leaves | None = None) -> Update:
        """Return the update that is Δθ itself: two checkpoints, or a step that something else has taken.

        Args:
            policy: What scores rollouts.
            params: θ.
            delta: Δθ by name, in float32 or wider.
            after: θ′ as it is stored; None rounds θ + Δθ to the dtype of θ.

        Raises:
            InputError: If names or shapes differ.
        """
        tree.same_keys(params, delta, what="params and delta")
        if after is not None:
            tree.same_keys(params, after, what="params and after")
        if after is None:
            after = tree.Lazy(params, lambda name: on_line(params[name], delta[name], 1.0))
        given = LazyStep(_detached(after), _detached(delta), {})
        return cls(policy, params, given=given)

    @property
    def depth(self) -> Depth:
        """How much is known: "batch", "gradient" or "delta"."""
        return "batch" if self.batch is not None else "gradient" if self.rule is not None else "delta"

    def need(self, depth: Depth, what: str) -> None:
        """Check that the update knows enough for something.

        Raises:
            InputError: If it does not; the message says how to make one that does.
        """
        if _DEPTHS.index(self.depth) < _DEPTHS.index(depth):
            raise InputError(f"{what} needs an update that knows {_KNOWS[depth]}.")

    def at(self, lr: float | None) -> Update:
        """Return the same update at another learning rate; both share one gradient.

        Raises:
            InputError: If the update was given as Δθ, or the learning rate is out of range.
        """
        self.need("gradient", "Another learning rate")
        return replace(self, lr=_checked(lr))

    def vary(
        self,
        *,
        objective: Objective | None = None,
        optimizer: Optimizer | None = None,
        opt_state: OptState | None = None,
        lr: float | None = None,
        batch: Rollouts | None = None,
    ) -> Update:
        """Return the update with something else in place of its own, for `compare`; None keeps the update's own.

        Raises:
            InputError: If it was not made from a batch, or the learning rate is out of range.
        """
        self.need("batch", "A varied update")
        assert self.step is not None
        step = replace(
            self.step, objective=objective or self.step.objective, optimizer=optimizer or self.step.optimizer
        )
        own = {
            "opt_state": self.opt_state if opt_state is None else opt_state,
            "lr": self.lr if lr is None else _checked(lr),
        }
        held = self._held if objective is None and batch is None else _Held()
        return replace(self, step=step, rule=step.rule, batch=batch or self.batch, _held=held, **own)  # type: ignore[arg-type]

    def gradient(self, progress: Progress | None = None) -> LossGradient:
        """Return the gradient of the loss before clipping, with info, and scores of U where there is one; taken once.

        Raises:
            InputError: If the update was given as Δθ, or the objective cannot use the batch.
            NumericsError: If a score or the gradient is not finite.
        """
        self.need("gradient", "A gradient")
        if self._held.loss is None:
            assert self.step is not None
            assert self.batch is not None
            with collected_notes("gradient") as notes:
                self._held.loss = self.step.loss_gradient(self.params, self.batch, progress=progress)
            self._held.warnings = tuple(notes)
        return self._held.loss

    def is_independent_of(self, evaluation: Rollouts) -> bool:
        """Return whether E shares neither sequences nor prompts with the batch that the update was made from."""
        if self.batch is None:
            return True
        shared = overlap(evaluation, self.batch)
        return not (shared.sequences or shared.prompts)

    @property
    def warnings(self) -> tuple[Note, ...]:
        """The warnings that were raised when the gradient on U was taken."""
        return self._held.warnings

    def take(self, progress: Progress | None = None) -> StepResult:
        """Return θ′, Δθ, the optimizer's state and the info of the step; made anew at every call, from one gradient.

        Raises:
            InputError: If rollouts, state or learning rate do not fit.
            NumericsError: If scores, gradient or step are not finite.
        """
        if self.given is not None:
            return StepResult(dict(self.given.after), dict(self.given.delta), {}, {}, {})
        assert self.rule is not None
        assert self.opt_state is not None
        loss = self.gradient(progress)
        return self.rule.apply(self.params, self.opt_state, loss.gradient, lr=self.lr, info=loss.info)

    def move(self, progress: Progress | None = None) -> tuple[Move, dict[str, float]]:
        """Return the step as its leaves are read, measured, with its info: no tree of it stands in memory.

        Raises:
            InputError: If rollouts, state or learning rate do not fit.
            NumericsError: If scores, gradient or step are not finite.
        """
        taken = self.given
        if taken is None:
            assert self.rule is not None
            assert self.opt_state is not None
            loss = self.gradient(progress)
            taken = self.rule.lazily(self.params, self.opt_state, loss.gradient, lr=self.lr, info=loss.info)
        return Move.of(self.params, taken.after, taken.delta, narrow=self.stores_narrower), taken.info

    @property
    def storage(self) -> str | None:
        """The dtypes that θ′ is stored in, as words; None where it is computed in no other."""
        return None if self.rule is None else storage_name(self.rule.optimizer, self.params)

    @property
    def stores_narrower(self) -> bool:
        """Whether θ′ is stored in another dtype than it is computed in."""
        return self.rule is not None and is_stored(self.rule.optimizer)

    def shares_gradient(self, other: Update) -> bool:
        """Return whether two updates have one gradient: the same objective on the same batch at the same θ."""
        if self._held is other._held:
            return True
        if self.step is None or other.step is None or self.params is not other.params:
            return False
        a, b = self.step, other.step
        same = a.policy is b.policy and a.objective == b.objective and a.microbatch == b.microbatch
        return same and self.batch is other.batch

    def unheld(self) -> Update:
        """Return the same update, with whose end its gradient is freed; one that was taken already stays with both."""
        return self if self._held.loss is not None else replace(self, _held=_Held())

    def sharing(self, other: Update) -> Update:
        """Return this update with the other's gradient for its own; see `shares_gradient`."""
        return replace(self, _held=other._held)


def take_gradients(updates: Sequence[Update], progress: Progress | None = None) -> None:
    """Take the gradients of several updates, in passes over U that those of one batch and one θ share.

    An error is left to whoever asks an update for its gradient, and knows the update's name.
    """
    waiting = [update for update in updates if update.batch is not None and update._held.loss is None]
    while waiting:
        together = [waiting.pop(0)]
        for update in list(waiting):
            if _goes_with(update, together):
                together.append(update)
                waiting = [other for other in waiting if other is not update]
        if len(together) > 1:
            with suppress(FuncprobeError):
                _take_together(together, progress)


def _goes_with(update: Update, others: Sequence[Update]) -> bool:
    """Return whether an update has another gradient than others, from the same passes."""
    first = others[0]
    if update.batch is not first.batch or update.params is not first.params:
        return False
    steps = [u.step for u in (*others, update) if u.step is not None]
    return share_passes(steps) and not any(update._held is other._held for other in others)


def _take_together(updates: Sequence[Update], progress: Progress | None) -> None:
    first, steps = updates[0], [u.step for u in updates if u.step is not None]
    assert first.batch is not None
    with collected_notes("gradient"):  # of all; each is told its own
        losses = loss_gradients(steps, first.params, first.batch, progress)
    for update, step, loss in zip(updates, steps, losses, strict=True):
        with collected_notes("gradient") as own:
            step.caution(first.batch)
        update._held.loss, update._held.warnings = loss, tuple(own)


def _detached(leaves: Leaves) -> Leaves:
    return tree.Lazy(leaves, lambda name: leaves[name].detach())


def _checked(lr: float | None) -> float | None:
    return None if lr is None else check_lr(lr)
