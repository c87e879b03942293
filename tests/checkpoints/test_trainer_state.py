"""`trainer_state.json`: the step and the history, read as numbers or refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers.trainer_callback import TrainerState as Theirs

from funcprobe.checkpoints.trainer_state import TrainerState, logged_later, trainer_state
from funcprobe.errors import CheckpointError


def written(folder: Path, step: int, *events: dict[str, Any]) -> Path:
    """Write the file as transformers itself does."""
    folder.mkdir(parents=True, exist_ok=True)
    Theirs(global_step=step, log_history=list(events)).save_to_json(str(folder / "trainer_state.json"))
    return folder


def event(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "learning_rate": 1e-3 / step, "grad_norm": 1.5 * step, **more}


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    later = {"step": 2, "eval_loss": 0.5}
    found = trainer_state(written(tmp_path, 2, event(1), later, event(2, reward=float("nan"), note="text", flag=True)))
    assert found == TrainerState(2, (event(1), later, event(2)))
    assert found.logged(1) == event(1)
    assert found.logged(2) == event(2)  # the evaluation of a step is no step
    assert found.logged(3) is None
    assert found.names == {"step", "learning_rate", "grad_norm", "eval_loss"}


def test_a_folder_without_one_says_nothing(tmp_path: Path) -> None:
    assert trainer_state(tmp_path) is None


def test_the_next_step_is_in_a_later_checkpoint(tmp_path: Path) -> None:
    first = written(tmp_path / "checkpoint-2", 2, event(2))
    assert logged_later(first, 3) is None
    written(tmp_path / "checkpoint-10", 10, event(2), event(3, reward=1.0), event(10))
    written(tmp_path / "checkpoint-100", 100, event(3))
    (tmp_path / "checkpoint-best").mkdir()
    assert logged_later(first, 3) == event(3, reward=1.0)
    assert logged_later(first, 4) is None
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{")
    assert logged_later(first, 3) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "this is not JSON"),
        ("[1]", "this is a JSON list; expected an object"),
        ("{}", "global_step is None; expected the number of steps"),
        ('{"global_step": -1}', "global_step is -1"),
        ('{"global_step": true}', "global_step is True"),
        ('{"global_step": 1.5}', "global_step is 1.5"),
        ('{"global_step": 99999999999999999999}', "global_step is 99999999999999999999"),
        ("[" * 100_000, "it is nested too deeply"),
    ],
)
def test_damaged_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        trainer_state(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize("kind", ["fifo", "zero", "folder", "itself"])
def test_places_that_are_no_file_are_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "zero" else path)
    if kind == "itself":
        assert trainer_state(tmp_path) is None  # a link to nothing is nothing
        return
    with pytest.raises(CheckpointError, match=r"expected (an ordinary|a) file"):
        trainer_state(tmp_path)


@pytest.mark.parametrize("history", [None, 3, "text", [1, None, []], [{"loss": 1.0}], [{"step": "1"}]])
def test_a_history_that_is_none_is_empty(history: Any, tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 1, "log_history": history}))
    assert trainer_state(tmp_path) == TrainerState(1)


def test_an_integer_that_no_float_holds_is_left_out(tmp_path: Path) -> None:
    text = '{"global_step": 1, "log_history": [{"step": 1, "reward": 1%s}]}' % ("0" * 390)
    (tmp_path / "trainer_state.json").write_text(text)
    assert trainer_state(tmp_path) == TrainerState(1, ({"step": 1.0},))
