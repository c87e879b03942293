"""`funcprobe diagnose`, from configuration to a page and a result that is read back."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import funcprobe as fp
from funcprobe.cli.diagnose import COMMAND, PAGE
from funcprobe.cli.main import main
from funcprobe.data.rollouts import take
from funcprobe.report.terminal import text_of
from funcprobe.results.diagnosis import Diagnosis
from funcprobe.results.diagnosis_rules import THRESHOLDS
from funcprobe.results.diagnosis_words import COLUMNS, LINES
from tests.cases.world import Demo, World


@pytest.fixture(scope="module")
def diagnosed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("diagnosed")
    assert main(["diagnose", str(world.config(place)), "--bars-of", "layers", "--order", "2"]) == 0
    return place / "results-diagnosis"


def test_a_diagnosis_is_made_and_kept(diagnosed: Path) -> None:
    assert {p.name for p in diagnosed.iterdir()} == COMMAND.written
    found = fp.load(diagnosed)
    assert isinstance(found, Diagnosis)
    assert found.attribution is not None
    assert set(found.attribution.bars) == {"ledger", "layers"}
    assert (diagnosed / "summary.txt").read_text(encoding="utf-8") == text_of(found)


def test_its_page_answers_every_question_with_tokens_as_text(diagnosed: Path) -> None:
    page = (diagnosed / PAGE).read_text(encoding="utf-8")
    assert page.count('<section id="q') == 8
    (prompt, *_) = re.findall(r'<span class="ask">([^<]+)</span>', page)
    assert prompt.endswith("=")  # prompts of the little world are sums


@pytest.mark.filterwarnings("ignore::funcprobe.errors.FuncprobeWarning")  # a part of the prompts is few
def test_on_the_demo_it_is_a_page_of_a_terminal(
    real_demo: Demo, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    words = ["--output", str(tmp_path / "out")]
    for name, prompts in (("evaluation", 16), ("batch", 8)):
        every = fp.read_rollouts(real_demo.folder / f"{name}.parquet")
        rows = torch.isin(every.group_ids, every.group_ids.unique()[:prompts]).nonzero().flatten()
        fp.write_rollouts(tmp_path / f"{name}.parquet", take(every, rows))
        words += [f"--{name}", str(tmp_path / f"{name}.parquet")]
    assert main(["diagnose", str(real_demo.folder / "config.yaml"), *words]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == f"Results: {tmp_path / 'out'}"
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    assert lines[1] == "Does the entropy fall, and can one tell? FALLS"
    assert sum("Try:" in line or line.endswith("Try") for line in lines) == 8


def test_the_help_has_every_threshold_and_fits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["diagnose", "--help"])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    for threshold in THRESHOLDS:
        assert re.search(rf"^  {threshold.name} {threshold.value:g}\s", said, re.MULTILINE)


def test_bad_words_are_one_calm_line(world: World, tmp_path: Path, refused: Callable[..., str]) -> None:
    config = world.config(tmp_path)
    assert "--bars-of: found 'luck'" in refused("diagnose", config, "--bars-of", "luck")
    said = refused("diagnose", config, "--bars-of", "layers", "--bars", "none")
    assert "--bars-of: can do nothing with bars none; leave one of them out." in said
    assert "mode reverse" in refused("diagnose", config, "--bars-of", "layers", "--mode", "reverse")
