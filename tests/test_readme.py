"""The README holds: its commands run as they stand, its lines are the demo's, its picture is a notebook's."""

from __future__ import annotations

import base64
import json
import re
import shlex
from pathlib import Path

import pytest

import funcprobe
from funcprobe.cli.demo_folder import prepare_demo
from funcprobe.cli.demo_training import DemoSize
from funcprobe.cli.main import main
from tests.cases import ledgers

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    funcprobe (.+?)(?:\s{2,}#.*)?$", README, re.MULTILINE)
SMALL = DemoSize(
    hidden_size=16,
    layers=1,
    heads=2,
    shortest=2,
    longest=3,
    supervised_steps=5,
    supervised_batch=8,
    rl_steps=2,
    rl_run=4,
    group_size=2,
    batch_prompts=4,
    evaluation_prompts=6,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the names that the README uses are there."""
    folder = prepare_demo(tmp_path_factory.mktemp("readme") / "demo", size=SMALL).parent
    lines = re.findall(r"^    ((?:checkpoint|evaluation|batch): .+)$", README, re.MULTILINE)
    assert len(lines) == 3
    text = "\n".join(lines)
    for name, own in {
        "outputs/checkpoint-500": "checkpoint",
        "E.parquet": "evaluation.parquet",
        "U.parquet": "batch.parquet",
    }.items():
        assert name in text
        text = text.replace(name, own)
    place = folder.parent
    (place / "config.yaml").write_text(re.sub(r": (?=\w)", ": demo/", text))
    loop = ledgers.Loop()
    book = ledgers.ledger(loop, place / "runs" / "grpo" / "ledger")
    loop.run(book, 2)
    book.close()
    (place / "prompts.txt").write_text("12=\n345=\n")
    (place / "my_rewards.py").write_text("def score(prompts, completions, **_):\n    return [1.0] * len(prompts)\n")
    return place


@pytest.mark.parametrize("words", [c for c in COMMANDS if c != "demo"])
@pytest.mark.filterwarnings("ignore::funcprobe.errors.FuncprobeWarning")  # six prompts are few, and that is said
def test_a_command_runs(words: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    named = shlex.split(words.replace("CHECKPOINT", "demo/checkpoint"))
    assert main([*named, *(["--max-new-tokens", "4"] if named[0] == "sample" else [])]) == 0


def test_there_are_commands() -> None:
    assert {c.split()[0] for c in COMMANDS} == {"demo", "run", "sweep", "attribute", "ledger", "sample"}


def test_lines_of_the_demo_have_their_form() -> None:
    """The demo itself is run by tests/cli; each line quoted from it is one that the words of a probe can make."""
    from funcprobe.results.probe_words import MEASURED, PREDICTED

    for label in (MEASURED, PREDICTED, "remainder  ΔF − δF₁"):
        assert f"    {label}  " in README


def test_five_lines_are_those_of_the_package() -> None:
    lines = [line.strip() for line in (funcprobe.__doc__ or "").splitlines() if line.startswith("    ")][:5]
    code = [re.split(r"\s{2,}#", line)[0] for line in lines]
    assert len(code) == 5
    for line in code:
        assert README.count(f">>> {line}") == 2


def test_the_picture_is_what_a_notebook_drew() -> None:
    """`make notebooks` draws it anew; then this says to copy it: the figure of the run, stored as the README has it."""
    (name,) = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    notebook = json.loads((ROOT / "notebooks" / "04_who_moved_the_entropy.ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    drawn = [base64.b64decode(o["data"]["image/png"]) for o in outputs if "image/png" in o.get("data", {})]
    assert (ROOT / name).read_bytes() in drawn, f"copy the notebook's figure to {name}"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_a_link_leads_somewhere(target: str) -> None:
    assert (ROOT / target).exists()
