"""A TRL configuration as an objective: the loss that GRPOTrainer or RLOOTrainer takes, with TRL's own options.

| loss_type | surrogate | averaged over |
|---|---|---|
| grpo | clipped ratio | tokens of a sequence, then sequences |
| bnpo | clipped ratio | tokens of a micro-batch, then micro-batches |
| dr_grpo | clipped ratio | B · max_completion_length |
| dapo (TRL's default) | clipped ratio | `num_items_in_batch` |
| cispo | detached ratio, capped at epsilon_high | `num_items_in_batch` |
| luspo | clipped ratio | sequences, summed over tokens |
| RLOO's | clipped ratio of the whole sequence | sequences |

TRL's `epsilon_high` of None is `epsilon`, whatever the loss, and `importance_sampling_level="sequence"` takes one ratio
a sequence, exp(mean_t log r), in any of them: with grpo that is GSPO.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from funcprobe.errors import FuncprobeWarning, InputError, listed
from funcprobe.integrations.trl_batches import Inputs, chosen_tokens, micro_batches
from funcprobe.objectives.accumulated import Accumulated
from funcprobe.objectives.losses import rloo
from funcprobe.objectives.modifiers import EntropyBonus, Modifier
from funcprobe.objectives.policy_gradient import PolicyGradient
from funcprobe.objectives.token_selection import TopEntropyQuantile

AGGREGATION = {
    "grpo": "sequence_mean",
    "bnpo": "token_mean",
    "dr_grpo": "fixed_length",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "luspo": "sequence_sum",
}
#: Losses that divide by the tokens of the whole generation batch.
BY_ITEMS = ("dapo", "cispo")
#: What it means that a configuration, of another release perhaps, has not got a field.
ABSENT: Mapping[str, Any] = {
    "epsilon_high": None,
    "delta": None,
    "importance_sampling_level": "token",
    "scale_rewards": "group",
    "use_bias_correction_kl": False,
    "max_completion_length": None,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "off_policy_mask_threshold": None,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": None,
    "world_size": 1,
}
INSTEAD = (
    "The trainer's own gradient is right for it: in on_pre_optimizer_step give p.grad, which is clipped already, to "
    "step.apply of a step without max_grad_norm."
)


def objective_from_config(args: Any, inputs: Inputs | Sequence[Inputs] | None = None) -> PolicyGradient | Accumulated:
    """Return the loss of a GRPOConfig or RLOOConfig, or of any object with its fields, as TRL 1.16 takes it.

    `inputs` are the micro-batches of the step, those of all processes, in the order in which `rollouts_from_trl` gets
    them. dapo and cispo divide by `num_items_in_batch · gradient_accumulation_steps / steps_per_generation`, bnpo and
    `top_entropy_quantile` work on every micro-batch by itself: without inputs, these take the batch that they are given
    for a whole generation of one micro-batch. Advantages come with TRL's batches; from rewards the objective makes
    those of `scale_rewards`, and of RLOO's leave-one-out baseline.

    Raises:
        InputError: If a field is missing, if the loss is not expressible, or if it needs inputs and there are none.
    """
    if not hasattr(args, "loss_type") and hasattr(args, "normalize_advantages"):
        low, high = _epsilons(args)
        return rloo(epsilon=low, epsilon_high=high)
    _check_expressible(args)
    base = _policy_gradient(args)
    batches = None if inputs is None else micro_batches(inputs)
    if batches is None:
        _check_by_itself(args)
        return base
    divisors = _divisors(args, batches)
    if base.modifiers:
        _check_bonus(args, divisors == _means(batches))
    one_loss = len(batches) == 1 or (base.separable and len(set(divisors or [0])) == 1)
    if one_loss:
        return base if divisors is None else replace(base, normaliser=divisors[0])
    return Accumulated(base, tuple(len(batch["prompt_ids"]) for batch in batches), divisors)


def _policy_gradient(args: Any) -> PolicyGradient:
    """Return the loss of one batch with the normaliser that it has by itself."""
    loss_type, level = args.loss_type, _field(args, "importance_sampling_level")
    capped = loss_type == "cispo"
    scale, (low, high) = _field(args, "scale_rewards"), _epsilons(args)
    return PolicyGradient(
        _name(loss_type, level),
        "capped" if capped else "clip",
        AGGREGATION[loss_type],
        ratio="sequence_mean" if level == "sequence" else "token",
        scale_rewards={True: "group", False: "none"}.get(scale, scale),
        epsilon=low,
        epsilon_high=high,
        delta=None if capped else _field(args, "delta"),
        beta=_field(args, "beta"),
        use_bias_correction_kl=_field(args, "use_bias_correction_kl"),
        max_completion_length=_field(args, "max_completion_length") if loss_type == "dr_grpo" else None,
        modifiers=_modifiers(args),
    )


def _epsilons(args: Any) -> tuple[float, float]:
    """Return both ends of the clip range: an upper one of None is the lower one, in every loss of TRL."""
    epsilon, high = _field(args, "epsilon"), _field(args, "epsilon_high")
    return epsilon, epsilon if high is None else high


def _name(loss_type: str, level: str) -> str:
    if level == "token":
        return loss_type
    return "gspo" if loss_type == "grpo" else f"{loss_type} with one ratio a sequence"


def _modifiers(args: Any) -> tuple[Modifier, ...]:
    share, coefficient = _field(args, "top_entropy_quantile"), _field(args, "entropy_coef")
    selected: list[Modifier] = [TopEntropyQuantile(share)] if share < 1 else []
    return (*selected, *([EntropyBonus(coefficient)] if coefficient != 0 else []))


def _divisors(args: Any, batches: Sequence[Inputs]) -> tuple[float, ...] | None:
    """Return the divisors of the sum over every micro-batch's tokens; None where rows are counted instead.

    A process divides by `num_items_in_batch / processes`, the accumulation by the number of micro-batches, and
    gradients are averaged over processes: the number of processes cancels where the divisor is one of all tokens.

    Raises:
        InputError: If there are more micro-batches than a step has, or one lacks `num_items_in_batch`.
    """
    accumulated, wanted = _accumulated(args, batches), _field(args, "gradient_accumulation_steps")
    if args.loss_type == "bnpo":
        return _means(batches)
    if args.loss_type not in BY_ITEMS:
        return None
    share = accumulated / (_field(args, "steps_per_generation") or wanted)
    return tuple(max(1.0, _items(batch)) * share for batch in batches)


def _accumulated(args: Any, batches: Sequence[Inputs]) -> float:
    """Return the number of micro-batches a process, which is smaller than configured at the end of an epoch only.

    Raises:
        InputError: If it is larger than configured.
    """
    processes, wanted = _field(args, "world_size"), _field(args, "gradient_accumulation_steps")
    found = f"There are {len(batches)} micro-batches, and a step of this run has {wanted * processes}"
    if len(batches) > wanted * processes:
        raise InputError(f"{found}; give those of one optimizer step, which compute_loss gets after on_step_begin.")
    if len(batches) < wanted * processes:
        warnings.warn(
            f"{found}: they are taken for the last, shorter step of an epoch.", FuncprobeWarning, stacklevel=4
        )
    return len(batches) / processes


def _means(batches: Sequence[Inputs]) -> tuple[float, ...]:
    """Return the divisors of a mean over every micro-batch's own tokens, averaged over micro-batches."""
    return tuple(_tokens(batch) * len(batches) for batch in batches)


