"""Defaults that come from a real TRL run's folder, and are told: the loss, the bound, and the trainer's log."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.cases.trl_folders import Run, said
from tests.cases.trl_runs import Seen


def test_the_last_checkpoint_has_the_log_of_the_step_before(trl_run: Run, trained: tuple[Path, list[Seen]]) -> None:
    theirs = trained[1][2].log
    result = trl_run("checkpoint-3", "completions/completions_00003.parquet", "--lr", "1e-3")
    (log,) = said(result, "trainer log")
    assert log.endswith(f"lr {theirs['learning_rate']:.4g} for step 3, the last before this one.")
    assert len(said(result, "step")) == 1


def test_what_a_configuration_names_is_no_default(trl_run: Run, tmp_path: Path) -> None:
    result = trl_run("checkpoint-1", "completions/completions_00002.parquet", "--objective.name", "bnpo")
    (framework,) = said(result, "framework")
    assert framework.startswith("max_grad_norm is 1.0, the defaults of")
    assert "name: bnpo" in (tmp_path / "results" / "config.yaml").read_text()
    given = ("--objective.name", "bnpo", "--max-grad-norm", "none")
    result = trl_run("checkpoint-1", "completions/completions_00002.parquet", *given)
    assert said(result, "framework") == []
    assert "max_grad_norm: null" in (tmp_path / "results" / "config.yaml").read_text()


def test_a_damaged_state_is_told_and_not_used(trl_run: Run, trained: tuple[Path, list[Seen]], tmp_path: Path) -> None:
    shutil.copytree(trained[0] / "checkpoint-1", tmp_path / "torn")
    (tmp_path / "torn" / "trainer_state.json").write_text('{"global_step": ')
    result = trl_run(str(tmp_path / "torn"), "completions/completions_00003.parquet")
    (text,) = said(result, "trainer state")
    assert text.endswith("the file is damaged. It is not used.")
    assert said(result, "step") == []
    assert len(said(result, "framework")) == 1  # by U, which is TRL's
