"""Rows that grow by a token a step while they are sampled: by a key-value cache, or run whole."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from funcprobe.policy.module import Policy
from funcprobe.types import Params


class CachedRows:
    """Left-padded prompts with a key-value cache: a step runs the newest token alone."""

    def __init__(self, policy: Policy, params: Params, prompts: list[list[int]]) -> None:
        assert policy.decode is not None
        self.decode, self.params, self.cache = policy.decode, params, None
        self.ids = _pad(prompts, "left", policy.device)
        self.mask = _pad([[1] * len(prompt) for prompt in prompts], "left", policy.device).bool()

    def last_hidden(self) -> Tensor:
        """Return the features [n, D] that predict the next token of every row."""
        hidden, self.cache = self.decode(self.params, self.ids, self.mask, self.cache)
        return hidden

    def append(self, token: Tensor) -> None:
        """Add one token [n] to the rows."""
        self.ids = token.unsqueeze(1)
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=True)


class WholeRows:
    """Right-padded rows, run from their first token at every step, as any module can."""

    def __init__(self, policy: Policy, params: Params, prompts: list[list[int]], room: int) -> None:
        self.features, self.params = policy.features, params
        self.ids = torch.nn.functional.pad(_pad(prompts, "right", policy.device), (0, room))
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=policy.device)
        self.rows = torch.arange(len(prompts), device=policy.device)

    def last_hidden(self) -> Tensor:
        """Return the features [n, D] that predict the next token of every row."""
        ids = self.ids[:, : int(self.lengths.max())]
        mask = torch.arange(ids.shape[1], device=ids.device) < self.lengths.unsqueeze(1)
        return self.features(self.params, ids, mask)[self.rows, self.lengths - 1]

    def append(self, token: Tensor) -> None:
        """Add one token [n] to the rows."""
        self.ids[self.rows, self.lengths] = token
        self.lengths = self.lengths + 1


#: Either.
GrowingRows = CachedRows | WholeRows


def start(policy: Policy, params: Params, prompts: list[list[int]], room: int) -> GrowingRows:
    """Return the prompts as rows that can grow by `room` tokens: by a cache, where the policy has one."""
    if policy.decode is None:
        return WholeRows(policy, params, prompts, room)
    return CachedRows(policy, params, prompts)


def _pad(rows: list[list[int]], side: str, device: torch.device) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side=side).to(device)
