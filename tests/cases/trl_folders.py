"""A folder that a real `GRPOTrainer` leaves: checkpoints with optimizer and history, and its completions by step."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from funcprobe.results.probe import ProbeResult
from tests.cases.third_party import third_party
from tests.cases.trl_runs import Seen, arguments, qwen2, train

#: Runs the command on a checkpoint of a run and on U, with more words, and returns its result.
Run = Callable[..., ProbeResult]


def run_folder(folder: Path, model: nn.Module | None = None, **options: Any) -> list[Seen]:
    """Train three steps of a tiny Qwen2, saving and logging each, and return the batches that it saw."""
    from trl import GRPOConfig, GRPOTrainer

    with third_party(), contextlib.redirect_stdout(io.StringIO()):
        saved = {"save_strategy": "steps", "save_steps": 1, "log_completions": True, "temperature": 0.9}
        config = GRPOConfig(**arguments(folder, **{**saved, **options}))
        torch.manual_seed(3)
        run = train(GRPOTrainer, config, model or qwen2(folder.parent / "model"), None, at=(0, 1, 2))
    return [run.steps[step] for step in (0, 1, 2)]


def said(result: ProbeResult, kind: str) -> list[str]:
    """Return the notes and warnings of a kind."""
    return [str(note) for note in (*result.notes, *result.warnings) if note.kind == kind]