def _check_by_itself(args: Any) -> None:
    """Check that the run averages over the batch of a step and nothing else.

    Raises:
        InputError: If it does not.
    """
    steps = _field(args, "gradient_accumulation_steps")
    generation = _field(args, "steps_per_generation") or steps
    by_itself = args.loss_type == "bnpo" or _field(args, "top_entropy_quantile") < 1
    if (args.loss_type in BY_ITEMS and generation != steps) or (by_itself and steps != 1):
        raise InputError(
            f"'{args.loss_type}' at gradient_accumulation_steps={steps} and steps_per_generation={generation} averages "
            "over other tokens than those of the batch of one step; give the micro-batches of the step as `inputs`."
        )
    _check_bonus(args, args.loss_type in ("bnpo", *BY_ITEMS) and steps == 1)


def _tokens(batch: Inputs) -> float:
    """Return the number of tokens that a micro-batch trains on, at least 1."""
    return max(1.0, float(chosen_tokens([batch], batch["completion_ids"].shape[1]).sum()))


def _items(batch: Inputs) -> float:
    if (items := batch.get("num_items_in_batch")) is None:
        raise InputError(
            "A micro-batch has no num_items_in_batch, by which dapo and cispo divide; TRL 1.16 puts it there."
        )
    return float(items.detach() if isinstance(items, Tensor) else items)


def _check_expressible(args: Any) -> None:
    loss_type = _field(args, "loss_type")
    level = _field(args, "importance_sampling_level")
    if loss_type not in AGGREGATION:
        raise InputError(
            f"loss_type '{loss_type}' is not expressible; the losses that are: {listed(AGGREGATION, 10)}. {INSTEAD}"
        )
    if level not in ("token", "sequence"):
        raise InputError(f"importance_sampling_level is {level!r}; expected 'token' or 'sequence'.")
    if _field(args, "off_policy_mask_threshold") is not None:
        raise InputError(
            f"off_policy_mask_threshold, which drops sequences by their drift, is not expressible. {INSTEAD}"
        )
    if _field(args, "use_adaptive_entropy"):
        raise InputError(f"use_adaptive_entropy, whose coefficient the trainer keeps, is not expressible. {INSTEAD}")


def _check_bonus(args: Any, alike: bool) -> None:
    """Check that an entropy bonus is averaged as the policy loss is: TRL takes its mean over every micro-batch.

    Raises:
        InputError: If there is one, and it is not.
    """
    if _field(args, "entropy_coef") != 0 and (not alike or _field(args, "top_entropy_quantile") < 1):
        raise InputError(
            "entropy_coef is expressible where the bonus and the policy loss are averaged over the same tokens (bnpo; "
            "dapo and cispo with one micro-batch a step and a generation; top_entropy_quantile 1), and here they are "
            f"not. {INSTEAD}"
        )


def _field(args: Any, name: str) -> Any:
    """Return a field of the configuration, or the value that its absence means.

    Raises:
        InputError: If it is missing and means nothing.
    """
    if hasattr(args, name):
        return getattr(args, name)
    if name not in ABSENT:
        raise InputError(f"The configuration, a {type(args).__name__}, has no field '{name}'; expected a GRPOConfig.")
    return ABSENT[name]
