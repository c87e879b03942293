"""What a run adds and a step has not: named by what modules hold, and by a padded row scored beside itself."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import funcprobe as fp
from funcprobe.policy.training_only import TrainingTerm, training_cautions, training_terms
from tests.cases import models

SMALL: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def made(kind: str, **options: Any) -> nn.Module:
    with models.seeded(1):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **options}))


def mixture(kind: str = "qwen3_moe", **options: Any) -> nn.Module:
    sizes = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    return made(kind, **sizes, head_dim=4, **options)


def gpt2(**options: Any) -> nn.Module:
    return models.gpt2(torch.float32, vocabulary=12, seed=2, n_positions=32, **options)


def brief(terms: tuple[TrainingTerm, ...]) -> list[tuple[str, str, float]]:
    return [(term.kind, term.name, term.value) for term in terms if term.kind != "left padding"]


def test_a_model_without_any_of_it_has_no_term() -> None:
    assert training_terms(made("qwen2")) == ()
    assert training_terms(made("llama").to(torch.bfloat16)) == ()
    assert training_terms(models.two_lines()) == ()


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (
            lambda: gpt2(resid_pdrop=0.1, attn_pdrop=0.2),
            [("attn_dropout", 0.2, 2), ("resid_dropout", 0.1, 2), ("dropout", 0.1, 2)],
        ),
        (lambda: gpt2(embd_pdrop=0.3), [("drop", 0.3, 1)]),
        (lambda: made("qwen2", attention_dropout=0.25), [("attention_dropout", 0.25, 2)]),
        (lambda: nn.Sequential(nn.Embedding(5, 3), nn.Dropout(0.4), nn.Linear(3, 5)), [("Dropout", 0.4, 1)]),
        (lambda: nn.Sequential(nn.Embedding(5, 3), nn.GRU(3, 5, 2, dropout=0.5)), [("dropout", 0.5, 1)]),
        (lambda: nn.Sequential(nn.Embedding(5, 4), nn.MultiheadAttention(4, 2, dropout=0.1)), [("dropout", 0.1, 1)]),
        (
            lambda: nn.Sequential(nn.Embedding(5, 3), nn.AlphaDropout(0.1), nn.Dropout(0), nn.Linear(3, 5)),
            [("AlphaDropout", 0.1, 1)],
        ),
    ],
)
def test_dropout_is_where_modules_keep_it(module: Any, found: list[tuple[str, float, int]]) -> None:
    terms = [t for t in training_terms(module()) if t.kind != "left padding"]
    assert sorted((t.name, t.value, len(t.modules)) for t in terms) == sorted(found)
    for term in terms:
        assert term.kind == "dropout"
        assert f"{term.name} is {term.value:g} in {term.modules[0]}" in term.sentence


def test_dropout_that_no_module_reads_is_not_there() -> None:
    assert brief(training_terms(gpt2(summary_first_dropout=0.5))) == []


@pytest.mark.parametrize("train", [True, False])
def test_it_counts_in_either_mode(train: bool) -> None:
    module = made("qwen2", attention_dropout=0.25).train(train)
    assert brief(training_terms(module)) == [("dropout", "attention_dropout", 0.25)]


def test_an_adapters_own_dropout() -> None:
    assert brief(training_terms(models.lora(dropout=0.3))) == [("dropout", "lora_dropout", 0.3)]
    (term,) = training_terms(models.lora(dropout=0.3))
    assert len(term.modules) == 5  # q_proj and v_proj of two layers, and the head
    from peft import LoHaConfig, get_peft_model

    adapted = get_peft_model(
        made("qwen2"), LoHaConfig(r=2, target_modules=["q_proj"], module_dropout=0.2, rank_dropout=0.1)
    )
    assert sorted(brief(training_terms(adapted))) == [
        ("dropout", "module_dropout", 0.2),
        ("dropout", "rank_dropout", 0.1),
    ]


def test_what_trl_switches_off_is_off() -> None:
    module = gpt2(resid_pdrop=0.1, attn_pdrop=0.2)
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0  # disable_dropout=True
    assert brief(training_terms(module)) == []


def test_what_falls_in_train_mode_is_what_is_named() -> None:
    """Train mode differs from eval mode exactly where there is a term."""
    for module in (
        made("qwen2", attention_dropout=0.25),
        gpt2(embd_pdrop=0.3),
        made("qwen2"),
        gpt2(),
        mixture("mixtral", router_jitter_noise=0.4),
    ):
        ids = torch.arange(10)[None]
        with torch.no_grad(), models.seeded(4):
            differs = not torch.equal(module.train()(ids).logits, module.eval()(ids).logits)
        assert differs == any(t.kind in ("dropout", "noise") for t in training_terms(module))


def test_noise_in_train_mode() -> None:
    jitter = training_terms(mixture("mixtral", router_jitter_noise=0.4, router_aux_loss_coef=0.0))
    assert brief(jitter) == [("noise", "jitter_noise", 0.4)]
    module = made("qwen2")
    module.get_input_embeddings().neftune_noise_alpha = 5.0  # as transformers.Trainer sets it
    assert brief(training_terms(module)) == [("noise", "neftune_noise_alpha", 5.0)]


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_the_loss_of_a_router(kind: str, asked: bool) -> None:
    module = mixture(kind, output_router_logits=asked, router_aux_loss_coef=0.02)
    (term,) = training_terms(module)
    assert (term.kind, term.name, term.value) == ("router loss", "router_aux_loss_coef", 0.02)
    assert term.modules
    assert all("gate" in name for name in term.modules)
    assert "adds 0.02 times it" in term.sentence
    assert ("asks for it" in term.sentence) == asked
    assert training_terms(module, router_aux_loss_coef=0.0) == ()
    assert training_terms(module, router_aux_loss_coef=0.5)[0].value == 0.5


def test_a_mixture_that_was_told_not_to_balance_has_none() -> None:
    assert training_terms(mixture(router_aux_loss_coef=0.0)) == ()


def opt() -> nn.Module:
    sizes = {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0, "init_std": 0.3}
    with models.seeded(3):
        return OPTForCausalLM(OPTConfig(**{**SMALL, **sizes}))


def alibi() -> nn.Module:
    sizes = {"alibi": True, "new_decoder_architecture": False, "num_kv_heads": 2}
    with models.seeded(3):
        return FalconForCausalLM(FalconConfig(**{**SMALL, **sizes}))


class Positions(nn.Module):
    """A policy with a table of positions that counts columns."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.where, self.head = nn.Embedding(9, 8), nn.Embedding(16, 8), nn.Linear(8, 9)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(ids) + self.where(torch.arange(ids.shape[1]))))


