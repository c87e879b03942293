"""Runs of transformers.Trainer on tiny models, full and under LoRA, and the live pair at their end."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from tests.cases import models
from tests.cases.third_party import third_party

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


def qwen2(**options: Any) -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    small = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "initializer_range": 0.02}
    return models.qwen2(tied=False, seed=0, **{**sizes, **small, **options})


def gpt2() -> nn.Module:
    special = {"bos_token_id": 50256, "eos_token_id": 50256}
    return models.gpt2(torch.float32, VOCABULARY, seed=1, n_positions=16, n_embd=8, initializer_range=0.02, **special)


def lora(base: nn.Module, **options: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    with models.seeded(2), third_party():
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
