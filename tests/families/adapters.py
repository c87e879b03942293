"""Adapters of many kinds, as peft makes them, on a dense model and on a mixture of experts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.cases.models import seeded
from tests.families.building import ASKED, NO_FORWARD_MODE, built, cast
from tests.families.table import FAMILIES


@dataclass(frozen=True)
class Adapter:
    """One kind of adapter: how it is made, and why it is here."""

    name: str
    kind: str  #: peft's name of its configuration
    why: str  #: what this one does that others do not
    config: Mapping[str, Any] = field(default_factory=dict)
    base: str = "qwen2"  #: the family that is adapted
    quick: bool = False  #: whether every run of the tests has it
    refused: Mapping[str, str] = field(default_factory=dict)  #: checks that are refused, with words of the sentence

    def build(self, dtype: torch.dtype) -> nn.Module:
        """Return the adapted model, every leaf that trains away from where it starts, which is often zero."""
        import peft

        make: Callable[..., Any] = getattr(peft, self.kind)
        with warnings.catch_warnings(), seeded(2):
            warnings.simplefilter("ignore")  # of tied layers, of what peft would rather have named
            base = built(FAMILIES[self.base])
            adapted = peft.get_peft_model(base, make(task_type="CAUSAL_LM", **self.config))
            with torch.no_grad():
                for leaf in adapted.parameters():
                    if leaf.requires_grad:
                        leaf.add_(0.1 * torch.randn(leaf.shape))
        cast(base, dtype)
        return adapted.to(dtype)


ATTENTION = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
QUERIES = {"r": 2, "target_modules": ["q_proj"]}

#: Virtual tokens have logits of their own.
LONGER_ROWS = dict.fromkeys(ASKED, "for ids of shape (1, 2); expected logits [B, L, V]")

ADAPTERS: dict[str, Adapter] = {
    adapter.name: adapter
    for adapter in (
        Adapter("LoRA", "LoraConfig", "the plain case, with dropout", {**ATTENTION, "lora_dropout": 0.3}, quick=True),
        Adapter("DoRA", "LoraConfig", "norms of the adapted weights", {**ATTENTION, "use_dora": True}, quick=True),
        Adapter(
            "rsLoRA",
            "LoraConfig",
            "ranks and scales by layer",
            {
                **ATTENTION,
                "use_rslora": True,
                "rank_pattern": {"layers.1.self_attn.q_proj": 3},
                "alpha_pattern": {"v_proj": 5},
            },
        ),
        Adapter("LoRA with biases", "LoraConfig", "a bias on the second factor", {**QUERIES, "lora_bias": True}),
        Adapter("LoRA on all layers", "LoraConfig", "every linear layer", {"r": 2, "target_modules": "all-linear"}),
        Adapter(
            "LoRA on embeddings and head",
            "LoraConfig",
            "one weight, adapted twice",
            {"r": 2, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
            base="qwen2, tied",
        ),
        Adapter(
            "LoRA with a head",
            "LoraConfig",
            "a head that is trained whole",
            {**QUERIES, "modules_to_save": ["lm_head"]},
            base="qwen2, tied",
            quick=True,
        ),
        Adapter(
            "LoRA with embeddings and head",
            "LoraConfig",
            "both trained whole",
            {**QUERIES, "modules_to_save": ["embed_tokens", "lm_head"]},
            base="qwen2, tied",
        ),
        Adapter(
            "LoRA with tokens",
            "LoraConfig",
            "a few rows of the embeddings",
            {**QUERIES, "trainable_token_indices": {"embed_tokens": [3, 5, 7]}},
        ),
        Adapter(
            "LoRA with repeated layers",
            "LoraConfig",
            "layers that share their weights",
            {**QUERIES, "layer_replication": [[0, 2], [1, 2]]},
            refused=dict.fromkeys(ASKED, "cannot be run on token ids alone"),
        ),
        Adapter("LoRA on a mixture", "LoraConfig", "attention alone", ATTENTION, base="qwen3_moe"),
        Adapter(
            "LoRA on all layers of a mixture",
            "LoraConfig",
            "routers and experts",
            {"r": 2, "target_modules": "all-linear"},
            base="qwen3_moe",
            refused=NO_FORWARD_MODE,
        ),
        Adapter(
            "LoRA on experts",
            "LoraConfig",
            "parameters that are no layer of their own",
            {**QUERIES, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
            base="qwen3_moe",
            quick=True,
            refused=NO_FORWARD_MODE,
        ),
        Adapter(
            "LoRA on experts with biases",
            "LoraConfig",
            "as recipes for gpt-oss have it",
            {**QUERIES, "target_parameters": ["mlp.experts.gate_up_proj"]},
            base="gpt_oss",
            refused=NO_FORWARD_MODE,
        ),
        Adapter(
            "IA³",
            "IA3Config",
            "scales of activations",
            {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []},
        ),
        Adapter(
            "AdaLoRA",
            "AdaLoraConfig",
            "singular values",
            {"target_modules": ["q_proj"], "total_step": 10, "init_r": 2, "target_r": 1},
        ),
        Adapter("VeRA", "VeraConfig", "random factors that all layers share", QUERIES),
        Adapter("OFT", "OFTConfig", "rotations", {"target_modules": ["q_proj"], "oft_block_size": 4}),
        Adapter(
            "LoHa",
            "LoHaConfig",
            "products of factors, with a derivative of their own",
            QUERIES,
            refused=NO_FORWARD_MODE,
        ),
        Adapter("LoKr", "LoKrConfig", "Kronecker products", QUERIES),
        Adapter(
            "prompt tuning",
            "PromptTuningConfig",
            "tokens before the prompt",
            {"num_virtual_tokens": 3},
            quick=True,
            refused=LONGER_ROWS,
        ),
        Adapter("prefix tuning", "PrefixTuningConfig", "keys and values before the prompt", {"num_virtual_tokens": 3}),
        Adapter(
            "p-tuning",
            "PromptEncoderConfig",
            "tokens before the prompt, from a network",
            {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
            refused=LONGER_ROWS,
        ),
    )
}
