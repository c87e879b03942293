"""A folder of generated files: written where they changed, and nothing left in it that is not made any more."""

from __future__ import annotations

from pathlib import Path


class Folder:
    """A folder that holds the files that were written through it, once strays are removed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written: set[Path] = set()

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file, unless it says the same already."""
        path = self.path / name
        data = content.encode() if isinstance(content, str) else content
        self._written.add(path)
        if not path.exists() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def keep(self, name: str) -> Path:
        """Return the path of a file or folder that something else writes."""
        path = self.path / name
        self._written.add(path)
        return path

    def remove_strays(self) -> None:
        """Remove files that were not written this time."""
        kept = {path for path in self.path.rglob("*") for own in self._written if path.is_relative_to(own)}
        for path in self.path.rglob("*"):
            if path.is_file() and path not in kept:
                path.unlink()
