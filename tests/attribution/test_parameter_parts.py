"""What leaves' names say: every leaf of real models and adapters lands where it belongs; rows of leaves sum."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import funcprobe as fp
from funcprobe import tree
from funcprobe.attribution.parameter_parts import (
    LeafPart,
    kind_label,
    layer_label,
    leaf_parts,
    pair_label,
    read_name,
    rolled_up,
)
from tests.cases import models
from tests.cases import trees as cases
from tests.cases.attributions import Stepped

BARE = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL = {**BARE, "intermediate_size": 24}
GROUPED = {**SMALL, "num_key_value_heads": 2}
UNTIED = {"tie_word_embeddings": False}

#: The last words of modules' names by kind, in three ways of naming; `norm` is every other module with a name of one.
#: Written from the models' own code, not from funcprobe's patterns.
LLAMA = {
    "embedding": {"embed_tokens"},
    "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj"},
}
GPT2 = {"embedding": {"wte", "wpe"}, "attention": {"attn.c_attn", "attn.c_proj"}, "mlp": {"mlp.c_fc", "mlp.c_proj"}}
NEOX = {"mlp": {"dense_h_to_4h", "dense_4h_to_h"}}
HEAD = {"head": {"lm_head", "embed_out"}}
FALCON = {**NEOX, "embedding": {"word_embeddings"}, "attention": {"query_key_value", "self_attention.dense"}}

#: Configurations of transformers by class, and where their leaves belong.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, set[str]]]] = {
    "GPT2Config": ({"vocab_size": 32, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}, GPT2),
    "Qwen2Config": ({**GROUPED, **UNTIED}, {**LLAMA, **HEAD}),
    "LlamaConfig": (GROUPED, {**LLAMA, **HEAD}),
    "Gemma2Config": ({**GROUPED, "head_dim": 4}, LLAMA),
    "Gemma3TextConfig": ({**GROUPED, "head_dim": 4}, LLAMA),
    "MixtralConfig": ({**GROUPED, "num_local_experts": 2}, {**LLAMA, **HEAD, "mlp": {"gate", "experts"}}),
    "Qwen2MoeConfig": (
        {**GROUPED, "num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
        {**LLAMA, **HEAD, "mlp": {"gate", "experts", *LLAMA["mlp"], "shared_expert_gate"}},
    ),
    "PhiConfig": (
        SMALL,
        {**LLAMA, **HEAD, "attention": {"q_proj", "k_proj", "v_proj", "self_attn.dense"}, "mlp": {"fc1", "fc2"}},
    ),
    "OPTConfig": (
        {**BARE, "ffn_dim": 24, "max_position_embeddings": 32, "word_embed_proj_dim": 8},
        {
            "embedding": {"embed_tokens", "embed_positions"},
            "attention": {"q_proj", "k_proj", "v_proj", "out_proj"},
            "mlp": {"fc1", "fc2"},
            "other": {"project_in", "project_out"},
        },
    ),
    "GPTNeoXConfig": (
        SMALL,
        {**NEOX, **HEAD, "embedding": {"embed_in"}, "attention": {"query_key_value", "attention.dense"}},
    ),
    "FalconConfig": (BARE, FALCON),
    "BloomConfig": ({"vocab_size": 32, "hidden_size": 16, "n_layer": 3, "n_head": 4}, FALCON),
}


@functools.cache
def names_of(config: str) -> tuple[str, ...]:
    """Return the names of a model's leaves, which are made on the meta device: nothing is computed."""
    import transformers

    made = getattr(transformers, config)(**FAMILIES[config][0], pad_token_id=0)
    with torch.device("meta"):
        return tuple(n for n, _ in transformers.AutoModelForCausalLM.from_config(made).named_parameters())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("config", FAMILIES)
