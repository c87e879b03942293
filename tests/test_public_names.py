"""The public names: one table, the stub, which is what a program finds and what a type checker reads."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import funcprobe
from funcprobe import engine, objectives, optimizers, tree

ROOT = Path(funcprobe.__file__).parents[1]
STUB = ast.parse((ROOT / "funcprobe" / "__init__.pyi").read_text(encoding="utf-8"))
LINES = [node for node in STUB.body if isinstance(node, ast.ImportFrom)]
NAMES = [(str(line.module), line.names[0].name) for line in LINES]


def test_the_stub_is_a_line_a_name_and_nothing_else() -> None:
    assert all(len(line.names) == 1 and line.names[0].asname == line.names[0].name for line in LINES)
    docstring, *rest = [node for node in STUB.body if not isinstance(node, ast.ImportFrom)]
    assert isinstance(docstring, ast.Expr)
    assert [ast.unparse(node) for node in rest] == ["__version__: str"]
    assert len({name for _, name in NAMES}) == len(NAMES)


def test_what_the_stub_lists_is_public_and_nothing_else() -> None:
    assert sorted([*(name for _, name in NAMES), "__version__"]) == funcprobe.__all__
    assert set(funcprobe.__all__) <= set(dir(funcprobe))


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_public_name_is_what_its_line_says(module: str, name: str) -> None:
    found = getattr(funcprobe, name)
    if module == "funcprobe":
        assert found is importlib.import_module(f"funcprobe.{name}")
    else:
        assert found is getattr(importlib.import_module(module), name)
        assert found.__doc__
    assert getattr(funcprobe, name) is found


def test_the_packages_of_objectives_and_optimizers_list_what_is_at_the_top() -> None:
    for package in (objectives, optimizers):
        for name in package.__all__:
            assert getattr(funcprobe, name) is getattr(package, name)
    assert funcprobe.tree is tree
    assert funcprobe.engine is engine
    assert funcprobe.objectives is objectives


def test_a_name_that_is_not_there_is_said_as_python_says_it() -> None:
    with pytest.raises(AttributeError, match=r"module 'funcprobe' has no attribute 'entropie'"):
        funcprobe.entropie  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match=r"cannot import name 'entropie' from 'funcprobe'"):
        from funcprobe import entropie  # type: ignore[attr-defined]  # noqa: F401


def test_a_star_brings_them_all() -> None:
    found: dict[str, object] = {}
    exec("from funcprobe import *", found)
    assert set(funcprobe.__all__) <= set(found)
    assert inspect.isfunction(found["probe"])


# what is imported: a fresh process each, never a clock

HEAVY = ("torch", "numpy", "scipy", "pydantic", "rich", "yaml", "transformers", "pandas", "matplotlib", "pyarrow")
OPTIONAL = ("transformers", "peft", "pydantic", "rich", "yaml", "pandas", "matplotlib", "pyarrow", "jinja2", "trl")
LATE = ("scipy.stats", "arviz_stats", "xarray")


def loaded(code: str, *watched: str) -> list[str]:
    """Return which of the watched modules a fresh process has loaded after some code."""
    code = f"import sys\n{code}\nprint(*[name for name in {watched!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stderr.split()


@pytest.mark.parametrize("words", ["--version", "--help"])
def test_the_command_answers_before_anything_heavy_is_imported(words: str) -> None:
    code = f"from funcprobe.cli.main import main\ntry:\n    main([{words!r}])\nexcept SystemExit:\n    pass"
    assert loaded(code, *HEAVY, "importlib.metadata") == []


def test_a_wrong_command_is_refused_before_anything_heavy_is_imported() -> None:
    said = loaded("from funcprobe.cli.main import main\nassert main(['runn']) == 2", *HEAVY)
    assert "'runn'" in said
    assert not set(HEAVY) & set(said)


def test_the_package_alone_imports_no_torch() -> None:
    assert loaded("import funcprobe; dir(funcprobe); funcprobe.__version__; from funcprobe import errors", *HEAVY) == []


def test_a_verb_imports_torch_and_nothing_optional() -> None:
    code = "import funcprobe as fp; fp.probe, fp.sweep, fp.attribute, fp.compare, fp.Update, fp.read_rollouts"
    assert loaded(code, "torch", *OPTIONAL, *LATE) == ["torch"]


def test_the_stateful_names_import_nothing_optional() -> None:
    assert loaded("import funcprobe.compat", "torch", *OPTIONAL) == ["torch"]
