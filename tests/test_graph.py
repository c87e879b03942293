"""The graph of imports between our own modules: explicit, and without a circle, whatever the import hides in."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import funcprobe

ROOT = Path(funcprobe.__file__).parent


def modules(root: Path) -> dict[str, Path]:
    """Return the files of a package by dotted module name; the package itself, which names everything, is left out."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found[root.name]
    return found


def own_imports(tree: ast.AST, known: Mapping[str, Path]) -> Iterator[tuple[ast.stmt, str]]:
    """Yield (statement, module of ours that it imports), wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if (name := inner if inner in known else node.module) in known:
                    yield node, name


def graph(root: Path) -> dict[str, set[str]]:
    """Return the modules that every module imports."""
    known = modules(root)
    return {m: {name for _, name in own_imports(ast.parse(p.read_text()), known)} - {m} for m, p in known.items()}


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    """Return the modules on some circle, in order; nothing where there is none."""
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        for other in sorted(edges[module]):
            if found := walk(other, [*way, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(edges) if (found := walk(module, []))), [])


def hidden(source: str, known: Mapping[str, Path]) -> list[str]:
    """Return the modules of ours that a file imports anywhere but at its top: in a function, or for type checkers."""
    tree = ast.parse(source)
    top = {id(node) for node in tree.body}
    return [name for node, name in own_imports(tree, known) if id(node) not in top]


def test_there_is_no_circle() -> None:
    assert circle(graph(ROOT)) == []


def test_no_import_between_our_own_modules_is_hidden() -> None:
    known = modules(ROOT)
    found = {m: names for m, p in known.items() if (names := hidden(p.read_text(), known))}
    assert found == {}


def test_a_circle_is_seen(tmp_path: Path) -> None:
    root = tmp_path / "toy"
    root.mkdir()
    for name, text in {
        "__init__": "",
        "a": "from toy.b import x",
        "b": "def f():\n    from toy import c",
        "c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import toy.a",
    }.items():
        (root / f"{name}.py").write_text(text)
    assert circle(graph(root)) == ["toy.a", "toy.b", "toy.c", "toy.a"]
    known = modules(root)
    assert [hidden(p.read_text(), known) for p in known.values()] == [[], ["toy.c"], ["toy.a"]]
