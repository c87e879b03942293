"""Frameworks are recognised by the plain files that they leave, and by nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from funcprobe.checkpoints.trainer_state import TrainerState
from funcprobe.cli.frameworks import TRL_GRPO, TRL_RLOO, VERL, framework_of
from funcprobe.objectives.losses import dapo, rloo
from tests.cases.third_party import third_party

LOGGED = TrainerState(2, ({"step": 1.0, "reward": 0.5, "frac_reward_zero_std": 0.0, "completions/mean_length": 7.0},))


def test_the_defaults_are_those_of_the_installed_trl(tmp_path: Path) -> None:
    from trl import GRPOConfig, RLOOConfig

    with third_party():
        theirs = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "bf16": False}
        grpo_, rloo_ = GRPOConfig(**theirs), RLOOConfig(**theirs)
    assert (grpo_.loss_type, grpo_.epsilon, grpo_.epsilon_high, grpo_.beta) == ("dapo", 0.2, None, 0.0)
    assert TRL_GRPO.objective.build() == dapo(epsilon=grpo_.epsilon, epsilon_high=grpo_.epsilon)
    assert TRL_RLOO.objective.build() == rloo(epsilon=rloo_.epsilon, epsilon_high=rloo_.epsilon)
    assert grpo_.epsilon_high is rloo_.epsilon_high is None  # epsilon is both ends
    assert (TRL_GRPO.max_grad_norm, TRL_RLOO.max_grad_norm) == (grpo_.max_grad_norm, rloo_.max_grad_norm)


def test_trl_is_recognised_by_its_history_or_its_file(tmp_path: Path) -> None:
    assert framework_of(tmp_path / "checkpoint-2", LOGGED, None) == TRL_GRPO
    assert framework_of(tmp_path / "checkpoint-2", None, "trl") == TRL_GRPO
    assert framework_of(tmp_path / "checkpoint-2", TrainerState(2, ({"step": 1.0, "reward": 1.0},)), None) is None
    assert framework_of(tmp_path / "checkpoint-2", None, None) is None


def test_a_card_tells_rloo_from_grpo(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nmodel_name: run\ntags:\n- trl\n- rloo\n---\n# Model Card\n")
    assert framework_of(tmp_path / "checkpoint-2", LOGGED, None) == TRL_RLOO
    (tmp_path / "README.md").write_text("rloo is a method\n- trl\n- grpo\n")
    assert framework_of(tmp_path / "checkpoint-2", LOGGED, None) == TRL_GRPO
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    assert framework_of(tmp_path / "checkpoint-2", LOGGED, None) == TRL_GRPO


@pytest.mark.parametrize("dump", ["open-instruct", "nemo-rl", "prime-rl", "torchtitan", "slime"])
def test_a_framework_whose_loss_is_not_known_gives_no_default(dump: str, tmp_path: Path) -> None:
    assert framework_of(tmp_path, None, dump) is None


def test_verl_is_recognised_by_its_file(tmp_path: Path) -> None:
    found = framework_of(tmp_path, None, "verl")
    assert found == VERL
    assert found.objective.build() == dapo(epsilon=0.2, epsilon_high=0.2, delta=3.0)


def swift(folder: Path, **changes: Any) -> None:
    """Write the part of ms-swift's args.json that is read; values are those of its documentation."""
    stated = {"rlhf_type": "grpo", "loss_type": "bnpo", "epsilon": 0.1, "epsilon_high": None, "beta": 0.04}
    stated |= {"delta": None, "max_grad_norm": 0.5, "importance_sampling_level": "token", "model": "Qwen/Qwen2.5-7B"}
    (folder / "args.json").write_text(json.dumps(stated | changes))


def test_ms_swift_states_its_loss(tmp_path: Path) -> None:
    swift(tmp_path)
    found = framework_of(tmp_path, LOGGED, "ms-swift")
    assert found is not None
    assert (found.name, found.is_stated, found.max_grad_norm) == ("ms-swift", True, 0.5)
    options = found.objective.model_dump(include={"name", "epsilon", "epsilon_high", "beta"})
    assert options == {"name": "bnpo", "epsilon": 0.1, "epsilon_high": 0.1, "beta": 0.04}
    assert framework_of(tmp_path / "elsewhere", LOGGED, "ms-swift") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"rlhf_type": "dpo"},
        {"loss_type": "sapo"},
        {"loss_type": ["grpo"]},
        {"loss_type": {}},
        {"importance_sampling_level": "sequence"},
        {"epsilon": "a fifth"},
        {"epsilon": -1.0},
        {"epsilon": [0.2]},
        {"beta": "none"},
        {"delta": 0.0},
    ],
)
def test_what_ms_swift_states_and_is_no_objective_is_not_used(changes: dict[str, Any], tmp_path: Path) -> None:
    swift(tmp_path, **changes)
    assert framework_of(tmp_path, None, "ms-swift") is None


@pytest.mark.parametrize("bound", [None, 0, -1, "much", 1e400])
def test_a_bound_that_is_none_does_not_clip(bound: Any, tmp_path: Path) -> None:
    swift(tmp_path, max_grad_norm=bound)
    found = framework_of(tmp_path, None, None)
    assert found is not None
    assert found.max_grad_norm is None
