"""All that a look at a module, or at a module and its optimizer, must leave as it was."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Return everything about a module that running it could change."""
    return {
        "state": {k: v.clone() for k, v in module.state_dict().items()},
        "training": [m.training for m in module.modules()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "rng": torch.get_rng_state(),
    }


def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that reading may not change, as bits, flags and addresses."""

    def bits(x: Any) -> Any:
        return (x.data_ptr(), x._version, x.detach().clone()) if isinstance(x, torch.Tensor) else copy.deepcopy(x)

    return {
        "leaves": [(n, id(p), bits(p), bits(p.grad), p.requires_grad) for n, p in model.named_parameters()],
        "buffers": [(n, id(b), bits(b)) for n, b in model.named_buffers()],
        "modes": [(n, m.training) for n, m in model.named_modules()],
        "hooks": [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()],
        "config": model.config.to_dict(),
        "state": [(id(p), [(k, bits(v)) for k, v in s.items()]) for p, s in optimizer.state.items()],
        "groups": [
            [(k, [id(p) for p in v] if k == "params" else bits(v)) for k, v in g.items()]
            for g in optimizer.param_groups
        ],
        "rng": torch.random.get_rng_state(),
    }
