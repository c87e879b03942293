"""Our step on a live trl.GRPOTrainer is its step: the parameters, the loss and the gradient norm that it logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import funcprobe as fp
from tests.integrations.cases import arguments, distance, our_step, qwen2, third_party, train

# Parameters of size .3 are stored to 3e-8 and move by about 1e-3: differences of stored ones are off by 3e-5 of an entry
# at worst and by 1e-5 on average over entries, of which rounding of the arithmetic that both share makes a third.
SAME_STEP = 1e-5
# Sums of some thousand float32 products, in another order.
SAME_NUMBER = 1e-5

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
    "dapo without the truncated": {"mask_truncated_completions": True},
    "grpo without the truncated": {"loss_type": "grpo", "mask_truncated_completions": True},
    "top entropy": {"top_entropy_quantile": 0.4},
    "top entropy, accumulated": {"top_entropy_quantile": 0.4, "gradient_accumulation_steps": 2},
    "entropy bonus": {"entropy_coef": 0.05},
    "entropy bonus, accumulated": {"entropy_coef": 0.05, "loss_type": "bnpo", "gradient_accumulation_steps": 2},
}


def grpo(folder: Path, look: Any = our_step, at: tuple[int, ...] = (1, 2), lora: Any = None, **options: Any) -> Any:
    with third_party():
        from trl import GRPOConfig, GRPOTrainer

        config = GRPOConfig(**arguments(folder / "run", **options))
        return train(GRPOTrainer, config, qwen2(folder / "base"), look, at, peft_config=lora)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trl")


def assert_same_step(run: Any) -> None:
    for number, seen in run.steps.items():
        ours: fp.StepResult = seen.ours
        clipped = fp.tree.scale(ours.info["clip_coefficient"], ours.gradient)
        assert distance(clipped, seen.gradient) < SAME_STEP, number
        assert distance(fp.tree.sub(ours.params, seen.before), seen.delta) < SAME_STEP, number
        assert ours.info["grad_norm"] == pytest.approx(seen.log["grad_norm"], rel=SAME_NUMBER), number
        assert ours.info["loss"] == pytest.approx(seen.log["loss"], rel=SAME_NUMBER, abs=SAME_NUMBER), number


@pytest.mark.parametrize("setting", SETTINGS)
def test_our_step_is_the_trainers(folder: Path, setting: str) -> None:
    assert_same_step(grpo(folder, **SETTINGS[setting]))
