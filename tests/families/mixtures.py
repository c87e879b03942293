"""Mixtures of experts: a router picks a few of them for every token, and its pick is no differentiable function."""

from __future__ import annotations

from tests.families.building import Family
from tests.families.dense import ALTERNATING

#: Keys and values through a bottleneck, as DeepSeek has them, with one dense layer before the mixtures.
LATENT = {"head_dim": 8, "num_key_value_heads": 4, "first_k_dense_replace": 1}

MIXTURES = (
    Family("mixtral", "mixtral", "the plain case", {"sliding_window": None}),
    Family("qwen2_moe", "qwen2_moe", "an expert that all tokens share"),
    Family("qwen3_moe", "qwen3_moe", "gates that sum to 1", {"norm_topk_prob": True}, quick=True),
    Family("olmoe", "olmoe", "gates that do not"),
    Family("phimoe", "phimoe", "a router with a derivative of its own"),
    Family("gpt_oss", "gpt_oss", "sinks in attention; experts with biases", ALTERNATING),
    Family(
        "llama4_text",
        "llama4_text",
        "gates before the experts, attention by chunks",
        {
            "attention_chunk_size": 4,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 1,
            "no_rope_layers": [1, 0],
            "layer_types": ["chunked_attention", "full_attention"],
        },
    ),
    Family("deepseek_v2", "deepseek_v2", "keys and values through a bottleneck", LATENT),
    Family("deepseek_v3", "deepseek_v3", "experts by groups", {**LATENT, "n_group": 2}),
    Family("deepseek_v32", "deepseek_v32", "keys that an indexer picks", LATENT),
    Family("glm4_moe", "glm4_moe", "sigmoid gates", {"first_k_dense_replace": 1}),
    Family("glm4_moe_lite", "glm4_moe_lite", "the same through a bottleneck", LATENT),
    Family("granitemoe", "granitemoe", "experts as one matrix, logits scaled", {"logits_scaling": 2.0}),
    Family("minimax_m2", "minimax_m2", "sigmoid gates, norms of queries and keys"),
    Family(
        "ernie4_5_moe",
        "ernie4_5_moe",
        "mixtures in some layers",
        {"moe_layer_start_index": 1, "moe_layer_end_index": -1},
    ),
    Family("hunyuan_v1_moe", "hunyuan_v1_moe", "an expert that all tokens share"),
    Family("dots1", "dots1", "the same behind a dense layer", {"first_k_dense_replace": 1}),
    Family("afmoe", "afmoe", "gated attention"),
    Family("flex_olmo", "flex_olmo", "norms after the layers"),
    Family(
        "longcat_flash",
        "longcat_flash",
        "experts that do nothing",
        {"num_layers": 2, "head_dim": 8, "num_key_value_heads": 4, "zero_expert_num": 1},
    ),
    Family("jetmoe", "jetmoe", "experts in attention"),
)
