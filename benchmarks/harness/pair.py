"""One model, one optimizer in the middle of its run, two batches: what both systems are given, side by side."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from stateful import StatefulProbe, StatefulResult
from torch import nn

import funcprobe as fp
from funcprobe.data.rollouts import to_device
from funcprobe.types import OptState, Params, Rollouts

PROMPT, TEMPERATURE = 16, 0.8

#: transformers configurations by name; the weights are random, costs depend on shapes alone.
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "qwen2.5-0.5b": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "qwen2.5-1.5b": {
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}


class Shape(NamedTuple):
    """What is compared."""

    model: str = "tiny"
    lora: bool = False
    device: str = "cpu"
    evaluation: int = 32  #: sequences of E
    batch: int = 32  #: sequences of U
    length: int = 128  #: tokens of a sequence, prompt included
    microbatch: int = 8  #: sequences


class Pair(NamedTuple):
    """A live module and optimizer, the same two as pure values, and the batches."""

    shape: Shape
    module: nn.Module
    optimizer: torch.optim.Optimizer
    policy: fp.Policy
    params: Params
    opt_state: OptState
    step: fp.training.step.Step
    evaluation: Rollouts
    batch: Rollouts

    def stateful(self, lr: float | None = None) -> StatefulResult:
        """Probe by mutation."""
        kept_on = self.shape.device
        probe = StatefulProbe(self.module, self.optimizer, microbatch=self.shape.microbatch, snapshot_device=kept_on)
        return probe.run(self.evaluation, self.batch, lr=lr)

    def functional(self, lr: float | None = None, **options: Any) -> fp.ProbeResult:
        """Probe by value, and compute no more than the stateful one does: no path, no rounding row, no error bars."""
        given = {"method": "difference", "rounding": False, "bars": None, **options}
        return fp.probe(
            fp.Update.from_step(self.step, self.params, self.opt_state, self.batch, lr),
            self.evaluation,
            microbatch=self.shape.microbatch,
            **given,
        )

    def swept(self, lrs: list[float], **options: Any) -> fp.SweepResult:
        """Probe by value at several learning rates, first order and subtraction alone."""
        given = {"method": "difference", "order": 1, "bars": None, **options}
        return fp.sweep(
            fp.Update.from_step(self.step, self.params, self.opt_state, self.batch),
            self.evaluation,
            lrs,
            microbatch=self.shape.microbatch,
            **given,
        )


def build(shape: Shape) -> Pair:
    """Return the pair of that shape: the same numbers every time, and moments of a real step in the optimizer."""
    module = _module(shape).to(shape.device)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-5)
    _one_step(module, optimizer, shape)
    policy, params, step_optimizer, opt_state = _read(module, optimizer)
    vocabulary = MODELS[shape.model]["vocab_size"]
    batches = (rollouts(shape, vocabulary, n, seed) for seed, n in enumerate((shape.evaluation, shape.batch), 1))
    evaluation, update = (to_device(batch, shape.device) for batch in batches)
    step = fp.make_step(policy, fp.dr_grpo(), step_optimizer, microbatch=shape.microbatch)
    return Pair(shape, module, optimizer, policy, params, opt_state, step, evaluation, update)


def rollouts(shape: Shape, vocabulary: int, count: int, seed: int) -> Rollouts:
    """Return sequences of random tokens in groups of four."""
    draw = random.Random(seed)
    rows = [[draw.randrange(vocabulary) for _ in range(shape.length)] for _ in range(count)]
    return fp.rollouts_from_lists(
        [rows[i - i % 4][:PROMPT] for i in range(count)],
        [row[PROMPT:] for row in rows],
        temperature=TEMPERATURE,
        rewards=[draw.gauss(0, 1) for _ in rows],
        group_ids=[1000 * seed + i // 4 for i in range(count)],
        vocab_size=vocabulary,
    )


def _module(shape: Shape) -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**MODELS[shape.model], max_position_embeddings=4096, tie_word_embeddings=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = Qwen2ForCausalLM(config).eval()
        if shape.lora:
            from peft import LoraConfig, get_peft_model

            wanted = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            model = get_peft_model(model, LoraConfig(r=16, target_modules=wanted))
            for name, leaf in model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(leaf, std=0.01)
    return model


def _one_step(module: nn.Module, optimizer: torch.optim.Optimizer, shape: Shape) -> None:
    ids = torch.arange(2 * 32, device=shape.device).reshape(2, 32) % 1000
    module(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _read(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[fp.Policy, Params, Any, OptState]:
    live = fp.from_training(module, optimizer)
    return live.policy, live.params, live.optimizer, live.opt_state
