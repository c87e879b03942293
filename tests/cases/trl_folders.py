"""A folder that a real `GRPOTrainer` leaves: checkpoints with optimizer and history, and its completions by step."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.cases.third_party import third_party
from tests.cases.trl_runs import Seen, arguments, qwen2, train


def run_folder(folder: Path, model: nn.Module | None = None, **options: Any) -> list[Seen]:
    """Train three steps of a tiny Qwen2, saving and logging each, and return the batches that it saw."""
    from trl import GRPOConfig, GRPOTrainer

    with third_party(), contextlib.redirect_stdout(io.StringIO()):
        saved = {"save_strategy": "steps", "save_steps": 1, "log_completions": True, "temperature": 0.9}
        config = GRPOConfig(**arguments(folder, **{**saved, **options}))
        torch.manual_seed(3)
        run = train(GRPOTrainer, config, model or qwen2(folder.parent / "model"), None, at=(0, 1, 2))
    return [run.steps[step] for step in (0, 1, 2)]
