"""Commands that torchrun starts in two processes: the numbers of one, one voice, one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import funcprobe as fp
from tests.cases.world import World

ROOT = Path(__file__).parents[2]

#: float32 sums in another order: a gradient rounds at 2^-24 of Σ|terms|, of which sign-like steps of Adam make more.
SAME = 1e-3


def funcprobe(*words: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), "-m", "funcprobe", *words],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )


def test_two_processes_run_as_one(world: World, tmp_path: Path) -> None:
    config = world.config(tmp_path, output="one")
    assert funcprobe("run", str(config)).returncode == 0
    for name, words in {"two": (), "parts": ("--shard", "true")}.items():
        done = funcprobe("run", str(config), "--output", str(tmp_path / name), *words, processes=2)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Results: ") == 1  # one voice
    one, *several = (fp.load(tmp_path / name) for name in ("one", "two", "parts"))
    for two in several:
        assert two.change == pytest.approx(one.change, rel=SAME)
        assert two.main.first_order == pytest.approx(one.main.first_order, rel=SAME)
        assert two.provenance.environment["parameters"] == one.provenance.environment["parameters"]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["one", "parts", "two"]


def test_bad_input_is_said_once(world: World, tmp_path: Path) -> None:
    config = world.config(tmp_path, output="out", batch=str(tmp_path / "missing.parquet"))
    done = funcprobe("run", str(config), processes=2)
    said = [line for line in done.stderr.splitlines() if line.startswith("funcprobe: ")]
    assert len(said) == 1
    assert re.search(r"missing\.parquet", said[0])
    assert not (tmp_path / "out").exists()


def test_a_process_alone_has_nobody_to_share_with(world: World, tmp_path: Path) -> None:
    done = funcprobe("run", str(world.config(tmp_path, output="out")), "--shard", "true")
    assert done.returncode != 0
    assert "shard: true shares the leaves out over processes, and this one is alone" in done.stderr
    assert not (tmp_path / "out").exists()
