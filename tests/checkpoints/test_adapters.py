"""Adapters of every kind that peft writes, read from their files: the live model's log-probabilities, or a refusal."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn

import funcprobe as fp
from funcprobe.checkpoints import load_checkpoint
from funcprobe.errors import CheckpointError
from tests.cases.third_party import third_party
from tests.cases.trainer_runs import VOCABULARY, qwen2

LARGER = VOCABULARY + 8
tied, untied = functools.partial(qwen2, tie_word_embeddings=True), functools.partial(qwen2, tie_word_embeddings=False)


def resized(make: Callable[[], Any], seed: int = 0) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = make()
        torch.manual_seed(seed)  # the new rows are drawn
        with third_party():
            model.resize_token_embeddings(LARGER)
        return model

    return made


def on(**options: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=2, **{"target_modules": ["q_proj"], **options})


both = ["embed_tokens", "lm_head"]
KINDS: dict[str, tuple[Callable[[], nn.Module], PeftConfig]] = {
    "lora": (tied, on()),
    "dora": (tied, on(use_dora=True)),
    "rank pattern": (tied, on(use_rslora=True, rank_pattern={"layers.1.self_attn.q_proj": 3})),
    "lora bias": (tied, on(lora_bias=True)),
    "embedding and head, tied": (tied, on(target_modules=["q_proj", *both])),
    "embedding and head": (untied, on(target_modules=["q_proj", *both])),
    "trained head, tied": (tied, on(modules_to_save=["lm_head"])),
    "trained embedding and head, tied": (tied, on(modules_to_save=both)),
    "trained embedding and head": (untied, on(modules_to_save=both)),
    "trained tokens": (untied, on(trainable_token_indices={"embed_tokens": [3, 4]})),
    "trained tokens, tied": (tied, on(trainable_token_indices={"embed_tokens": [3, 4]})),
    "resized": (resized(untied), on()),
    "resized, trained embedding and head": (resized(untied), on(modules_to_save=both)),
    "resized, trained embedding and head, tied": (resized(tied), on(modules_to_save=both)),
    "resized, trained head": (resized(untied), on(modules_to_save=["lm_head"])),
    "resized, trained tokens": (resized(untied), on(trainable_token_indices=[VOCABULARY, LARGER - 1])),
    "resized, trained tokens, tied": (resized(tied), on(trainable_token_indices=[VOCABULARY, LARGER - 1])),
    "resized, embedding and head": (resized(untied), on(target_modules=["q_proj", *both])),
    "ia3": (tied, IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj"], feedforward_modules=[])),
    "adalora": (
        tied,
        AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=9, init_r=2, target_r=1),
    ),
    "vera": (tied, VeraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])),
    "oft": (tied, OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], oft_block_size=4)),
    "prefix": (tied, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
}
U = fp.rollouts_from_lists([[5, 6, 7], [8, 2]], [[3, 9, 4], [11, 1]], temperature=1.0)


def trained(make: Callable[[], nn.Module], config: PeftConfig) -> Any:
    """Return an adapted model whose trainable leaves were moved off where they begin."""
    torch.manual_seed(2)
    with third_party():
        model = get_peft_model(make(), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def log_probabilities(model: Any) -> list[list[float]]:
    """Return log p of every completion token, by the live model, a row at a time."""
    found = []
    for ids, mask, start in zip(U.ids, U.attention_mask, U.prompt_lengths.tolist(), strict=True):
        row = ids[mask].unsqueeze(0)
        with torch.no_grad(), third_party():
            logits = model(input_ids=row).logits[0, -row.shape[1] :].double()
        logp = logits.log_softmax(-1)
        found.append([float(logp[t - 1, row[0, t]]) for t in range(start, row.shape[1])])
    return found


@pytest.mark.filterwarnings("ignore:PeftModelForCausalLM does not split at its head")
@pytest.mark.parametrize("kind", list(KINDS))
def test_an_adapter_says_what_the_live_model_says(kind: str, tmp_path: Path) -> None:
    make, config = KINDS[kind]
    live = trained(make, config)
    with third_party():
        make().save_pretrained(tmp_path / "base")  # type: ignore[operator]
        live.peft_config["default"].base_model_name_or_path = str(tmp_path / "unresized")
        untied().save_pretrained(tmp_path / "unresized")
        live.save_pretrained(tmp_path / "adapter", save_embedding_layers="resized" in kind or "auto")
    found = load_checkpoint(tmp_path / "adapter", tmp_path / "base", optimizer=None)
    assert set(found.params) == {n for n, p in live.named_parameters() if p.requires_grad}
    for row, wanted in zip(fp.score(found.policy, found.params, U).logp.tolist(), log_probabilities(live), strict=True):
        assert row[: len(wanted)] == pytest.approx(wanted, abs=2e-5)  # float32 logits of order 1, by other kernels


@pytest.mark.parametrize("kind", ["resized", "resized, trained embedding and head", "resized, embedding and head"])
def test_a_module_as_base_keeps_its_embeddings(kind: str, tmp_path: Path) -> None:
    _, config = KINDS[kind]
    live = trained(resized(untied), config)
    with third_party():
        live.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    base = resized(untied, seed=5)()  # new rows of its own: those of the file count for the adapter, not for it
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    found = load_checkpoint(tmp_path / "adapter", base, optimizer=None)
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
    for row, wanted in zip(fp.score(found.policy, found.params, U).logp.tolist(), log_probabilities(live), strict=True):
        assert row[: len(wanted)] == pytest.approx(wanted, abs=2e-5)


def test_a_base_of_the_old_vocabulary_is_refused_with_the_fix(tmp_path: Path) -> None:
    live = trained(resized(untied), on(modules_to_save=both))
    with third_party():
        live.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(CheckpointError, match=rf"resize_token_embeddings\({LARGER}\)"):
        load_checkpoint(tmp_path / "adapter", untied(), optimizer=None)


@pytest.mark.parametrize(
    "config",
    [
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8),
    ],
)
def test_an_encoder_whose_parameters_are_not_saved_is_refused(config: PeftConfig, tmp_path: Path) -> None:
    with third_party():
        trained(tied, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="with an encoder of its own, of which peft saves the output"):
        load_checkpoint(tmp_path / "adapter", tied(), optimizer=None)


@pytest.mark.parametrize("kind", ["lora", "trained embedding and head, tied", "trained tokens", "adalora", "prefix"])
@pytest.mark.filterwarnings("ignore:PeftModelForCausalLM does not split at its head")
def test_the_storage_is_that_of_the_adapters_file(kind: str, tmp_path: Path) -> None:
    make, config = KINDS[kind]
    with third_party():
        trained(make, config).to(torch.bfloat16).save_pretrained(tmp_path / "adapter")
    found = load_checkpoint(tmp_path / "adapter", make(), optimizer=None)
    assert found.storage == dict.fromkeys(found.params, torch.bfloat16)
