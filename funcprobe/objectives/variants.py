"""Variants that preserve entropy, each over a loss of the field: clip_cov, kl_cov, entropy_bonus, and token masks.

| name | token loss, over that of its base | source |
|---|---|---|
| clip_cov | 0 on a random few of the tokens with a large covariance | arXiv 2505.22617, verl |
| kl_cov | + ppo_kl_coef · abs(log π − log π_old) on the tokens with the largest covariance | arXiv 2505.22617, verl |
| entropy_bonus | − entropy_coef · H on every token | arXiv 1602.01783 |
| top_entropy_quantile | 0 below a quantile of the entropy | arXiv 2506.01939, TRL |
| drop_negatives | 0 where the advantage is below 0 | arXiv 2506.01347 |

covariance: `(log π − mean log π)(A − mean A)` per token, over all completion tokens of the batch. `base` is the name of
a loss, whose options may stand beside the variant's own, or an objective that is already made: so they compose,
`clip_cov("dapo", epsilon=0.1)`, `entropy_bonus(clip_cov(), entropy_coef=0.01)`. In all of them the averages keep their
denominators, and a KL term to the reference stays on every token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from funcprobe.errors import InputError
from funcprobe.objectives.losses import BASES
from funcprobe.objectives.modifiers import DropNegatives, EntropyBonus, Modifier
from funcprobe.objectives.policy_gradient import PolicyGradient
from funcprobe.objectives.token_selection import ClipCov, KlCov, TopEntropyQuantile


def clip_cov(
    base: str | PolicyGradient = "grpo",
    *,
    clip_cov_ratio: float = 2e-4,
    clip_cov_lb: float = 1.0,
    clip_cov_ub: float = 5.0,
    seed: int = 0,
    **options: Any,
) -> PolicyGradient:
    """Return Clip-Cov: the base without `max(1, ⌊clip_cov_ratio · n⌋)` tokens, drawn among those of large covariance.

    Candidates have `clip_cov_lb < cov < clip_cov_ub` and a ratio that the clip range does not hold; where there are
    none, the loss is the base's. The draw is the same for the same `seed` however the batch is cut or padded and
    wherever it lies, and another one when rows change places. arXiv 2505.22617; verl's names and defaults.

    Raises:
        InputError: If the base or an option is not usable.
    """
    return _over(base, ClipCov(clip_cov_ratio, clip_cov_lb, clip_cov_ub, seed), options)


def kl_cov(
    base: str | PolicyGradient = "grpo", *, kl_cov_ratio: float = 2e-4, ppo_kl_coef: float = 1.0, **options: Any
) -> PolicyGradient:
    """Return KL-Cov: the base and `ppo_kl_coef · |log π − log π_old|` on the tokens of the largest covariance.

    There are `max(1, ⌊kl_cov_ratio · n⌋)` of them. In a first step on its rollouts (no `old_logps`) the penalty is 0
    with gradient 0, so it changes nothing, and `prepare` warns. With `old_logps` that differ from the policy's own by
    rounding alone it is all or nothing: |x| has a kink at 0, and the gradient is ±ppo_kl_coef with the sign of the
    rounding. The base's clip range stays; verl and the paper clip no ratio, which is a base such as
    `bnpo(epsilon=1e9)`. arXiv 2505.22617; verl's names and defaults.

    Raises:
        InputError: If the base or an option is not usable.
    """
    return _over(base, KlCov(kl_cov_ratio, ppo_kl_coef), options)


def entropy_bonus(base: str | PolicyGradient = "grpo", *, entropy_coef: float = 1e-3, **options: Any) -> PolicyGradient:
    """Return the base minus `entropy_coef · H`, entropy (nats) averaged as the base averages tokens.

    The entropy is that of the policy at the sampling temperature, on the tokens of the rollouts: its gradient is the
    state's own part, and not that of visiting other states. A coefficient below 0 lowers the entropy. arXiv 1602.01783.

    Raises:
        InputError: If the base or an option is not usable.
    """
    return _over(base, EntropyBonus(entropy_coef), options)


def top_entropy_quantile(
    base: str | PolicyGradient = "grpo", *, top_entropy_quantile: float = 0.2, **options: Any
) -> PolicyGradient:
    """Return the base on the share `top_entropy_quantile` of the tokens with the highest entropy.

    `H ≥ the (1 − top_entropy_quantile) quantile` of all completion tokens of the batch; ties with it train. 1 is the
    base itself (TRL's default), 0.2 what arXiv 2506.01939 recommends. TRL takes the quantile over one micro-batch of
    all devices, this over the whole batch, as the paper does.

    Raises:
        InputError: If the base or an option is not usable.
    """
    return _over(base, TopEntropyQuantile(top_entropy_quantile), options)


def drop_negatives(base: str | PolicyGradient = "grpo", **options: Any) -> PolicyGradient:
    """Return the base on the tokens of rows whose advantage is not below 0.

    With rewards ±1 for advantages this is the positive-sample reinforcement of arXiv 2506.01347. A ratio of a sequence
    still runs over all tokens of its row. Denominators are the base's, so the step is smaller, not only turned.

    Raises:
        InputError: If the base or an option is not usable.
    """
    return _over(base, DropNegatives(), options)


#: The variants by name.
VARIANTS: dict[str, Callable[..., PolicyGradient]] = {
    factory.__name__: factory for factory in (clip_cov, kl_cov, entropy_bonus, top_entropy_quantile, drop_negatives)
}


def _over(base: str | PolicyGradient, modifier: Modifier, options: dict[str, Any]) -> PolicyGradient:
    """Return the base with one more modifier, under a name that says both."""
    made = _made(base, modifier.name, options)
    return replace(made, name=f"{modifier.name}({made.name})", modifiers=(*made.modifiers, modifier))


def _made(base: str | PolicyGradient, variant: str, options: dict[str, Any]) -> PolicyGradient:
    if isinstance(base, PolicyGradient):
        if options:
            raise InputError(
                f"{next(iter(options))} stands beside '{base.name}', which is already made; give it to the base."
            )
        return base
    if not isinstance(base, str) or base not in BASES:
        raise InputError(
            f"base is {base!r}; it must be one of {', '.join(BASES)}, or an objective made by one of them."
        )
    valid = inspect.signature(BASES[base]).parameters
    if unknown := [option for option in options if option not in valid]:
        raise InputError(
            f"Neither '{variant}' nor its base '{base}' has an option '{unknown[0]}'; those of the base are "
            f"{', '.join(valid)}."
        )
    return BASES[base](**options)
