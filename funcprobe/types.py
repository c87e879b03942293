"""The contract: the values that flow through funcprobe, and the protocols that user code can fill.

Shapes: B sequences, L columns of prompt and completion together, T completion positions, V vocabulary entries, D
features, n tokens. Units: nats, tokens, sequences. Traced values are NamedTuples, because `torch.func` sees those;
static options live in frozen dataclasses or closures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

#: A name-keyed tree of leaves: parameters, gradients and updates all have this type and share their keys.
Params = dict[str, Tensor]

#: A tree that is read leaf by leaf: a dictionary, or a `tree.Lazy`, which computes a leaf when it is read.
Leaves = Mapping[str, Tensor]

#: A gradient of a loss: a tree like the parameters, with None, as in `.grad`, at a leaf that the loss does not depend
#: on. An optimizer leaves such a leaf alone, while under a gradient of 0 momentum and decay go on.
Gradients = Mapping[str, Tensor | None]

#: The optimizer's state: for every parameter name the named state tensors (`step`, `exp_avg`, ...) of torch.optim.
OptState = Mapping[str, dict[str, Tensor]]

#: A per-token statistic of the conditional distribution: (log_probs [n, V], token [n]) -> [n].
Statistic = Callable[[Tensor, Tensor], Tensor]

#: Called as progress(what, done, total) after every microbatch.
Progress = Callable[[str, int, int], None]


class TokenBudget(NamedTuple):
    """A microbatch size stated in tokens: as many rows as fit, padding included, and at least one row."""

    tokens: int


#: By which importance weights an observable is estimated, and so by which effective sample size it is judged: products
#: of ratios up to a token, those of a whole sequence, or none (a plain mean over rollouts).
Weighting = Literal["per_decision", "sequence", "none"]

#: What importance weights are taken against: recomputed log-probs of the anchor, or those that the sampler reported.
Proposal = Literal["anchor", "sampler"]

#: How a batch is cut: a number of sequences, a token budget, or None for one piece.
Microbatch = int | TokenBudget | None


class Rollouts(NamedTuple):
    """A batch of sampled sequences. Every field is None or a tensor whose first axis is B, so that a slice is a batch.

    Rows are right-padded: prompt, completion, padding. Completion position t of row b is the token in column
    `prompt_lengths[b] + t`; only `completion_mask` decides which of those tokens the policy chose.
    """

    ids: Tensor  #: [B, L] int64 token ids; what stands in padded columns is never looked at
    attention_mask: Tensor  #: [B, L] bool, True on real tokens, which come first in every row
    prompt_lengths: Tensor  #: [B] int64 >= 1, the column at which the completion starts
    completion_mask: Tensor  #: [B, T] bool, False on padding and in holes (tokens a tool wrote)
    temperature: Tensor  #: [B] float64 > 0, the temperature at which the row was sampled
    group_ids: Tensor  #: [B] int64, equal for rollouts of one prompt
    weight: Tensor  #: [B] float64 >= 0, base weight: 1, bootstrap counts, or exact probabilities of an enumeration
    rewards: Tensor | None = None  #: [B] float64
    advantages: Tensor | None = None  #: [B] float64, or [B, T] by token; where given, objectives use them as they are
    sampling_logps: Tensor | None = None  #: [B, T] float64 log-probs reported by the engine that sampled
    old_logps: Tensor | None = None  #: [B, T] float64 log-probs of the policy that the ratio is taken against
    ref_logps: Tensor | None = None  #: [B, T] float64 log-probs of the reference policy of the KL term
    top_p: Tensor | None = None  #: [B] float64, nucleus mass of the sampler; below 1 its log-probs are renormalised
    top_k: Tensor | None = None  #: [B] int64, 0 when unrestricted
    step: Tensor | None = None  #: [B] int64, the training step at which the row was drawn
    token_weights: Tensor | None = None  #: [B, T] float64 score-free weights of the loss terms, by Objective.prepare


class TokenScores(NamedTuple):
    """The scores of a policy on every completion token. All fields are [B, T] and 0 where the completion mask is 0."""

    logp: Tensor  #: [B, T] float64, nats: log-probability of the token at the sampling temperature
    entropy: Tensor  #: [B, T] float64, nats: entropy of the distribution that the token was drawn from
    extra: dict[str, Tensor] = {}  # noqa: RUF012  named statistics that a caller asked for


class Estimate(NamedTuple):
    """One functional of the policy before and after a step, with its first-order prediction."""

    before: float  #: F at the anchor
    after: float  #: F at the updated parameters, importance-sampled
    change: float  #: after - before, from the same differences of scores
    first_order: float | None  #: ⟨∇F, Δθ⟩; None where it was not computed


class StepResult(NamedTuple):
    """The result of one pure optimizer step."""

    params: Params  #: the parameters after the step, bit-identical to what torch.optim would store
    delta: Params  #: the step as a value: the optimizer's arithmetic in float64, kept in float32 or wider
    opt_state: OptState  #: the optimizer's state after the step
    gradient: Gradients  #: the gradient of the loss, before clipping; None at leaves that it does not depend on
    #: loss, grad_norm, clip_coefficient, lr, leaves_without_gradient (where there are any), what the objective reported
    info: dict[str, float]


class OptimizerResult(NamedTuple):
    """The result of the optimizer alone: the new leaves, the step as a value, the new state."""

    params: Params  #: bit-identical to torch.optim
    delta: Params  #: float64 arithmetic, kept in float32 or wider
    opt_state: OptState  #: bit-identical to torch.optim


@runtime_checkable
class Observable(Protocol):
    """A functional of the policy, as a pure function of scores."""

    @property
    def name(self) -> str:
        """The observable's name in tables."""
        ...

    @property
    def unit(self) -> str:
        """Its unit, such as "nats per token"."""
        ...

    @property
    def stats(self) -> Mapping[str, Statistic]:
        """The named statistics that it needs in `scores.extra`."""
        ...

    @property
    def weighting(self) -> Weighting:
        """The importance weights that it uses."""
        ...

    @property
    def proposal(self) -> Proposal:
        """The policy that its importance weights are taken against."""
        ...

    @property
    def inclusive(self) -> bool:
        """Whether its per-decision weights run to the token itself (s ≤ t), as those of a surprisal do."""
        ...

    def __call__(self, scores: TokenScores, anchor: TokenScores, rollouts: Rollouts) -> Tensor:
        """Return the scalar estimate at `scores`, for rollouts drawn at `anchor`."""
        ...


