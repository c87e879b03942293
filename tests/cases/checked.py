"""A module run by itself, row by row, which its copy is held against."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import funcprobe as fp
from tests.cases import models

V = models.VOCABULARY


def alone(module: nn.Module, rollouts: fp.Rollouts) -> Tensor:
    """Return the log-probabilities [B, T] that the module itself gives every row by itself, without padding."""
    module.eval()
    found = torch.zeros(rollouts.completion_mask.shape, dtype=torch.float64)
    for row in range(len(rollouts.ids)):
        start, length = int(rollouts.prompt_lengths[row]), int(rollouts.attention_mask[row].sum())
        with torch.no_grad():
            out = module(rollouts.ids[row : row + 1, :length])
        log_probs = (getattr(out, "logits", out)[0].double() / rollouts.temperature[row]).log_softmax(-1)
        for t in range(length - start):
            found[row, t] = log_probs[start + t - 1, rollouts.ids[row, start + t]]
    return found
