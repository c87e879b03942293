"""`P g`, the stateful system's stand-in for a step: no momentum, no weight decay, no new moments."""

from __future__ import annotations

import torch

from funcprobe.errors import InputError
from funcprobe.optimizers.closed_form import PureOptimizer
from funcprobe.types import Optimizer, OptState, Params


def preconditioned(gradient: Params, optimizer: Optimizer, opt_state: OptState) -> Params:
    """Return `P g = g / (√(v / (1 − β₂^t)) + ε)` for Adam and AdamW, and `g` itself for SGD, in float64.

    v and t are the state's before the step; β₂ and ε are those of each leaf's group. The gradient may be a sub-tree.

    Raises:
        InputError: If the optimizer is none of these, or a leaf has no second moment yet.
    """
    if not isinstance(optimizer, PureOptimizer):
        raise InputError("The path without a buffer knows SGD, Adam and AdamW; pass param_update_buf for any other.")
    if optimizer.cls is torch.optim.SGD:
        return {name: g.double() for name, g in gradient.items()}
    found: Params = {}
    for group in optimizer.groups:
        beta2, eps = group.hyperparameters["betas"][1], group.hyperparameters["eps"]
        for name in (n for n in gradient if group.names is None or n in group.names):
            if not opt_state[name]:
                raise InputError(f"'{name}' has never stepped, so it has no second moment; pass param_update_buf.")
            v, t = opt_state[name]["exp_avg_sq"].double(), float(opt_state[name]["step"])
            found[name] = gradient[name].double() / (torch.sqrt(v / (1 - beta2**t)) + eps)
    return {name: found[name] for name in gradient}