class Recurrent(nn.Module):
    """A policy whose state runs through the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.state, self.head = nn.Embedding(9, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 9)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.state(self.tokens(ids))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("module", "tables"),
    [
        (gpt2, ("transformer.wpe",)),
        (Positions, ("where",)),
        (
            lambda: made(
                "gpt_neo", max_position_embeddings=32, attention_types=[[["global"], 2]], num_layers=2, num_heads=4
            ),
            ("transformer.wpe",),
        ),
        (lambda: made("qwen2"), None),
        (opt, None),
        (alibi, None),
    ],
    ids=["gpt2", "a table", "gpt neo", "rotary", "positions from the mask", "alibi"],
)
def test_positions_that_count_the_padding(module: Any, tables: tuple[str, ...] | None, dtype: torch.dtype) -> None:
    with models.seeded(5):
        terms = [t for t in training_terms(module().to(dtype)) if t.kind == "left padding"]
    assert [t.modules for t in terms] == ([] if tables is None else [tables])
    if terms:
        assert terms[0].value > 1e-3
        assert f"{tables[0]} counts the padding" in terms[0].sentence


def test_a_state_that_runs_through_the_padding() -> None:
    with models.seeded(6):
        (term,) = training_terms(Recurrent())
    assert (term.kind, term.modules) == ("left padding", ())
    assert term.value > 1e-3


def test_padding_matters_where_prompts_differ_in_length() -> None:
    terms = training_terms(gpt2(resid_pdrop=0.1))
    assert [t.kind for t in terms] == ["dropout", "dropout", "left padding"]
    even = fp.rollouts_from_lists([[1, 2], [3, 4]], [[5], [6]], temperature=1.0)
    uneven = fp.rollouts_from_lists([[1, 2], [3]], [[5], [6]], temperature=1.0)
    padding = terms[-1].sentence
    assert padding not in training_cautions(terms)
    assert padding not in training_cautions(terms, even)
    assert training_cautions(terms, uneven) == tuple(t.sentence for t in terms)
    assert training_cautions(terms, even) == tuple(t.sentence for t in terms[:-1])


def test_the_size_of_it_is_that_of_padded_scores() -> None:
    module = gpt2().eval()
    (term,) = training_terms(module)
    row = torch.arange(5)
    with torch.no_grad():
        alone = module(row[None]).logits[0].log_softmax(-1)
        mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
        padded = module(torch.cat([row.new_zeros(3), row])[None], attention_mask=mask).logits[0, -5:].log_softmax(-1)
    assert term.value == pytest.approx(float((alone - padded).abs().max()), rel=1e-5)


def test_nothing_is_touched() -> None:
    module = gpt2(resid_pdrop=0.1).train()

    @functools.wraps(type(module).forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("the module itself is not run, nor a closure over it")

    module.forward = forward
    before = {name: value.clone() for name, value in module.state_dict().items()}
    generator, hooks = torch.random.get_rng_state(), [len(m._forward_hooks) for m in module.modules()]
    training_terms(module)
    assert all(part.training for part in module.modules())
    assert "forward" in vars(module)
    assert [len(m._forward_hooks) for m in module.modules()] == hooks
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert copy.deepcopy(training_terms(gpt2())) == training_terms(gpt2())
