"""Small real policies and batches that the suites share: asymmetric, so that a sign or an index error shows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe.types import Params

VOCABULARY = 7


class TwoLines(nn.Module):
    """A Markov policy in two lines."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 5), nn.Linear(5, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


def gpt2(
    dtype: torch.dtype = torch.float64,
    vocabulary: int = VOCABULARY,
    attention: str = "sdpa",
    dropout: float = 0.0,
    *,
    seed: int = 5,
    **options: Any,
) -> nn.Module:
    """Return a GPT-2: no float32 casts inside, so a float64 one is a float64 reference."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = {
        "vocab_size": vocabulary,
        "n_positions": 64,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "attn_implementation": attention,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
    }
    with seeded(seed):
        return GPT2LMHeadModel(GPT2Config(**{**config, **options})).to(dtype)


def padded(*, tied: bool) -> nn.Module:
    """Return a GPT-2 whose embedding has a padding row, the token 2, which prompts and completions read."""
    module = gpt2()
    module.get_input_embeddings().padding_idx = 2
    if not tied:
        module.lm_head.weight = nn.Parameter(module.lm_head.weight.detach().clone())
    return module


def qwen2(dtype: torch.dtype = torch.float32, *, tied: bool = True, seed: int = 6, **options: Any) -> nn.Module:
    """Return a Qwen2 with tied or separate embeddings."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
    }
    with seeded(seed):
        return Qwen2ForCausalLM(Qwen2Config(**{**config, **options})).to(dtype)


def adapted(base: nn.Module, dtype: torch.dtype, seed: int, **options: Any) -> nn.Module:
    """Return a model with LoRA of rank 2 on it, both factors away from zero."""
    from peft import LoraConfig, get_peft_model

    with seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft 0.21 calls a deprecated transformers property
        model = get_peft_model(base, LoraConfig(r=2, **options))
        for name, leaf in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(leaf, std=0.3)
        return model.to(dtype)


def lora(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Module:
    """Return a Qwen2 with LoRA on attention and on the head."""
    targets = ["q_proj", "v_proj", "lm_head"]
    return adapted(qwen2(dtype, tied=False), dtype, seed=7, lora_dropout=dropout, target_modules=targets)


def two_lines(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return the two-line module, seeded."""
    with seeded(8):
        return TwoLines().to(dtype)


def rollouts(n: int = 9, seed: int = 0, *, vocabulary: int = VOCABULARY, holes: bool = False) -> fp.Rollouts:
    """Return ragged rollouts of three prompts' groups, with rewards; with `holes`, some tokens are a tool's."""
    g = torch.Generator().manual_seed(seed)
    prompts, completions, masks = [], [], []
    for row in range(n):
        prompts.append([1 + row % 3, *([2] * (row % 3)), 3])
        length = int(torch.randint(2, 7, (), generator=g))
        completions.append(torch.randint(vocabulary, (length,), generator=g).tolist())
        masks.append([not (holes and t == 1 and length > 3) for t in range(length)])
    rewards = torch.randn(n, generator=g, dtype=torch.float64).tolist()
    return fp.rollouts_from_lists(
        prompts, completions, temperature=0.8, rewards=rewards, completion_masks=masks, vocab_size=vocabulary
    )


def direction(params: Params, scale: float = 1e-2, seed: int = 3) -> Params:
    """Return a random direction with the keys of params."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype) for name, p in params.items()
    }


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator for a block and restore it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class Experts(nn.Module):
    """Three experts, each of which sees the tokens whose id is k modulo 3, so that it is plain which are reached."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.experts = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for k, expert in enumerate(self.experts):
            hit = ids % 3 == k
            if bool(hit.any()):
                x = x + torch.where(hit[..., None], torch.tanh(expert(x)), 0.0)
        return self.head(x)


def experts(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return the module with three experts, seeded."""
    with seeded(9):
        return Experts().to(dtype)


def reaching(ids: list[int], n: int = 6, seed: int = 0) -> fp.Rollouts:
    """Return rollouts of three prompts' groups, of these token ids alone, with advantages."""
    g = torch.Generator().manual_seed(seed)
    drawn = torch.tensor(ids)[torch.randint(len(ids), (n, 4), generator=g)].tolist()
    advantages = torch.randn(n, generator=g, dtype=torch.float64).tolist()
    prompts = [[ids[row % 3 % len(ids)]] for row in range(n)]
    return fp.rollouts_from_lists(prompts, drawn, temperature=1.0, advantages=advantages)


def in_accelerates_bfloat16(module: nn.Module) -> nn.Module:
    """Return a module as accelerate prepares it for bfloat16, whatever else the process has had it prepare.

    Its settings belong to the process: where a trainer of another test has made them, others are refused.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    settings = AcceleratorState._shared_state
    kept = dict(settings)
    settings.clear()
    try:
        return Accelerator(mixed_precision="bf16", cpu=True).prepare(module)
    finally:
        settings.clear()
        settings.update(kept)
