"""One policy-gradient loss, of which every objective of the field is a choice of options.

`loss = Σ_t w_t (−surrogate_t + beta · kl_t)`: the surrogate says how an advantage meets the policy, the score-free
weights `w [B, T]` say how tokens are averaged. Weights and advantages are fixed by `prepare` on the whole batch, so the
loss is a plain sum over rows and a slice of the batch gives exactly its part. Modifiers (`modifiers.py`) keep tokens
out of the surrogate or add to their loss; one that compares tokens with one another needs the whole batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from funcprobe.errors import FuncprobeWarning, InputError
from funcprobe.objectives.advantages import BASELINES, SCALES, advantages, by_token
from funcprobe.objectives.checks import check_choice, check_number
from funcprobe.objectives.modifiers import Modifier, TokenTerms, modified
from funcprobe.objectives.ratios import LARGEST, bounded_exp, check_range, k3, reported, weighted_k3
from funcprobe.types import Rollouts, Statistic, TokenScores

SURROGATES = ("log_prob", "clip", "capped")
RATIOS = ("token", "sequence_mean", "sequence_sum")
AGGREGATIONS = ("sequence_mean", "token_mean", "fixed_length", "sequence_sum")


@dataclass(frozen=True)
class PolicyGradient:
    """A policy-gradient objective: pure, a scalar to minimise, separable after `prepare` if its modifiers are.

    With r = π/π_old (token), exp(mean_t log r) or exp(Σ_t log r) (sequence), A the advantage of the row:

    * `log_prob`: `A log π` (reinforce)
    * `clip`: `min(r A, clip(r, 1 − epsilon, 1 + epsilon_high) A)`, with `r ← min(r, delta)` in the first term
    * `capped`: `sg(min(r, epsilon_high)) A log π` (cispo)

    `kl` is k3 against the reference, `exp(ref − logp) − (ref − logp) − 1`, times r with `use_bias_correction_kl`.
    Absent `old_logps` means `logp.detach()`. With base weights a (default 1) the token weights are `a m / (N L)`
    (sequence_mean), `a m / Σ a m` (token_mean), `a m / (N max_completion_length)` (fixed_length) and `a m / N`
    (sequence_sum), N = Σ a, which is B; `normaliser` takes the place of N, of Σ a m, or of N max_completion_length.
    """

    name: str
    surrogate: str  #: one of SURROGATES
    aggregation: str  #: one of AGGREGATIONS
    ratio: str = "token"  #: one of RATIOS
    baseline: str = "group"  #: "group", "leave_one_out" or "none"
    scale_rewards: str = "group"  #: "group", "batch" or "none"
    epsilon: float = 0.2  #: lower clip range
    epsilon_high: float | None = None  #: upper clip range, None for epsilon; the cap itself where capped
    delta: float | None = None  #: two-sided clipping: an upper bound on the unclipped ratio
    beta: float = 0.0  #: coefficient of the KL term
    use_bias_correction_kl: bool = True  #: multiply the KL term by the ratio, as TRL 1.16 does
    max_completion_length: int | None = None  #: None stands for the longest completion of the batch, holes included
    normaliser: float | None = None  #: replaces the batch-wide denominator of the aggregation
    modifiers: tuple[Modifier, ...] = ()  #: changes to the token losses, all at once

    def __post_init__(self) -> None:
        check_choice("surrogate", self.surrogate, SURROGATES)
        check_choice("aggregation", self.aggregation, AGGREGATIONS)
        check_choice("ratio", self.ratio, RATIOS)
        check_choice("baseline", self.baseline, BASELINES)
        check_choice("scale_rewards", self.scale_rewards, SCALES)
        for option in ("epsilon", "epsilon_high", "beta"):
            optional = option == "epsilon_high" and self.surrogate != "capped"
            check_number(option, getattr(self, option), "a number at or above 0", lambda x: x >= 0, optional=optional)
        for option in ("delta", "max_completion_length", "normaliser"):
            check_number(option, getattr(self, option), "a number above 0", lambda x: x > 0, optional=True)
        _check_modifiers(self.modifiers)

    def __repr__(self) -> str:
        """Return the settings; modifiers stand there only where there are any: a plain loss prints as it always did."""
        shown = [f.name for f in fields(self) if f.name != "modifiers" or self.modifiers]
        return f"PolicyGradient({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    @property
    def separable(self) -> bool:
        """Whether the loss of a prepared batch is the sum of its slices' losses: if all modifiers are separable."""
        return all(modifier.separable for modifier in self.modifiers)

    @property
    def stats(self) -> Mapping[str, Statistic]:
        """The per-token statistics that are needed beyond log-probabilities: none."""
        return {}

    def prepare(self, rollouts: Rollouts) -> Rollouts:
        """Return the rollouts with advantages `[B]` and token weights `[B, T]`, from the whole batch and no score.

        Advantages that the rollouts bring are used as they are; token weights are always made anew. Warns with
        FuncprobeWarning when no row has an advantage, because the step is then momentum and weight decay alone, and
        of what a modifier cautions against.

        Raises:
            InputError: If rewards and advantages are missing or not finite, if a group is too small, if there is no
                completion token, or if beta > 0 and there are no reference log-probabilities.
        """
        found = advantages(rollouts, self.baseline, self.scale_rewards)
        self._check_reference(rollouts)
        if not bool(((by_token(found, rollouts.completion_mask) != 0) & rollouts.completion_mask).any()):
            left = ["the KL term"] * (self.beta != 0) + [m.adds for m in self.modifiers if m.adds is not None]
            warnings.warn(
                "All advantages are zero, so the policy gradient is zero and the step is "
                f"{', '.join([*left, 'momentum and weight decay'])} alone.",
                FuncprobeWarning,
                stacklevel=2,
            )
        prepared = rollouts._replace(advantages=found, token_weights=self.token_weights(rollouts))
        for caution in filter(None, (modifier.caution(prepared) for modifier in self.modifiers)):
            warnings.warn(caution, FuncprobeWarning, stacklevel=2)
        return prepared

    def token_weights(self, rollouts: Rollouts) -> Tensor:
        """Return the score-free weights `[B, T]` of the token losses, 0 where the completion mask is 0.

        Raises:
            InputError: If the batch has no completion token, or no row with a weight.
        """
        mask = rollouts.completion_mask.double()
        weighted = mask * rollouts.weight[:, None].double()
        tokens, rows = float(weighted.sum()), float(rollouts.weight.double().sum())
        if not tokens > 0:
            raise InputError("The batch has no completion token with a weight above 0; there is nothing to train on.")
        if self.aggregation == "sequence_mean":
            weighted = weighted / mask.sum(1, keepdim=True).clamp(min=1)
        natural = {
            "sequence_mean": rows,
            "token_mean": tokens,
            "fixed_length": rows * (self.max_completion_length or _longest(rollouts.completion_mask)),
            "sequence_sum": rows,
        }[self.aggregation]
        return weighted / (natural if self.normaliser is None else self.normaliser)

    def __call__(self, scores: TokenScores, rollouts: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss, info) at scores `[B, T]`; rollouts that were not prepared are prepared first.

        Info holds token means over the rows given, detached: `ratio_mean`, `clip_fraction`, `approx_kl` (k3 of the old
        policy to this one), `entropy` (nats per token), `kl` (k3 to the reference) where beta > 0, and for a modifier
        that singles tokens out their share, `NAME_fraction`. A log-ratio above 600 nats is reported as 600, so that
        they are finite. Where the clip range holds a ratio, its size is without effect on loss and gradient.

        Raises:
            InputError: If `prepare` fails, or beta > 0 and there are no reference log-probabilities.
            NumericsError: If a ratio that nothing clips is beyond the range of float64; the message names the row.
                While the loss is differentiated it is infinite instead.
        """
        if rollouts.token_weights is None or rollouts.advantages is None:
            rollouts = self.prepare(rollouts)
        assert rollouts.token_weights is not None
        assert rollouts.advantages is not None
        place = scores.logp.device
        mask, weights = rollouts.completion_mask.to(place), rollouts.token_weights.to(place)
        advantage = by_token(rollouts.advantages.to(place), mask)
        logp = torch.where(mask, scores.logp, 0.0)
        old = logp.detach() if rollouts.old_logps is None else rollouts.old_logps.to(place)
        log_token = torch.where(mask, logp - old, 0.0)  # stored values in holes are never looked at
        log_ratio = self._log_ratio(log_token, mask)
        info = self._info(log_ratio, log_token, self._clipped(bounded_exp(log_ratio.detach()), advantage), scores, mask)
        trains = mask & (weights != 0)  # a row of weight 0 is as good as absent, whatever its ratio
        log_ratio = torch.where(trains.any(1, keepdim=True), log_ratio, 0.0)
        ratio = bounded_exp(log_ratio)
        losses = torch.where(trains, -self._surrogate(ratio, logp, advantage, mask), 0.0)
        weighted = trains
        if self.modifiers:
            counted = mask & (rollouts.weight.to(place) > 0)[:, None]
            clipped, entropy = self._clipped(ratio.detach(), advantage), torch.where(mask, scores.entropy, 0.0)
            terms = torch.broadcast_tensors(logp, log_token, ratio, advantage, entropy, clipped, counted)
            losses, kept, shares = modified(losses, TokenTerms(*terms), self.modifiers)
            trains, info = trains & kept, info | shares
        if self.surrogate == "clip" and self.delta is None:
            losses = check_range(
                log_ratio, trains & (log_ratio > LARGEST) & (advantage < 0), losses, "the importance ratio"
            )
        if self.beta != 0:
            losses, info["kl"] = self._with_kl(losses, logp, log_ratio, rollouts, weighted)
        return (weights * losses).sum(), info

    def _log_ratio(self, log_token: Tensor, mask: Tensor) -> Tensor:
        """Return the logarithm of the importance ratio: `[B, T]` by token, `[B, 1]` by sequence."""
        if self.ratio == "token":
            return log_token
        total = log_token.sum(1, keepdim=True)
        return total if self.ratio == "sequence_sum" else total / _lengths(mask)

    def _surrogate(self, ratio: Tensor, logp: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        """Return the surrogate that the loss maximises, broadcastable to `[B, T]`."""
        if self.surrogate == "log_prob":
            return advantage * logp
        if self.surrogate == "capped":
            return torch.clamp(ratio, max=self._high).detach() * advantage * logp
        free = ratio if self.delta is None else torch.clamp(ratio, max=self.delta)
        clipped = torch.clamp(ratio, 1 - self.epsilon, 1 + self._high)
        bound = torch.minimum(free * advantage, clipped * advantage)
        # The product of all ratios counts once a sequence, and the weights are per token: each bears its share.
        return bound / _lengths(mask) if self.ratio == "sequence_sum" else bound

    def _with_kl(
        self, losses: Tensor, logp: Tensor, log_ratio: Tensor, rollouts: Rollouts, weighted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the token losses with the KL term to the reference, and the mean of k3 over completion tokens."""
        self._check_reference(rollouts)
        assert rollouts.ref_logps is not None
        mask = rollouts.completion_mask.to(logp.device)
        d = torch.where(mask, rollouts.ref_logps.to(logp.device) - logp, 0.0)
        mean = _token_mean(k3(reported(d)), mask)
        d = torch.where(weighted, d, 0.0)
        log = d.clamp(min=0) + log_ratio if self.use_bias_correction_kl else d
        term = weighted_k3(d, log_ratio) if self.use_bias_correction_kl else k3(d)
        losses = losses + self.beta * term
        return check_range(log.detach(), (log > LARGEST) & (d != 0), losses, "the KL term to the reference"), mean

    def _clipped(self, r: Tensor, advantage: Tensor) -> Tensor:
        """Return whether the clip range, or the cap, holds a ratio; bool, broadcastable to `[B, T]`."""
        cap = self._high if self.surrogate == "capped" else 1 + self._high
        clipped = (r > cap) & (advantage > 0)
        if self.surrogate == "clip":
            return clipped | ((r < 1 - self.epsilon) & (advantage < 0))
        return torch.zeros_like(clipped) if self.surrogate == "log_prob" else clipped

    def _info(
        self, log_ratio: Tensor, log_token: Tensor, clipped: Tensor, scores: TokenScores, mask: Tensor
    ) -> dict[str, Tensor]:
        return {
            "ratio_mean": _token_mean(torch.exp(reported(log_ratio)), mask),
            "clip_fraction": _token_mean(clipped, mask),
            "approx_kl": _token_mean(k3(reported(log_token)), mask),
            "entropy": _token_mean(scores.entropy.detach(), mask),
        }

    @property
    def _high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def _check_reference(self, rollouts: Rollouts) -> None:
        if self.beta != 0 and rollouts.ref_logps is None:
            raise InputError(
                f"beta is {self.beta}, and the rollouts have no ref_logps to take the KL term against; add the "
                "reference policy's log-probabilities, or set beta to 0."
            )


def _lengths(mask: Tensor) -> Tensor:
    """Return the number of completion tokens `[B, 1]`, at least 1."""
    return mask.sum(1, keepdim=True).clamp(min=1)


def _longest(mask: Tensor) -> int:
    """Return the longest completion of the batch in positions, holes included and padding not."""
    return int(torch.nonzero(mask.any(0)).max()) + 1


def _token_mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values.double(), 0.0).sum() / mask.sum().clamp(min=1)


def _check_modifiers(modifiers: tuple[Modifier, ...]) -> None:
    if not isinstance(modifiers, tuple) or not all(isinstance(m, Modifier) for m in modifiers):
        raise InputError(f"modifiers is {modifiers!r}; it must be a tuple of modifiers such as EntropyBonus().")
    names = [modifier.name for modifier in modifiers]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{twice[0]} stands twice; give it once, with the options that are meant.")
