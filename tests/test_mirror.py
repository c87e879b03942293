"""Tests lie where their sources lie: the rule that tests/README.md states, read from the folders themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS, SOURCES, BENCHMARKS = ROOT / "tests", ROOT / "funcprobe", ROOT / "benchmarks"
#: Suites of laws over several files, and the suite of architectures, which has a table of its own.
APART = {"laws", "families", "hostile", "soak"}
#: No tests at all: what tests share, and slow obvious references.
SHARED = {"cases", "oracles"}

FILES = sorted(path for path in TESTS.rglob("test_*.py") if path.parent != TESTS and path.parent.name not in APART)
SCRIPTS = sorted(BENCHMARKS.glob("*.py"))


def sources(room: str) -> set[str]:
    """Return the names of what a room's tests may be of: its files and, of the benchmarks, its packages."""
    if room == "benchmarks":
        packages = {path.parent.name for path in BENCHMARKS.glob("*/__init__.py")}
        return packages | {path.stem for path in [*SCRIPTS, *(BENCHMARKS / "harness").glob("*.py")]}
    return {path.stem for path in (SOURCES / room).glob("*.py")}


def is_of(test: str, names: set[str]) -> bool:
    """Return whether `test_NAME` or `test_NAME_aspect` has the name of a source."""
    return any(test == f"test_{name}" or test.startswith(f"test_{name}_") for name in names)


def imported(source: str) -> Iterator[str]:
    """Yield the dotted names of all that a module imports, wherever it does so."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def of_tests(source: str) -> list[str]:
    """Return what of another test, or of its fixtures, a module imports."""
    parts = {name: name.split(".") for name in imported(source) if name.startswith("tests.")}
    return [name for name, p in parts.items() if any(x == "conftest" or x.startswith("test_") for x in p)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(TESTS)))
def test_a_test_is_of_a_source(path: Path) -> None:
    room = path.parent.name
    assert path.parent.parent == TESTS, "tests lie in a room of tests/, not below one"
    assert is_of(path.stem, sources(room)), (
        f"no source of {room} begins {path.name}; laws over several are for tests/laws"
    )


def test_rooms_are_those_of_the_package() -> None:
    rooms = {path.name for path in TESTS.iterdir() if (path / "__init__.py").exists()}
    assert rooms <= {path.parent.name for path in SOURCES.glob("*/__init__.py")} | APART | SHARED | {"benchmarks"}
    for folder in SHARED:
        assert not list((TESTS / folder).glob("test_*.py"))


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda p: str(p.relative_to(TESTS)))
def test_no_test_is_imported(path: Path) -> None:
    assert of_tests(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_no_script_imports_a_script(path: Path) -> None:
    scripts = {script.stem for script in SCRIPTS}
    names = [name.removeprefix("benchmarks.").split(".") for name in imported(path.read_text(encoding="utf-8"))]
    assert [parts for parts in names if parts[0] in scripts] == []


def test_the_rule_would_see_a_wrong_file() -> None:
    assert is_of("test_step", {"step"})
    assert is_of("test_step_and_more", {"step"})
    assert not is_of("test_steps", {"step"})
    assert of_tests("from tests.training.test_step import built") == ["tests.training.test_step.built"]
    assert of_tests("from tests.cli import conftest") == ["tests.cli.conftest"]
    assert of_tests("from tests.cases import models\nimport pytest") == []
