"""A command keeps freed memory where that can be asked for, and leaves the rest as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from funcprobe.cli import allocation, main
from funcprobe.cli.allocation import KEEP, MAP_FROM, keep_freed_memory

ROOT = Path(__file__).parents[2]

SETTINGS = {"MALLOC_TRIM_THRESHOLD_": "131072", "GLIBC_TUNABLES": "glibc.malloc.arena_max=1", "LD_PRELOAD": "other.so"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return the calls of a C library that is there, and does as it is told."""
    made: list[tuple[int, int]] = []

    def mallopt(name: int, value: int) -> int:
        made.append((name, value))
        return 1

    for name in [n for n in os.environ if n.startswith("MALLOC_")] + list(SETTINGS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocation, "_mallopt", lambda: mallopt)
    monkeypatch.setattr(os, "confstr", lambda _: "glibc 2.36", raising=False)
    return made


def test_both_thresholds_are_set(calls: list[tuple[int, int]]) -> None:
    assert keep_freed_memory()
    assert calls == [(-3, MAP_FROM), (-1, KEEP)]  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of <malloc.h>


@pytest.mark.parametrize("name", SETTINGS)
def test_the_users_own_settings_win(name: str, calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, SETTINGS[name])
    assert not keep_freed_memory()
    assert not calls


@pytest.mark.parametrize("version", ["musl 1.2", "", None, ValueError("unrecognized configuration name")])
def test_other_libraries_are_left_alone(
    version: str | Exception | None, calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def confstr(_: str) -> str | None:
        if isinstance(version, Exception):
            raise version
        return version

    monkeypatch.setattr(os, "confstr", confstr, raising=False)
    assert not keep_freed_memory()
    assert not calls


def test_a_system_without_such_names_is_left_alone(
    calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "confstr")
    assert not keep_freed_memory()
    assert not calls


def test_a_command_sets_them_before_it_is_imported(calls: list[tuple[int, int]]) -> None:
    assert main.main(["run", "absent.yaml"]) == 2
    assert len(calls) == 2


@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_help_sets_nothing(words: list[str], calls: list[tuple[int, int]]) -> None:
    with pytest.raises(SystemExit):
        main.main(words)
    assert not calls


def test_the_library_sets_nothing() -> None:
    code = "import sys, funcprobe as fp; fp.probe; print('funcprobe.cli.allocation' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["False"]


def test_glibc_takes_both_and_no_torch_is_needed() -> None:
    code = "from funcprobe.cli.allocation import keep_freed_memory as k; import sys; print(k(), 'torch' in sys.modules)"
    own = {n: v for n, v in os.environ.items() if n not in SETTINGS and not n.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, env=own)
    assert done.stdout.split() == [str(allocation._is_glibc()), "False"]