def test_every_leaf_of_a_family_lands_in_its_kind_and_layer(config: str, prefix: str) -> None:
    endings, seen, layers = FAMILIES[config][1], set(), {}
    for name in names_of(config):
        module = name.removesuffix(".weight").removesuffix(".bias")
        module = module if module != name else name.rpartition(".")[0]
        last = module.rpartition(".")[2]
        is_norm = "norm" in last or last.startswith("ln")
        expected = {k for k, ends in endings.items() if any(f".{module}".endswith(f".{e}") for e in ends)}
        found = read_name(prefix + name)
        assert (found.kind, found.module, found.adapter) == ("norm" if is_norm else next(iter(expected)), module, "")
        assert is_norm or len(expected) == 1, name
        numbers = [int(word) for word in name.split(".") if word.isdigit()]
        assert found.layer == (numbers[0] if numbers else None), name
        seen.add(found.kind)
        layers.setdefault(layer_label(found), set()).add(found.kind)
    assert seen == {*endings, "norm"}
    assert {"layer 0", "layer 1", "layer 2"} <= layers.keys()
    for k in range(3):
        assert layers[f"layer {k}"] == {"attention", "mlp", "norm"}, k
    assert layers["final norm"] == {"norm"}
    assert ("embedding norm" in layers) == (config == "BloomConfig")


def adapted(**options: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    with models.seeded(7), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft 0.21 calls a deprecated transformers property, and says of tied weights
        return get_peft_model(models.qwen2(tied=False), LoraConfig(r=2, **options))


#: LoRA configurations, and what every trained leaf says: (module, kind, adapter), of layer 0 and outside of layers.
ADAPTERS: dict[str, tuple[dict[str, Any], set[tuple[str, str, str]]]] = {
    "lora": (
        {"target_modules": ["q_proj", "down_proj"]},
        {
            ("model.layers.0.self_attn.q_proj", "attention", "A"),
            ("model.layers.0.self_attn.q_proj", "attention", "B"),
            ("model.layers.0.mlp.down_proj", "mlp", "A"),
            ("model.layers.0.mlp.down_proj", "mlp", "B"),
        },
    ),
    "dora": (
        {"target_modules": ["v_proj"], "use_dora": True},
        {("model.layers.0.self_attn.v_proj", "attention", which) for which in ("A", "B", "magnitude")},
    ),
    "embeddings and head": (
        {"target_modules": ["embed_tokens", "lm_head"]},
        {
            ("model.embed_tokens", "embedding", "embedding A"),
            ("model.embed_tokens", "embedding", "embedding B"),
            ("lm_head", "head", "A"),
            ("lm_head", "head", "B"),
        },
    ),
    "modules to save": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
        {
            ("model.layers.0.self_attn.q_proj", "attention", "A"),
            ("model.layers.0.self_attn.q_proj", "attention", "B"),
            ("model.layers.0.input_layernorm", "norm", ""),
            ("model.layers.0.post_attention_layernorm", "norm", ""),
            ("model.norm", "norm", ""),
            ("lm_head", "head", ""),
        },
    ),
    "biases": (
        {"target_modules": ["q_proj"], "lora_bias": True, "bias": "lora_only"},
        {
            ("model.layers.0.self_attn.q_proj", "attention", ""),
            ("model.layers.0.self_attn.q_proj", "attention", "A"),
            ("model.layers.0.self_attn.q_proj", "attention", "B"),
        },
    ),
    "tokens": (
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
        {
            ("model.embed_tokens", "embedding", ""),
            ("model.layers.0.self_attn.q_proj", "attention", "A"),
            ("model.layers.0.self_attn.q_proj", "attention", "B"),
        },
    ),
}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("case", ADAPTERS)
def test_every_leaf_of_an_adapter_lands_with_the_module_that_it_adapts(case: str, prefix: str) -> None:
    options, expected = ADAPTERS[case]
    module = adapted(**options)
    trained = [read_name(prefix + n) for n, p in module.named_parameters() if p.requires_grad]
    assert {(x.module, x.kind, x.adapter) for x in trained if x.layer in (0, None)} == expected
    # a saved copy is its module, and the module it was copied from goes by the same words
    frozen = {read_name(n).module for n, p in module.named_parameters() if not p.requires_grad}
    assert {x.module for x in trained if x.kind != "embedding"} <= frozen
    for x in trained:
        assert (pair_label(x) == x.module) == (x.adapter != "")
        assert kind_label(x) == (f"{x.kind} (LoRA {x.adapter})" if x.adapter else x.kind)


