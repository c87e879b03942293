"""The small world that the recipes' code is run on: the demo, smaller."""

from __future__ import annotations

from pathlib import Path

import pytest

from funcprobe.cli.demo_folder import prepare_demo
from funcprobe.cli.demo_training import DemoSize

#: Enough prompts for error bars, and training that takes a second or two.
SMALL = DemoSize(
    hidden_size=16,
    layers=1,
    heads=2,
    shortest=2,
    longest=3,
    supervised_steps=30,
    supervised_batch=16,
    rl_steps=3,
    rl_run=6,
    group_size=4,
    batch_prompts=8,
    evaluation_prompts=32,
)


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small demo, which nobody changes."""
    return prepare_demo(tmp_path_factory.mktemp("recipes") / "outputs", size=SMALL).parent


@pytest.fixture(autouse=True)
def in_the_demo(small_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a recipe find the demo's files where it stands."""
    monkeypatch.chdir(small_demo)
