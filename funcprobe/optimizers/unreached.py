"""Leaves without a gradient: an expert that no token reaches, an adapter that is not active, a value head.

A training loop leaves their `.grad` None, and torch.optim passes them over: no decay, no momentum, no step count. That
is another thing than a gradient of 0, under which momentum and decay go on. A gradient tree says so with None.
"""

from __future__ import annotations

import torch

from funcprobe.errors import InputError, listed
from funcprobe.types import Gradients, Params


def reached(gradient: Gradients) -> Params:
    """Return the sub-tree of the leaves that have a gradient.

    Example:
        >>> list(reached({"w": torch.ones(1), "unused": None}))
        ['w']
    """
    return {name: g for name, g in gradient.items() if g is not None}


def with_zeros(gradient: Gradients, params: Params) -> Params:
    """Return the derivative as a full tree: 0 at leaves without a gradient, which it is there."""
    return {name: torch.zeros_like(params[name]) if g is None else g for name, g in gradient.items()}


def check_reached(gradient: Gradients) -> None:
    """Check that some leaf has a gradient.

    Raises:
        InputError: If it is None at every leaf.
    """
    if gradient and all(g is None for g in gradient.values()):
        raise InputError(
            f"No leaf has a gradient ({listed(gradient)}): the loss depends on none of them, and there is no step to "
            "take. Train leaves that the scores depend on; under peft, of the active adapter."
        )
