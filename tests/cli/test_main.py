from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from funcprobe import __version__
from funcprobe.cli.config import load_config
from funcprobe.cli.main import COMMANDS, main
from funcprobe.cli.run import COMMAND
from funcprobe.data.files import write_rollouts
from funcprobe.report.terminal import text_of
from funcprobe.results.probe import ProbeResult
from funcprobe.types import Rollouts
from tests.cases.world import Demo, World

Refused = Callable[..., str]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run, its output in `results` beside the configuration."""
    place = tmp_path_factory.mktemp("finished")
    assert main(["run", str(world.config(place, keep_delta=True))]) == 0
    return place


def written(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def with_rollouts(world: World, place: Path, **batches: Rollouts) -> Path:
    """Write a configuration whose evaluation or batch is another one."""
    for name, rollouts in batches.items():
        write_rollouts(place / f"{name}.parquet", rollouts)
    return world.config(place, **{name: f"{name}.parquet" for name in batches})


def with_checkpoint(world: World, place: Path) -> tuple[Path, Path]:
    """Return a configuration and a copy of the checkpoint that may be spoiled."""
    shutil.copytree(world.folder / "checkpoint", place / "checkpoint")
    return world.config(place, checkpoint="checkpoint"), place / "checkpoint"


# what a run leaves


def test_a_run_writes_everything_that_it_says(finished: Path) -> None:
    results = finished / "results"
    assert {p.name for p in results.iterdir()} == COMMAND.written
    assert sorted(p.name for p in finished.iterdir()) == ["config.yaml", "results"]
    result = ProbeResult.load(results)
    assert result.evaluation.sequences == 24
    assert result.outcome.delta_norm > 0
    assert result.delta is not None
    assert (results / "measured_vs_predicted.png").read_bytes().startswith(b"\x89PNG")
    assert (results / "summary.txt").read_text(encoding="utf-8") == text_of(result)


def test_the_configuration_as_run_gives_the_same_result_from_anywhere(finished: Path, tmp_path: Path) -> None:
    as_run = finished / "results" / "config.yaml"
    assert as_run.read_text().startswith(f"# As run by funcprobe {__version__};")
    assert load_config(as_run) == load_config(finished / "config.yaml")
    (tmp_path / "moved.yaml").write_text(as_run.read_text())
    assert main(["run", str(tmp_path / "moved.yaml"), "--output", str(tmp_path / "again")]) == 0
    one, other = (json.loads((p / "result.json").read_text()) for p in (finished / "results", tmp_path / "again"))
    for result in (one, other):
        del result["provenance"]["timings"]
        assert result["arrays"]  # the SHA-256 of the file beside it
    assert one == other


def test_the_summary_is_printed_and_the_last_line_says_where_it_is(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["run", str(world.config(tmp_path))]) == 0
    out, err = capsys.readouterr()
    assert (
        out == (tmp_path / "results" / "summary.txt").read_text(encoding="utf-8") + f"Results: {tmp_path / 'results'}\n"
    )
    assert err == ""


def test_overrides_are_part_of_the_configuration_as_run(world: World, tmp_path: Path) -> None:
    words = ["--lr", "2e-8", "--objective.name", "dapo", "--mode", "reverse", "--microbatch", "5"]
    assert main(["run", str(world.config(tmp_path)), *words]) == 0
    as_run = yaml.safe_load((tmp_path / "results" / "config.yaml").read_text())
    assert (as_run["lr"], as_run["objective"]["name"], as_run["microbatch"]) == (2e-8, "dapo", 5)
    result = ProbeResult.load(tmp_path / "results")
    assert (result.lr, result.mode) == (2e-8, "reverse")


@pytest.mark.parametrize(
    ("changes", "shows"),
    [
        ({"top_k": 2}, lambda result: len(result.top) == 2),
        ({"max_grad_norm": 1e-3}, lambda result: result.outcome.info["clip_coefficient"] < 0.5),
        ({"observable": {"integrand": "surprisal", "per": "sequence"}}, lambda r: r.unit == "nats per sequence"),
        ({"ess_threshold": 1.0, "lr": 0.1}, lambda result: any("below 100 %" in w for w in result.warnings)),
        ({"rounding": True}, lambda result: result.outcome.rounding is not None),
        ({"rounding": False}, lambda result: result.outcome.rounding is None),
        ({"dtype": "float64"}, lambda result: result.environment["dtype"] == "float64"),
        ({"storage": "bfloat16"}, lambda r: r.environment["storage"] == "bfloat16" and r.outcome.unmoved > 0),
        ({"storage": "none"}, lambda result: result.environment["storage"] == "float32"),
        ({"keep_delta": True, "microbatch_tokens": 7}, lambda result: result.delta is not None),
        ({"objective": {"name": "reinforce"}}, lambda result: abs(result.outcome.info["loss"]) > 1e-3),
    ],
)
def test_every_key_reaches_the_result(
    changes: dict[str, Any], shows: Callable[[ProbeResult], bool], world: World, tmp_path: Path
) -> None:
    assert main(["run", str(world.config(tmp_path, **changes))]) == 0
    assert shows(ProbeResult.load(tmp_path / "results"))


def test_a_run_needs_no_optimizer_file_where_a_fresh_one_is_asked_for(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, checkpoint = with_checkpoint(world, tmp_path)
    (checkpoint / "optimizer.pt").unlink()
    assert main(["run", str(config), "--optimizer", "fresh", "--lr", "1e-4"]) == 0
    out, err = capsys.readouterr()
    assert " ".join(out.split()).count("Warning: optimizer='fresh'") == 1
    assert err == ""


def test_what_should_be_known_is_said_once_in_the_summary_and_kept(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zero = world.batch._replace(advantages=torch.zeros(24, dtype=torch.float64))
    nucleus = world.evaluation._replace(top_p=torch.full((24,), 0.9, dtype=torch.float64))
    config = with_rollouts(world, tmp_path, batch=zero, evaluation=nucleus)
    assert main(["run", str(config)]) == 0
    out, err = capsys.readouterr()
    said = " ".join(out.split())
    assert said.count("All advantages are zero") == 1
    assert said.count("top_p") >= 1
    assert err == ""
    kept = ProbeResult.load(tmp_path / "results").warnings
    assert len(kept) == len(set(kept)) >= 2
    assert said.count("Warning:") == len(kept)


def test_an_overlap_of_the_batches_is_reported(world: World, tmp_path: Path) -> None:
    config = with_rollouts(world, tmp_path, evaluation=world.batch)
    assert main(["run", str(config)]) == 0
    assert any("also stand in the update batch" in w for w in ProbeResult.load(tmp_path / "results").warnings)


# never overwritten, never half-written


def test_an_existing_output_is_refused_before_anything_is_read(
    finished: Path, refused: Refused, tmp_path: Path
) -> None:
    before = written(finished / "results")
    config = tmp_path / "c.yaml"
    config.write_text(f"checkpoint: absent\nevaluation: absent\nbatch: absent\noutput: {finished / 'results'}\n")
    said = refused("run", config)
    assert f"output: {finished / 'results'} exists already; choose another folder, or replace it with --force." in said
    assert written(finished / "results") == before


def test_force_replaces_the_results_of_an_earlier_run(world: World, tmp_path: Path, refused: Refused) -> None:
    config = world.config(tmp_path)
    assert main(["run", str(config), "--keep-delta"]) == 0
    assert main(["run", str(config), "--lr", "2e-8", "--force"]) == 0
    assert ProbeResult.load(tmp_path / "results").lr == 2e-8
    assert ProbeResult.load(tmp_path / "results").delta is None
    assert {p.name for p in (tmp_path / "results").iterdir()} == COMMAND.written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "results"]


def test_force_replaces_nothing_that_no_run_wrote(world: World, tmp_path: Path, refused: Refused) -> None:
    config = world.config(tmp_path, output=".")
    (tmp_path / "adapter.txt").write_text("")
    assert "holds 'adapter.txt', which funcprobe did not write" in refused("run", config, "--force")
    assert config.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    assert "holds 'thesis.tex', which funcprobe did not write" in refused(
        "run", config, "--output", tmp_path / "mine", "--force"
    )
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"


def test_an_output_that_cannot_be_written_is_refused(world: World, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("")
    config = world.config(tmp_path)
    assert "is a file; give a folder" in refused("run", config, "--output", tmp_path / "file")
    assert "is not a folder that may be written in" in refused("run", config, "--output", tmp_path / "file" / "inside")


def test_what_the_operating_system_refuses_is_one_line(world: World, tmp_path: Path, refused: Refused) -> None:
    assert "File name too long" in refused("run", world.config(tmp_path), "--output", "x" * 300)


@pytest.mark.parametrize("exists", [False, True])
def test_a_run_that_fails_late_leaves_the_disk_as_it_was(
    exists: bool, world: World, finished: Path, tmp_path: Path, refused: Refused
) -> None:
    config = world.config(tmp_path)
    if exists:
        shutil.copytree(finished / "results", tmp_path / "results")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    words = ["--lr", "0.3", "--ess-threshold", "1", "--on-low-ess", "raise", "--force"]
    assert "The effective sample size is" in refused("run", config, *words)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


# bad input: exit code 2, one line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": "abc"}, "config.yaml: lr: found 'abc', expected a number ≥ 0, or none."),
        ({"lr": -1e-3}, "lr: found -0.001, expected a number ≥ 0"),
        ({"temperatur": 1}, "unknown key 'temperatur'"),
        ({"checkpoint": "absent"}, "absent does not exist"),
        ({"checkpoint": "."}, "neither config.json (a full model) nor adapter_config.json"),
        ({"evaluation": "absent.parquet"}, "absent.parquet: there is no such file"),
        ({"batch": "config.yaml"}, "the extension '.yaml' is not known; expected .parquet or .jsonl"),
        ({"optimizer": "none"}, "optimizer: none leaves no step to measure; use auto"),
        ({"device": "gpu"}, "device: found 'gpu', which cannot be used here ("),
        ({"device": "cuda:99"}, "device: found 'cuda:99', which cannot be used here ("),
        ({"device": "meta"}, "device: found 'meta', which cannot be used here ("),
        ({"device": "meta:x"}, "device: found 'meta:x', which cannot be used here ("),
        ({"dtype": "float17"}, "dtype is 'float17'; use 'float32'"),
        ({"dtype": "int8"}, "dtype is 'int8'; use 'float32'"),
        ({"storage": "float17"}, "storage is 'float17'; use 'auto'"),
        ({"storage": "float64"}, "storage is float64, and 'model.embed_tokens.weight' is computed in float32"),
        ({"base_model": "somewhere"}, "base_model is for adapter folders"),
        ({"objective": {"name": "grpo", "beta": 0.1}}, "the rollouts have no ref_logps"),
    ],
)
def test_bad_values_end_with_one_calm_line(
    changes: dict[str, Any], message: str, world: World, tmp_path: Path, refused: Refused
) -> None:
    assert message in refused("run", world.config(tmp_path, **changes))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", ["evaluation", "batch"])
def test_rollouts_that_do_not_fit_the_model_are_refused(
    name: str, world: World, tmp_path: Path, refused: Refused
) -> None:
    batch = getattr(world, name)
    ids = batch.ids.clone()
    ids[2, 0] = 99
    config = with_rollouts(world, tmp_path, **{name: batch._replace(ids=ids)})
    said = refused("run", config)
    assert f"{name}.parquet" in said
    assert "99" in said
    assert "vocabulary" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "the file is empty (0 bytes)"), ('{"schema_version": 99}\n{}\n', "99"), ("not json\n", "JSON")],
)
def test_files_that_are_no_rollouts_are_refused(
    content: str, message: str, world: World, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    said = refused("run", world.config(tmp_path, batch="bad.jsonl"))
    assert "bad.jsonl: " in said
    assert message in said


def test_the_sampler_as_proposal_needs_its_log_probabilities(world: World, tmp_path: Path, refused: Refused) -> None:
    config = with_rollouts(world, tmp_path, evaluation=world.evaluation._replace(sampling_logps=None))
    said = refused("run", config, "--observable.proposal", "sampler")
    assert "observable.proposal: sampler needs the sampler's log-probabilities" in said
    assert "sampling_logps" in said


def test_a_saved_learning_rate_of_zero_asks_for_one(world: World, tmp_path: Path, refused: Refused) -> None:
    config, checkpoint = with_checkpoint(world, tmp_path)
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for group in saved["param_groups"]:
        group["lr"] = 0.0
    torch.save(saved, checkpoint / "optimizer.pt")
    assert "lr" in refused("run", config)
    assert main(["run", str(config), "--lr", "1e-4"]) == 0


def test_a_missing_optimizer_state_is_refused(world: World, tmp_path: Path, refused: Refused) -> None:
    config, checkpoint = with_checkpoint(world, tmp_path)
    (checkpoint / "optimizer.pt").unlink()
    assert "holds no optimizer.pt" in refused("run", config)


def test_a_model_that_returns_no_numbers_names_the_sequences(world: World, tmp_path: Path, refused: Refused) -> None:
    config, checkpoint = with_checkpoint(world, tmp_path)
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][:] = 3e38  # a number still; the logits made of it are none
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert "not finite for sequence 0, 1, 2, 3, 4 and 19 more" in refused("run", config)


def test_a_weight_that_is_no_number_is_named(world: World, tmp_path: Path, refused: Refused) -> None:
    config, checkpoint = with_checkpoint(world, tmp_path)
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][:] = torch.nan
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert "not finite: 'model.norm.weight' holds 16 of 16 entries" in refused("run", config)


def test_a_missing_configuration_is_one_line(tmp_path: Path, refused: Refused) -> None:
    assert "absent.yaml: there is no such file; expected a YAML configuration." in refused(
        "run", tmp_path / "absent.yaml"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND; see funcprobe --help."),
        (["runn"], "'runn' is no command, did you mean 'run'?"),
        (["run"], "the configuration is missing: give CONFIG.yaml"),
        (["sample", "a", "b", "--output", "c.parquet"], "required: --temperature"),
        (["demo", "--seed", "x"], "--seed: found 'x', expected a whole number from 0 to"),
    ],
)
def test_a_wrong_command_line_is_one_line(words: list[str], message: str, refused: Refused) -> None:
    assert message in refused(*words)


# help and version


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--help"], ["funcprobe demo", "funcprobe run config.yaml --lr 2e-8"]),
        (["run", "--help"], ["--objective.name dapo", "microbatch_tokens", "ess_threshold", "optimizer.pt"]),
        (["run", "config.yaml", "--help"], ["microbatch_tokens"]),
        (["sample", "--help"], ["--temperature", "my_rewards:exact_match"]),
        (["demo", "--help"], ["--dir", "--seed", "--force"]),
        (["--version"], [f"funcprobe {__version__}"]),
    ],
)
def test_help_teaches(words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for part in parts:
        assert part in out


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_keeps_to_80_columns(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*filter(None, [name]), "--help"])
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []


def test_help_sets_every_command_and_its_meaning_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for name, registered in COMMANDS.items():
        assert f"  {name:<11}{registered.help}" in lines


# the demo


def test_the_demo_is_made_run_and_used_again(real_demo: Demo, tmp_path: Path, refused: Refused) -> None:
    config = real_demo.folder / "config.yaml"
    following = [
        f"Next:    funcprobe sweep {config} --lrs 1e-8:1e-3:11",
        f"         funcprobe diagnose {config}",
        f"         funcprobe attribute {config}",
    ]
    assert real_demo.said.splitlines()[-4:] == [f"Results: {real_demo.folder / 'results'}", *following]
    first = ProbeResult.load(real_demo.folder / "results")
    assert list(first.readings) == ["entropy", "reward", "kl"]
    assert first.linear_until_lr is not None
    assert abs(first.remainder) < abs(first.change)

    mine = tmp_path / "demo"
    shutil.copytree(real_demo.folder, mine)
    words, place = ["demo", "--dir", str(mine)], mine / "results"
    made = (mine / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    assert main(words) == 0  # and asks for no --force
    assert (mine / "checkpoint" / "model.safetensors").stat().st_mtime_ns == made
    assert ProbeResult.load(place).change == first.change

    # it is an ordinary configuration for `run`, whose promise holds here too
    assert "exists already" in refused("run", tmp_path / "demo" / "config.yaml")
    (place / "mine.txt").write_text("")
    assert "holds 'mine.txt', which funcprobe did not write" in refused(*words)


def test_a_demo_in_a_folder_of_somebody_else_is_refused(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    assert "holds no demo" in refused("demo", "--dir", tmp_path, "--force")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


# the process itself


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "funcprobe.cli.main", *(str(word) for word in words)]


def test_as_a_process_bad_input_ends_with_2_and_one_line_even_where_nothing_but_ascii_prints(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("lr: abc\n")
    done = subprocess.run(
        command("run", tmp_path / "c.yaml"),
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.count(b"\n") == 1
    assert b"lr: found 'abc', expected a number ? 0, or none" in done.stderr


#: A reward that says that it is imported, and then takes its time; the second does not let an interruption pass.
SLOW = {
    "waiting": "import time\nopen('begun', 'w').close()\ntime.sleep(60)\n",
    "swallowing": (
        "import time\nopen('begun', 'w').close()\ntry:\n    time.sleep(60)\nexcept BaseException:\n    pass\n"
        "def reward(**_):\n    return []\n"
    ),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", SLOW)
def test_interrupted_it_ends_with_one_line_whoever_swallows_the_exception(
    kind: str, number: signal.Signals, world: World, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(SLOW[kind])
    (tmp_path / "prompts.txt").write_text("1=\n")
    words = ["sample", world.folder / "checkpoint", "prompts.txt", "--temperature", "1", "--output", "drawn.jsonl"]
    # a suite that was started in the background hands an ignored SIGINT down to its children
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command(*words, "--reward", "slow:reward"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=heard,
    )
    while not (tmp_path / "begun").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 128 + number, err
    assert out == ""
    assert err == f"funcprobe: {'interrupted' if number == signal.SIGINT else 'terminated'}; no results were written.\n"
    assert {p.name for p in tmp_path.iterdir()} <= {"slow.py", "prompts.txt", "begun", "__pycache__"}


def test_a_reader_that_stops_reading_is_no_error(world: World, tmp_path: Path) -> None:
    words = command("run", world.config(tmp_path))
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(600) == 0
    assert (tmp_path / "results" / "result.json").is_file()
