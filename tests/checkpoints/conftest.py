"""Real artefacts, made on the spot: transformers.Trainer runs of tiny models, full and under LoRA."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

VOCABULARY = 24
STEPS = 3


class Run(NamedTuple):
    """A finished Trainer run: what it wrote at its last step, and the live pair at that same moment."""

    folder: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    wrapped: Any  # the optimizer as accelerate wraps it
    base: Path | None

    def pair(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return a copy of the live pair that a test may step."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        return model, optimizer

    def truth(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the optimizer's state by name, by identity of the live parameters."""
        return {n: self.optimizer.state[p] for n, p in self.model.named_parameters() if p.requires_grad}


@contextmanager
def third_party() -> Iterator[None]:
    """Let transformers and peft warn about themselves while they train; funcprobe's own calls stay under `error`."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bars:
            logging.enable_progress_bar()


def qwen2(**options: Any) -> Qwen2ForCausalLM:
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 16,
    }
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**{**config, **options}))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=8, n_layer=2, n_head=2, **still))


def lora(base: nn.Module, **options: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    with third_party():
        return get_peft_model(base, config)


def train(model: nn.Module, out: Path, base: Path | None = None, **options: Any) -> Run:
    arguments = {
        "output_dir": str(out),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "max_steps": STEPS,
        "save_steps": STEPS,
        "per_device_train_batch_size": 2,
        "weight_decay": 0.1,
        "learning_rate": 1e-3,
        "logging_strategy": "no",
        "save_only_model": False,
    }
    rows = torch.randint(0, VOCABULARY, (8, 6), generator=torch.Generator().manual_seed(3))
    with third_party():
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**{**arguments, **options}),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        )
        trainer.train()
    folder = out / f"checkpoint-{STEPS}"
    return Run(folder, trainer.model, trainer.optimizer.optimizer, trainer.optimizer, base)


@pytest.fixture(scope="session")
def full_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Tied embeddings, the default optimizer (`adamw_torch_fused`), a linear schedule run to its end: saved lr 0."""
    return train(qwen2(tie_word_embeddings=True), tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="session")
def full_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Another decay rule (LayerNorm by class), `adamw_torch`, constant learning rate."""
    return train(gpt2(), tmp_path_factory.mktemp("gpt2"), optim="adamw_torch", lr_scheduler_type="constant")


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """LoRA with a trained copy of the untied head, over a base that is saved in a folder."""
    place = tmp_path_factory.mktemp("lora")
    base = qwen2(tie_word_embeddings=False)
    with third_party():
        base.save_pretrained(place / "base")
        loaded = Qwen2ForCausalLM.from_pretrained(place / "base")
    model = lora(loaded, modules_to_save=["lm_head"])
    # B starts at zero; moved off it, so that a mapping of A to B cannot hide
    return train(model, place / "out", base=place / "base", lr_scheduler_type="constant")


@pytest.fixture(scope="session")
def runs(full_qwen2: Run, full_gpt2: Run, adapter: Run) -> dict[str, Run]:
    return {"full_qwen2": full_qwen2, "full_gpt2": full_gpt2, "adapter": adapter}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"<unk>": VOCABULARY - 1}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def random_like(params: dict[str, torch.Tensor], seed: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()}


def assert_same_state(found: dict[str, dict[str, torch.Tensor]], expected: dict[str, dict[str, torch.Tensor]]) -> None:
    assert list(found) == list(expected)
    for name, entries in expected.items():
        assert set(found[name]) == set(entries), name
        for key, value in entries.items():
            assert found[name][key].dtype == value.dtype, (name, key)
            assert torch.equal(found[name][key], value), (name, key)
