"""Objectives: policy-gradient losses and their variants, as pure functions of scores; with their names."""

from funcprobe.objectives.losses import bnpo, cispo, dapo, dr_grpo, grpo, gspo, reinforce, rloo
from funcprobe.objectives.variants import clip_cov, drop_negatives, entropy_bonus, kl_cov, top_entropy_quantile

__all__ = [
    "bnpo",
    "cispo",
    "clip_cov",
    "dapo",
    "dr_grpo",
    "drop_negatives",
    "entropy_bonus",
    "grpo",
    "gspo",
    "kl_cov",
    "reinforce",
    "rloo",
    "top_entropy_quantile",
]
