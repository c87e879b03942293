"""Every training loss by name: the eight losses of the field and the variants that preserve entropy.

| name | what it is |
|---|---|
| reinforce, rloo, grpo, bnpo, dr_grpo, dapo, gspo, cispo | losses under TRL's names: see `losses` |
| clip_cov, kl_cov, entropy_bonus, top_entropy_quantile, drop_negatives | one of those, changed: see `variants` |

Each is a `PolicyGradient`, whose docstring says how advantage, ratio and averaging meet.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from funcprobe.errors import InputError
from funcprobe.objectives.advantages import advantages
from funcprobe.objectives.losses import BASES, bnpo, cispo, dapo, dr_grpo, grpo, gspo, reinforce, rloo
from funcprobe.objectives.policy_gradient import AGGREGATIONS, PolicyGradient
from funcprobe.objectives.variants import (
    VARIANTS,
    clip_cov,
    drop_negatives,
    entropy_bonus,
    kl_cov,
    top_entropy_quantile,
)

__all__ = [
    "AGGREGATIONS",
    "BASES",
    "OBJECTIVES",
    "VARIANTS",
    "PolicyGradient",
    "advantages",
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
    "objective",
    "options_of",
    "reinforce",
    "rloo",
    "top_entropy_quantile",
]

#: Every objective by its name.
OBJECTIVES: dict[str, Callable[..., PolicyGradient]] = {**BASES, **VARIANTS}


def objective(name: str, **options: Any) -> PolicyGradient:
    """Return the objective of that name with those options: what a configuration file calls.

    The options of a variant are its own and, where `base` is a name, those of the base.

    Raises:
        InputError: If the name or an option is not known, or a value is out of range.

    Example:
        >>> objective("dapo", epsilon=0.1).epsilon_high
        0.28
        >>> objective("clip_cov", base="dapo", clip_cov_ratio=0.01, epsilon=0.1).name
        'clip_cov(dapo)'
    """
    if name not in OBJECTIVES:
        raise InputError(f"There is no objective named '{name}'; the objectives are {', '.join(OBJECTIVES)}.")
    base = options.get("base", "grpo")
    valid = options_of(name, base)
    if unknown := [option for option in options if option not in valid]:
        over = f" over '{base}'" if name in VARIANTS and isinstance(base, str) else ""
        raise InputError(f"'{name}'{over} has no option '{unknown[0]}'; its options are {', '.join(valid)}.")
    return OBJECTIVES[name](**options)


def options_of(name: str, base: object = "grpo") -> Mapping[str, inspect.Parameter]:
    """Return the options of an objective by name; those of a variant are its own and its base's.

    A base that is no name of a loss adds none: an objective that is already made has its options.
    """
    own = inspect.signature(OBJECTIVES[name]).parameters
    if name not in VARIANTS:
        return own
    inherited = inspect.signature(BASES[base]).parameters if isinstance(base, str) and base in BASES else {}
    return {**{option: p for option, p in own.items() if p.kind is not p.VAR_KEYWORD}, **inherited}
