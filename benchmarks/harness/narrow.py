"""A float32 GPT-2 small enough to be held against a float64 copy of itself, and rollouts that it drew."""

from __future__ import annotations

import torch
from torch import nn

import funcprobe as fp
from funcprobe.types import Params, Rollouts


def gpt2(hidden: int, layers: int) -> nn.Module:
    """Return the model: the same numbers every time."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=512,
        n_positions=64,
        n_embd=hidden,
        n_layer=layers,
        n_head=4,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module: nn.Module = GPT2LMHeadModel(config)
    return module.float()


def batches(policy: fp.Policy, params: Params, prompts: int) -> tuple[Rollouts, Rollouts]:
    """Return E and U: four completions of every other prompt, rewarded by how many tokens they do not repeat."""
    draw = torch.Generator().manual_seed(1)
    every = [[7 + k, 3, 11 + 2 * k] for k in range(2 * prompts)]

    def reward(prompts: list[list[int]], completions: list[list[int]]) -> list[float]:
        return [float(len(set(completion))) for completion in completions]

    def drawn(some: list[list[int]]) -> Rollouts:
        return fp.sample(
            policy,
            params,
            some,
            group_size=4,
            generator=draw,
            temperature=1.0,
            max_new_tokens=24,
            eos_id=0,
            reward=reward,
        )

    return drawn(every[0::2]), drawn(every[1::2])
