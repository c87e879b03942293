"""Recurrences: state-space layers, linear attention, gated convolutions, alone and beside attention."""

from __future__ import annotations

from tests.families.building import ASKED, NO_FORWARD_MODE, Family

LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"]}
DELTA_RULE = {
    **LINEAR_THEN_FULL,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
STATE_SPACE = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
    "mamba_d_conv": 4,
}

HYBRIDS = (
    Family("mamba", "mamba", "a recurrence alone", {"state_size": 8, "time_step_rank": 4}, quick=True),
    Family(
        "mamba2",
        "mamba2",
        "a recurrence by chunks",
        {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
    ),
    Family("falcon_mamba", "falcon_mamba", "a recurrence with norms inside", {"state_size": 8, "time_step_rank": 4}),
    Family("falcon_h1", "falcon_h1", "attention beside a recurrence; the head asks the model for a scale", STATE_SPACE),
    Family(
        "qwen3_next",
        "qwen3_next",
        "the delta rule and attention, with experts",
        {**DELTA_RULE, "decoder_sparse_step": 1},
        quick=True,
    ),
    Family("qwen3_5", "qwen3_5_text", "the same without experts", DELTA_RULE),
    Family("qwen3_5_moe", "qwen3_5_moe_text", "the same with gated attention", DELTA_RULE),
    Family(
        "kimi_linear",
        "kimi_linear",
        "a delta rule with gates by channel",
        {**LINEAR_THEN_FULL, "num_key_value_heads": 4, "linear_head_dim": 8, "linear_num_heads": 4},
    ),
    Family("minimax", "minimax", "linear attention by blocks, with experts", {**LINEAR_THEN_FULL, "block_size": 4}),
    Family(
        "granitemoehybrid",
        "granitemoehybrid",
        "a recurrence, attention and experts",
        {**STATE_SPACE, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    ),
    Family("bamba", "bamba", "a recurrence and attention", {**STATE_SPACE, "attn_layer_indices": [1]}),
    Family(
        "nemotron_h",
        "nemotron_h",
        "one kind of layer after the other",
        {
            "layers_block_type": ["mamba", "attention", "moe"],
            "ssm_state_size": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "chunk_size": 4,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    Family(
        "jamba",
        "jamba",
        "a recurrence, attention and experts",
        {
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    Family(
        "zamba2",
        "zamba2",
        "one attention layer, shared by several",
        {
            "num_hidden_layers": 4,
            "mamba_d_state": 8,
            "mamba_headdim": 8,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "chunk_size": 4,
            "num_key_value_heads": 4,
            "attention_head_dim": 16,
            "attention_hidden_size": 64,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "hybrid_layer_ids": [1, 3],
            "num_mem_blocks": 1,
            "use_mamba_kernels": False,
        },
    ),
    Family("lfm2", "lfm2", "gated convolutions and attention", {"layer_types": ["conv", "full_attention"]}),
    Family(
        "lfm2_moe",
        "lfm2_moe",
        "the same with experts",
        {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
    Family(
        "recurrent_gemma",
        "recurrent_gemma",
        "a recurrence whose root has a derivative of its own",
        {"lru_width": 32, "block_types": ("recurrent", "attention")},
        quick=True,
        refused=NO_FORWARD_MODE,
    ),
    Family(
        "rwkv",
        "rwkv",
        "a recurrence that rescales its own weights in eval mode",
        {"attention_hidden_size": 32, "context_length": 64},
        refused=dict.fromkeys(ASKED, "writes to its parameter"),
    ),
)
