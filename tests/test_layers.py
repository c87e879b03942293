"""Imports run one way: the table in the package docstring is the law, and this file reads it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import funcprobe

ROOT = Path(funcprobe.__file__).parent
FREE = {"types", "tree", "errors", "plugins", "visible_text", "arguments"}


def layers() -> list[str]:
    """Return the layers in the order of the package docstring's table."""
    table = funcprobe.__doc__.split("layer         contents")[1]
    return [line.split()[0] for line in table.splitlines() if line.strip()]


def layer_of(module: str) -> str | None:
    """Return the layer of a dotted module name, None outside the package."""
    parts = module.split(".")
    return None if parts[0] != "funcprobe" else parts[1] if len(parts) > 1 else ""


def imports(source: str) -> set[str]:
    """Return the dotted names of every funcprobe module that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            found |= {node.module} if node.module != "funcprobe" else {f"funcprobe.{a.name}" for a in node.names}
    return {name for name in found if name.split(".")[0] == "funcprobe"}


def wrong_arrows(own: str, source: str) -> list[str]:
    """Return the imports of a file in layer `own` that point to its right."""
    order = layers()
    wrong = []
    for name in imports(source):
        target = layer_of(name)
        if target in FREE or target == own or target == "__version__":
            continue
        if own in FREE or target not in order or order.index(target) > order.index(own):
            wrong.append(f"{own} -> {target}")
    return wrong


FILES = sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.stem not in {"__init__", "__main__"})


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_from_its_left(file: Path) -> None:
    own = file.relative_to(ROOT).parts[0].removesuffix(".py")
    assert own in FREE or own in layers(), f"{file} stands in no layer of the table"
    assert wrong_arrows(own, file.read_text()) == []


def test_the_table_names_what_exists() -> None:
    assert set(layers()) == {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in FILES} - FREE


def test_a_wrong_arrow_is_seen() -> None:
    assert wrong_arrows("data", "def f():\n    from funcprobe.engine import scores") == ["data -> engine"]
    assert wrong_arrows("tree", "from funcprobe.data.rollouts import take") == ["tree -> data"]
    assert wrong_arrows("compat", "from funcprobe.integrations import trl") == ["compat -> integrations"]
    assert wrong_arrows("cli", "from funcprobe import engine, tree") == []
    assert wrong_arrows("integrations", "from funcprobe.training import losses") == []
