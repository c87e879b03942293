"""The losses of the field under TRL's names: reinforce, rloo, grpo, bnpo, dr_grpo, dapo, gspo, cispo.

| name | token loss | aggregation |
|---|---|---|
| reinforce | −A log π | as chosen |
| grpo | −min(rA, clip(r, 1−epsilon, 1+epsilon_high) A) | mean over sequences of the mean over tokens |
| bnpo | as grpo | mean over tokens |
| dr_grpo | as grpo, scale_rewards="none" | Σ / (B · max_completion_length) |
| dapo | as grpo, epsilon_high 0.28 | Σ / active tokens of the whole batch |
| gspo | as grpo with the ratio of the sequence, exp(mean_t log r) | as grpo |
| cispo | −sg(min(r, epsilon_high)) A log π | as dapo |
| rloo | leave-one-out advantage, ratio of the sequence, exp(Σ_t log r) | mean over sequences |

Every factory returns a `PolicyGradient`, whose docstring says what the options do.
"""

from __future__ import annotations

from collections.abc import Callable

from funcprobe.objectives.policy_gradient import PolicyGradient


def reinforce(
    *,
    aggregation: str = "sequence_mean",
    baseline: str = "group",
    scale_rewards: str = "group",
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    max_completion_length: int | None = None,
    normaliser: float | None = None,
) -> PolicyGradient:
    """Return REINFORCE, `−A log π`, averaged as `aggregation` says.

    `baseline="none", scale_rewards="none"` is the textbook form with A = R.

    Raises:
        InputError: If an option is out of range.
    """
    return PolicyGradient("reinforce", "log_prob", **locals())


def rloo(
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    normaliser: float | None = None,
) -> PolicyGradient:
    """Return RLOO: advantage R minus the mean of the prompt's other rollouts, clipped ratio of the whole sequence.

    `loss = −mean_i min(r_i A_i, clip(r_i) A_i)`, r_i = exp(Σ_t log r). The KL term is summed over a sequence's tokens.
    (TRL's trainer puts its KL in the reward instead; to have that, bring such rewards.)

    Raises:
        InputError: If an option is out of range.
    """
    options = locals()
    return PolicyGradient(
        "rloo",
        "clip",
        "sequence_sum",
        ratio="sequence_sum",
        baseline="leave_one_out",
        scale_rewards="none",
        **options,
    )


def grpo(
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    scale_rewards: str = "group",
    normaliser: float | None = None,
) -> PolicyGradient:
    """Return GRPO: PPO's clipped ratio, mean over sequences of the mean over tokens. arXiv 2402.03300.

    Raises:
        InputError: If an option is out of range.
    """
    return PolicyGradient("grpo", "clip", "sequence_mean", **locals())


def bnpo(
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    scale_rewards: str = "group",
    normaliser: float | None = None,
) -> PolicyGradient:
    """Return BNPO: the clipped ratio of grpo, mean over all tokens of the batch.

    Raises:
        InputError: If an option is out of range.
    """
    return PolicyGradient("bnpo", "clip", "token_mean", **locals())


def dr_grpo(
    max_completion_length: int | None = None,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    scale_rewards: str = "none",
    normaliser: float | None = None,
) -> PolicyGradient:
    """Return Dr. GRPO: no division by a standard deviation or a sequence's own length. arXiv 2503.20783.

    `max_completion_length` is the generation limit; None takes the longest completion of the batch.

    Raises:
        InputError: If an option is out of range.
    """
    return PolicyGradient("dr_grpo", "clip", "fixed_length", **locals())


def dapo(
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = 0.28,
    delta: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    scale_rewards: str = "group",
    normaliser: float | None = None,
) -> PolicyGradient:
    """Return DAPO: the clipped ratio with a wider upper range, mean over all tokens. arXiv 2503.14476.

    Raises:
        InputError: If an option is out of range.
    """
    return PolicyGradient("dapo", "clip", "token_mean", **locals())


def gspo(
    *,
    epsilon: float = 3e-4,
    epsilon_high: float | None = 4e-4,
    delta: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    scale_rewards: str = "group",
    normaliser: float | None = None,
) -> PolicyGradient:
    """Return GSPO: grpo with one ratio a sequence, exp(mean_t log r), and the narrow range of its paper.

    A length-normalised ratio stays close to 1, hence 3e-4 and 4e-4. arXiv 2507.18071, section 5.1.

    Raises:
        InputError: If an option is out of range.
    """
    return PolicyGradient("gspo", "clip", "sequence_mean", ratio="sequence_mean", **locals())


def cispo(
    *,
    epsilon_high: float = 5.0,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    scale_rewards: str = "group",
    normaliser: float | None = None,
) -> PolicyGradient:
    """Return CISPO: REINFORCE weighted by the detached ratio, which is capped at `epsilon_high` (the cap itself).

    arXiv 2506.13585; 5.0 is the cap of arXiv 2510.13786.

    Raises:
        InputError: If an option is out of range.
    """
    return PolicyGradient("cispo", "capped", "token_mean", **locals())


#: The losses by name: what a variant may be built on.
BASES: dict[str, Callable[..., PolicyGradient]] = {
    factory.__name__: factory for factory in (reinforce, rloo, grpo, bnpo, dr_grpo, dapo, gspo, cispo)
}
