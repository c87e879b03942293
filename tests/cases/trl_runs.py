"""Real TRL trainers of a tiny Qwen2, and what was seen of their steps: before, after, logged, and ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe.integrations.trl import objective_from_config, rollouts_from_trl
from tests.cases import models
from tests.cases.third_party import third_party

VOCABULARY = 24

#: Options of GRPOConfig whose loss is expressible, by name: each is held to the trainer's own step.
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "grpo": {"loss_type": "grpo", "temperature": 0.7, "scale_rewards": "batch"},
    "bnpo": {"loss_type": "bnpo", "scale_rewards": False},
    "dr_grpo": {"loss_type": "dr_grpo", "max_grad_norm": 0.1},
    "cispo, off-policy": {"loss_type": "cispo", "num_iterations": 3},
    "gspo, off-policy": {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 3},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "num_iterations": 3},
    "luspo by token": {"loss_type": "luspo", "num_iterations": 3},
    "dapo, a ratio a sequence": {"importance_sampling_level": "sequence", "num_iterations": 3},
    "cispo, a ratio a sequence": {
        "loss_type": "cispo",
        "epsilon_high": 5.0,
        "importance_sampling_level": "sequence",
        "num_iterations": 3,
    },
    "dapo, off-policy, two-sided": {"num_iterations": 3, "delta": 1.5, "epsilon_high": 0.28},
    "kl": {"beta": 0.1, "num_iterations": 3},
    "kl without bias correction": {"beta": 0.1, "num_iterations": 3, "use_bias_correction_kl": False},
    "kl, a ratio a sequence": {"beta": 0.1, "num_iterations": 3, "importance_sampling_level": "sequence"},
    "dapo, accumulated": {"gradient_accumulation_steps": 2},
    "grpo, accumulated": {"loss_type": "grpo", "gradient_accumulation_steps": 2},
    "bnpo, accumulated": {"loss_type": "bnpo", "gradient_accumulation_steps": 2},
    "dr_grpo, accumulated": {"loss_type": "dr_grpo", "gradient_accumulation_steps": 2},
    "two steps a generation": {"steps_per_generation": 2},
    "two generations a step": {"gradient_accumulation_steps": 2, "steps_per_generation": 1},
    "dapo without the truncated": {"mask_truncated_completions": True, "max_completion_length": 20},
    "grpo without the truncated": {
        "loss_type": "grpo",
        "mask_truncated_completions": True,
        "max_completion_length": 20,
        "gradient_accumulation_steps": 2,
    },
    "top entropy": {"top_entropy_quantile": 0.4},
    "top entropy, accumulated": {"top_entropy_quantile": 0.4, "gradient_accumulation_steps": 2},
    "entropy bonus": {"entropy_coef": 0.05},
    "entropy bonus, accumulated": {"entropy_coef": 0.05, "loss_type": "bnpo", "gradient_accumulation_steps": 2},
}


@contextmanager
def strict() -> Iterator[None]:
    """Inside a trainer: funcprobe's warnings are errors, as they are outside."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def tokenizer() -> Any:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(VOCABULARY - 3)}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **special)


def qwen2(folder: Path) -> nn.Module:
    """Return a Qwen2 that has a folder, from which TRL makes the reference policy of its KL term."""
    from transformers import Qwen2ForCausalLM

    with third_party():
        if not folder.exists():
            special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
            models.qwen2(tied=False, seed=0, vocab_size=VOCABULARY, **special).save_pretrained(folder)
            tokenizer().save_pretrained(folder)
        return Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)


def prompts(lengths: tuple[int, ...] = (2, 3, 4), rows: int = 16) -> list[str]:
    return [" ".join(f"w{(i + j) % 20}" for j in range(lengths[i % len(lengths)])) for i in range(rows)]


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(t % 2 == 0 for t in c) / len(c) + 0.01 * len(c) for c in completion_ids]


@dataclass
class Seen:
    """One optimizer step of a trainer, as its hooks show it."""

    inputs: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    gradient: dict[str, Tensor] = field(default_factory=dict)  #: as the optimizer got it, clipped
    log: dict[str, float] = field(default_factory=dict)
    ours: Any = None  #: what the test's own look at the live pair returned

    @property
    def delta(self) -> dict[str, Tensor]:
        return {name: self.after[name] - self.before[name] for name in self.before}


#: What a test does before the optimizer steps: (trainer, live model, optimizer, micro-batches) -> anything.
Look = Callable[[Any, nn.Module, Any, list[dict[str, Any]]], Any]


def train(
    trainer_class: type, config: Any, model: nn.Module, look: Look | None, at: tuple[int, ...], **options: Any
) -> Run:
    """Train to the end and return the trainer, with what was seen of the steps `at`."""
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    steps = {step: Seen() for step in at}
    now = Seen()

    class Watched(trainer_class):  # type: ignore[misc,valid-type]
        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            now.inputs.append(dict(inputs))
            now.losses.append(float(loss.detach()))
            return loss

    class Hooks(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            now.inputs, now.losses = [], []

        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
        ) -> None:
            if state.global_step not in steps:
                return
            seen = steps[state.global_step]
            seen.inputs, seen.losses = now.inputs, now.losses
            seen.before, seen.gradient = leaves(model), {n: p.grad.clone() for n, p in trainables(model)}
            if look is not None:
                with strict():
                    seen.ours = look(trainer, model, optimizer, now.inputs)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step in steps:
                steps[state.global_step].after = leaves(model)

    with third_party():
        from datasets import Dataset

        data = Dataset.from_dict({"prompt": options.pop("texts", None) or prompts()})
        trainer = Watched(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=data,
            processing_class=tokenizer(),
            callbacks=[Hooks()],
            **options,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    for step, seen in steps.items():
        seen.log = next(e for e in trainer.state.log_history if e["step"] == step + 1 and "loss" in e)
    return Run(trainer, steps)


@dataclass
class Run:
    trainer: Any
    steps: dict[int, Seen]


def trainables(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def leaves(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainables(model)}


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    """Return what every configuration here has beside TRL's defaults: a run of three steps on one CPU thread."""
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 7,
        **options,
    }


def our_step(trainer: Any, model: nn.Module, optimizer: Any, inputs: list[dict[str, Any]]) -> fp.StepResult:
    """Return our step of the live pair, all of it made from what TRL has: its batches and its configuration."""
    batch = rollouts_from_trl(inputs, temperature=trainer.args.temperature)
    pair = fp.from_training(model, optimizer)
    objective = objective_from_config(trainer.args, inputs)
    step = fp.make_step(pair.policy, objective, pair.optimizer, max_grad_norm=trainer.args.max_grad_norm)
    made = step(pair.params, pair.opt_state, batch)
    return made._replace(params={n: p.clone() for n, p in made.params.items()})


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return `|found − expected| / |expected|` over all leaves, which are the same."""
    assert list(found) == list(expected)
    difference = fp.tree.norm(
        fp.tree.sub({n: x.double() for n, x in found.items()}, {n: x.double() for n, x in expected.items()})
    )
    return float(difference / fp.tree.norm({n: x.double() for n, x in expected.items()}))
