"""Packages that are made on the spot and found as installed ones are: a module, and metadata with its entry points."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

#: (name of the package, {group: {name: "module:thing"}}, source of the module) -> None
Install = Callable[[str, Mapping[str, Mapping[str, str]], str], None]


@pytest.fixture
def install(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function that installs a package by putting a folder of its own on the path."""
    made: list[str] = []

    def package(name: str, entries: Mapping[str, Mapping[str, str]], source: str) -> None:
        folder = tmp_path_factory.mktemp(name)
        module = name.replace("-", "_")
        write_package(folder, name, entries, source)
        made.append(module)
        monkeypatch.syspath_prepend(str(folder))

    yield package
    for module in made:
        sys.modules.pop(module, None)


def write_package(folder: Path, name: str, entries: Mapping[str, Mapping[str, str]], source: str) -> None:
    """Write a module and what pip would have written beside it."""
    module = name.replace("-", "_")
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    lines = [f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in named.items()) for group, named in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