@runtime_checkable
class Objective(Protocol):
    """A training loss, as a pure function of scores."""

    @property
    def name(self) -> str:
        """The field's name of it."""
        ...

    @property
    def separable(self) -> bool:
        """Whether, after `prepare`, the loss of a batch is the sum of the losses of its slices."""
        ...

    @property
    def stats(self) -> Mapping[str, Statistic]:
        """The named statistics that it needs in `scores.extra`."""
        ...

    def prepare(self, rollouts: Rollouts) -> Rollouts:
        """Fill in the quantities that depend on the whole batch but on no score: advantages and token weights."""
        ...

    def __call__(self, scores: TokenScores, rollouts: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss, info) on prepared rollouts; the loss is a scalar to minimise."""
        ...


@runtime_checkable
class Optimizer(Protocol):
    """A pure optimizer: its state and its parameters are arguments, never attributes."""

    @property
    def lr(self) -> float:
        """The learning rate used when a call names none (the first group's, where groups differ)."""
        ...

    def init(self, params: Params) -> OptState:
        """Return the state before the first step."""
        ...

    def apply(
        self, params: Params, opt_state: OptState, gradient: Gradients, lr: float | None = None
    ) -> OptimizerResult:
        """Return parameters, Δθ and state after one step; `lr` overrides every group's for this call.

        The gradient is None at a leaf that the loss does not depend on, and never at all of them. As in torch.optim,
        such a leaf is left alone: its parameters and state come back as they are, and its Δθ is 0. An optimizer
        that is used only with models whose leaves all take part in every loss need not look for None.
        """
        ...


#: Anything JSON can carry.
Json = dict[str, Any]