def test_names_of_other_wrappers_and_of_plain_modules() -> None:
    assert read_name("lm_head.modules_to_save.my-run.weight").module == "lm_head"
    assert read_name("net.0.weight") == ("net.0", 0, "other", "")
    assert read_name("weight") == ("", None, "other", "")
    assert {n: read_name(n).kind for n, _ in models.two_lines().named_parameters()} == {
        "embed.weight": "embedding",
        "head.weight": "head",
        "head.bias": "head",
    }
    assert read_name("embed_out.weight").kind == "head"  # as older checkpoints of GPT-NeoX call it
    # a word that holds another word is another word
    assert read_name("transformer.h.0.planner.weight").kind == "other"
    assert read_name("model.header.weight").kind == "other"


def test_leaf_parts_by_hand() -> None:
    covector, update, gradient, direction = (cases.leaves(torch.float64, seed) for seed in range(4))
    offsets = {"momentum": dict.fromkeys(covector, 0.25), "weight decay": dict.fromkeys(covector, -0.5)}
    for part in leaf_parts(covector, update, gradient, direction, offsets):
        n = part.name
        assert part.contribution == pytest.approx(float((covector[n] * update[n]).sum()), rel=1e-13)
        assert part.gradient == pytest.approx(float((direction[n] * gradient[n]).sum()), rel=1e-13)
        assert (part.momentum, part.decay) == (0.25, -0.5)
        assert part.rest == pytest.approx(part.contribution - part.gradient + 0.25, rel=1e-13)
        assert (part.norm, part.size) == (pytest.approx(float(update[n].norm())), update[n].numel())
    bare = leaf_parts(covector, update, gradient, direction, {})
    assert all(part.momentum == part.decay == 0.0 for part in bare)
    with pytest.raises(fp.errors.InputError):
        leaf_parts(covector, {n: u for n, u in update.items() if n != "head"}, gradient, direction, {})


def test_rows_sum_what_they_hold_and_leave_out_what_has_none() -> None:
    parts = [LeafPart(f"layers.{k // 2}.mlp.{k}", 1.0 + k, 0.1 * k, 0.2, -0.3, 3.0, 5) for k in range(4)]
    rows = rolled_up(parts, lambda name: None if name.layer == 1 else "kept")
    assert list(rows) == ["kept"]
    row = rows["kept"]
    assert (row.contribution, row.size, row.norm) == (3.0, 10, math.hypot(3.0, 3.0))
    assert (row.gradient, row.momentum, row.decay) == (pytest.approx(0.1), 0.4, -0.6)


@pytest.mark.parametrize("model", ["gpt2", "qwen2, lora, float32"])
def test_tables_of_parameters_sum_to_the_whole(model: str) -> None:
    found = Stepped(model).attribute()
    whole = math.fsum(part.contribution for part in found.leaves)
    size = math.fsum(abs(part.contribution) for part in found.leaves)
    update = found.columns("parameters")
    assert update["name"] == [part.name for part in found.leaves]
    for table in ("parameters", "layers", "kinds", "modules", "pairs"):
        columns = found.columns(table)
        if table == "pairs" and model == "gpt2":
            assert columns["pair"] == []
            continue
        # sums of at most some forty leaves in another order
        assert abs(math.fsum(columns["contribution"]) - whole) <= 1e-14 * size, table
        assert sum(columns["size"]) == sum(part.size for part in found.leaves)
        norms = math.sqrt(sum(n * n for n in columns["norm"]))
        assert norms == pytest.approx(found.probe.outcome.delta_norm, rel=1e-6)
        for field in ("gradient", "momentum", "decay"):
            own = math.fsum(getattr(part, field) for part in found.leaves)
            assert abs(math.fsum(columns[field]) - own) <= 1e-14 * size, (table, field)
    rows = {
        "gpt2": ["embedding", "layer 0", "layer 1", "final norm"],
        "qwen2, lora, float32": ["layer 0", "layer 1", "head"],
    }
    assert found.columns("layers")["layer"] == rows[model]
    if model == "qwen2, lora, float32":
        pairs = found.columns("pairs")["pair"]
        assert len(pairs) == len(found.leaves) / 2
        assert "lm_head" in pairs
        assert set(found.columns("kinds")["kind"]) == {f"{k} (LoRA {ab})" for k in ("attention", "head") for ab in "AB"}
    assert tree.size(Stepped(model).params) == sum(update["size"])
