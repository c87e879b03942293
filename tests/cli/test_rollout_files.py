"""`funcprobe run` on the folder that a real TRL run leaves: the file of the next step is its batch, others are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from funcprobe.checkpoints import load_checkpoint
from tests.cases.third_party import third_party
from tests.cases.trl_folders import Run, said
from tests.cases.trl_runs import Seen, tokenizer


def test_the_file_of_the_next_step_is_taken_and_everything_is_said(
    trl_run: Run, trained: tuple[Path, list[Seen]], tmp_path: Path
) -> None:
    result = trl_run("checkpoint-1", "completions/completions_00002.parquet")
    assert said(result, "step") == []
    assert said(result, "format") == ["batch: completions_00002.parquet is read as TRL's completions, by its columns."]
    (stamp,) = said(result, "retokenized")
    assert stamp.startswith("The ids of 8 rows are made again from text")
    assert stamp in result.warnings
    (framework,) = said(result, "framework")
    assert framework.startswith("objective is dapo (epsilon 0.2, epsilon_high 0.2")
    assert "max_grad_norm is 1.0, the defaults of TRL's GRPOTrainer" in framework
    (log,) = said(result, "trainer log")
    theirs = trained[1][1].log
    assert log == (
        f"The trainer logged grad_norm {theirs['grad_norm']:.4g} and lr {theirs['learning_rate']:.4g} for this step, 2."
    )
    assert result.outcome.lr == pytest.approx(theirs["learning_rate"])  # of optimizer.pt, which is the next step's
    config = (tmp_path / "results" / "config.yaml").read_text()
    assert "name: dapo" in config
    assert "max_grad_norm: 1.0" in config


def test_the_file_of_another_step_is_a_warning_with_both_numbers(trl_run: Run) -> None:
    result = trl_run("checkpoint-1", "completions/completions_00003.parquet")
    assert said(result, "step") == [
        "The batch rollouts are of step 3, and the checkpoint, at step 1, is stepped on those of step 2: another "
        "policy sampled them."
    ]


def open_instruct(seen: list[Seen], folder: Path, logps: Callable[[int], list[list[float]]] | None = None) -> Path:
    """Write the run's own batches, ids and all, as open-instruct documents its dump."""
    path = folder / "run_rollouts_000000.jsonl"
    with path.open("w") as file:
        for step, one in enumerate(seen, start=1):
            for inputs in one.inputs:
                for i, (p, pm, c, cm, a) in enumerate(
                    zip(
                        *(inputs[n] for n in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")),
                        inputs["advantages"],
                        strict=True,
                    )
                ):
                    prompt, completion = p[pm.bool()].tolist(), c[cm.bool()].tolist()
                    row: dict[str, Any] = {"step": step, "sample_idx": i, "prompt_idx": str(prompt), "reward": 0.0}
                    row |= {"prompt_tokens": prompt, "response_tokens": completion, "advantage": a.item()}
                    file.write(json.dumps(row | ({"logprobs": logps(step)[i]} if logps else {})) + "\n")
    return path


def test_the_rows_of_the_next_step_are_picked_from_a_file_of_many(
    trl_run: Run, trained: tuple[Path, list[Seen]], tmp_path: Path
) -> None:
    path = open_instruct(trained[1], tmp_path)
    result = trl_run("checkpoint-1", path)
    assert said(result, "step") == []
    assert result.batch is not None
    assert result.batch.sequences == 8
    theirs = trained[1][1].log
    assert result.outcome.info["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)  # ids: the step is theirs
    again = trl_run("checkpoint-1", path, "--step", "3")
    assert "are of step 3" in said(again, "step")[0]


def test_a_batch_that_is_not_the_policys_own_is_a_warning_with_the_number(
    trl_run: Run, trained: tuple[Path, list[Seen]], tmp_path: Path
) -> None:
    """The log-probabilities are the checkpoint's own at step 2, and 0.5 nats off at step 3."""
    folder, seen = trained
    with third_party():
        found = load_checkpoint(folder / "checkpoint-1")
    from funcprobe.data.files import read_rollouts
    from funcprobe.policy.scoring import score

    plain = open_instruct(seen, tmp_path)

    def logps(step: int) -> list[list[float]]:
        rows = read_rollouts(plain, step=step, temperature=0.9, from_="open-instruct")
        own = score(found.policy, found.params, rows).logp - (0.5 if step == 3 else 0.0)
        return [row[mask].tolist() for row, mask in zip(own, rows.completion_mask, strict=True)]

    known = {step: logps(step) for step in (1, 2, 3)}
    path = open_instruct(seen, tmp_path, known.__getitem__)
    assert said(trl_run("checkpoint-1", path), "sampler mismatch") == []
    (text,) = said(trl_run("checkpoint-1", path, "--step", "3"), "sampler mismatch")
    assert "of the update rollouts differ by 0.5 nats per token (mean ratio 1.65)" in text


def test_a_file_of_many_steps_and_a_checkpoint_of_none(
    trl_run: Run, trained: tuple[Path, list[Seen]], tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder, seen = trained
    shutil.copytree(folder / "checkpoint-1", tmp_path / "plain")
    (tmp_path / "plain" / "trainer_state.json").unlink()
    path = tmp_path / "c.yaml"
    batch = open_instruct(seen, tmp_path)
    path.write_text(f"checkpoint: plain\nevaluation: {folder / 'evaluation.parquet'}\nbatch: {batch}\n")
    assert "do not say their temperature" in refused("run", path)
    assert "holds 3 steps from 1 to 3" in refused("run", path, "--temperature", "0.9")
    assert "temperature: found 0, expected a number > 0" in refused("run", path, "--temperature", "0")
    assert "no row is of step 7; the file has 3 steps" in refused("run", path, "--temperature", ".9", "--step", "7")
    result = trl_run(str(tmp_path / "plain"), batch, "--step", "2")
    assert said(result, "step") == said(result, "trainer log") == said(result, "framework") == []


def test_the_tokenizer_of_the_checkpoint_is_used_for_text(trained: tuple[Path, list[Seen]]) -> None:
    with third_party():
        found = load_checkpoint(trained[0] / "checkpoint-1").tokenizer
    assert found("w0 w1")["input_ids"] == tokenizer()("w0 w1")["input_ids"] == [3, 4]
