"""`funcprobe validate`, from configuration to a result that is read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from funcprobe.cli.main import main
from funcprobe.cli.validate import COMMAND
from funcprobe.results.validation import Validation
from tests.cases.world import World


def test_a_validation_is_made_shown_and_kept(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--methods", "sgd,discriminant", "--random", "2", "--subsets", "2"]
    assert main(["validate", str(world.config(tmp_path)), *words]) == 0
    folder = tmp_path / "results-validation"
    assert {p.name for p in folder.iterdir()} == COMMAND.written - {"result.safetensors"}
    found = Validation.load(folder)
    assert (found.methods, found.dropped, found.subsets) == (("sgd", "discriminant"), "tokens", 2)
    assert "discriminant" in capsys.readouterr().out


def test_bad_words_are_one_calm_line(world: World, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "--methods: found 'luck'" in refused("validate", world.config(tmp_path), "--methods", "luck")
    assert "--random: found 'x'" in refused("validate", world.config(tmp_path), "--random", "x")
