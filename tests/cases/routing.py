"""Policies that send tokens elsewhere: made by hand, so that every jump is known, and as transformers loads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe.types import Params
from tests.cases import models

V = models.VOCABULARY


class Gated(nn.Module):
    """A Markov policy whose token state goes through those of four experts that a trainable gate chooses."""

    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.gate, self.head = nn.Embedding(V, 5), nn.Linear(5, 4), nn.Linear(5, V)
        self.experts, self.choose = nn.Parameter(torch.randn(4, 5)), choose

    def forward(self, ids: Tensor) -> Tensor:
        state = torch.tanh(self.embed(ids))
        return self.head(state + self.choose(self.gate(state)) @ self.experts)


def top_one(gate: Tensor) -> Tensor:
    return nn.functional.one_hot(gate.argmax(-1), 4).to(gate.dtype)


def top_two(gate: Tensor) -> Tensor:
    values, chosen = gate.topk(2, dim=-1)
    return torch.zeros_like(gate).scatter(-1, chosen, values.softmax(-1))


def by_sorting(gate: Tensor) -> Tensor:
    chosen = gate.sort(dim=-1, descending=True).indices[..., :2]
    return nn.functional.one_hot(chosen, 4).sum(-2).to(gate.dtype)


def above_zero(gate: Tensor) -> Tensor:
    """Choose by a threshold, which no call gives away."""
    return (gate > 0).to(gate.dtype)


#: What chooses, and the experts that it takes of the gate's scores, as a slow oracle: sorted, in plain Python.
CHOOSERS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "argmax": (top_one, 1),
    "topk": (top_two, 2),
    "sort": (by_sorting, 2),
}


def gated(choose: Callable[[Tensor], Tensor], seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    with models.seeded(seed):
        return Gated(choose).to(dtype)


def experts_of(params: Params, ids: Tensor, count: int) -> list[set[int]]:
    """Return the experts that the gate of a `Gated` policy chooses for each token."""
    state = torch.tanh(params["embed.weight"][ids])
    scores = state @ params["gate.weight"].T + params["gate.bias"]
    return [set(sorted(range(4), key=lambda k, s=s: -s[k])[:count]) for s in scores.tolist()]


def seen(rollouts: fp.Rollouts) -> Tensor:
    """Return the ids of all tokens that a score depends on: all but the last of every row."""
    lengths = rollouts.attention_mask.sum(1).tolist()
    return torch.cat([row[: n - 1] for row, n in zip(rollouts.ids, lengths, strict=True)])


def mixture(name: str, dtype: torch.dtype = torch.float32, experts: str | None = None, **options: Any) -> nn.Module:
    """Return a tiny mixture of experts as transformers loads it, or with another implementation of its experts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64}
    routed = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    tokens = {"vocab_size": V, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    # no loss of the router's, which a run of TRL adds, and a probe warns of
    own = {**sizes, **heads, **routed, **tokens, "initializer_range": 0.3, "router_aux_loss_coef": 0.0, **options}
    config = AutoConfig.for_model(name, **own)
    with models.seeded(6):
        module = AutoModelForCausalLM.from_config(config).to(dtype)
    if experts is not None:
        module.set_experts_implementation(experts)
    return module


def near_tie(params: Params, token: int, count: int | None, offset: float) -> Params:
    """Return parameters at which a token is `offset` short of another expert (beyond it, if that is negative).

    `count` is how many experts the gate takes; None is the threshold at zero.
    """
    state = torch.tanh(params["embed.weight"][token])
    scores = (params["gate.weight"] @ state + params["gate.bias"]).tolist()
    order = sorted(range(4), key=lambda k: -scores[k])
    other = order[0 if count is None else count]
    to = 0.0 if count is None else scores[order[count - 1]]
    bias = params["gate.bias"].clone()
    bias[other] += to - scores[other] - offset
    return {**params, "gate.bias": bias}
