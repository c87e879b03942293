"""From a line of the table to a module: a tiny configuration of a real architecture, with random weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from tests.cases.models import seeded

VOCABULARY = 96

#: The sizes of every architecture, under all the names that architectures have for them; each takes those it knows.
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "ffn_dim", "d_ff", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "kv_channels", "d_kv", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    "qk_head_dim": 16,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("sliding_window", "attention_window_size"), 4),  # shorter than the rows
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout"), 0.1),
    "pad_token_id": 0,
    "eos_token_id": 0,
    "bos_token_id": 1,
}

#: The sizes of every vision tower.
VISION_SIZES: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "projection_dim", "embed_dim"), 16),
    **dict.fromkeys(("depth", "num_hidden_layers"), 1),
    **dict.fromkeys(("num_heads", "num_attention_heads"), 2),
    "out_hidden_size": 32,
    "image_size": 28,
    "patch_size": 14,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
}

#: What a model is not asked where it cannot be a policy at all: everything but to be left alone.
ASKED = ("score", "forward = reverse", "first order", "second order", "attribution", "sample", "bfloat16", "float32")

#: A model that an operation of its own keeps from forward mode: reverse mode has its first order all the same.
NO_FORWARD_MODE = dict.fromkeys(
    ("forward = reverse", "second order", "attribution"), "has an operation without a forward derivative"
)

Auto = Literal["CausalLM", "ImageTextToText", "Seq2SeqLM", "MaskedLM"]


@dataclass(frozen=True)
class Family:
    """One architecture: how it is built, and why it is here."""

    name: str
    model_type: str  #: transformers' name of the architecture
    why: str  #: what this one does that others do not
    config: Mapping[str, Any] = field(default_factory=dict)  #: beyond `SIZES`; ... where one is not to be given
    vision: Mapping[str, Any] = field(default_factory=dict)  #: beyond `VISION_SIZES`
    auto: Auto = "CausalLM"  #: which of transformers' classes
    quick: bool = False  #: whether every run of the tests has it
    refused: Mapping[str, str] = field(default_factory=dict)  #: checks that are refused, with words of the sentence

    def build(self, dtype: torch.dtype) -> nn.Module:
        """Return the model: weights large enough that attention, gates and routers decide something."""
        return cast(built(self), dtype)


def built(family: Family) -> nn.Module:
    """Return the family's model with random weights, in float32."""
    import transformers

    auto = getattr(transformers, f"AutoModelFor{family.auto}")
    with warnings.catch_warnings(), seeded(0):
        warnings.simplefilter("ignore")  # what a tiny configuration lacks is no concern here
        module = auto.from_config(configuration(family))
    module.generation_config = None  # not part of a forward pass, and it warns of token ids
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, leaf in module.named_parameters():
            if leaf.ndim >= 2 and not any(part in name for part in ("norm", "A_log", "conv")):
                leaf.normal_(std=0.15, generator=draw)
            elif "bias" in name or not bool(torch.isfinite(leaf).all()):  # some are left as they lay in memory
                leaf.normal_(std=0.05, generator=draw)
    return module


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the model in a dtype, in the kernels that transformers chose where those have it."""
    if dtype == torch.float64 and module._can_set_experts_implementation():
        module.set_experts_implementation("eager")  # the grouped products have no float64
    return module.to(dtype)


def configuration(family: Family) -> Any:
    """Return the family's configuration at the sizes of this table."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family.model_type]
    default = kind()
    if family.auto != "ImageTextToText":
        given = {**_known(default, SIZES), **family.config}
        return kind(**{name: size for name, size in given.items() if size is not ...})
    text = {**_known(default.text_config, SIZES), **family.config}
    vision = {**_known(default.vision_config, VISION_SIZES), **family.vision}
    types = {"text_config": default.text_config.model_type, "vision_config": default.vision_config.model_type}
    return kind(
        text_config={"model_type": types["text_config"], **text},
        vision_config={"model_type": types["vision_config"], **vision},
    )


def _known(config: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the sizes that a configuration has, and lets be set."""
    return {name: size for name, size in sizes.items() if _can_be_set(config, name)}


def _can_be_set(config: Any, name: str) -> bool:
    if isinstance(declared := getattr(type(config), name, None), property) and declared.fset is None:
        return False
    try:
        return hasattr(config, name)
    except RuntimeError:  # where layers differ in it, there is no one value to read
        return True
