"""A user's folders, as the commands find them and leave them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import yaml

from funcprobe.types import Rollouts


class World(NamedTuple):
    """What a user has on disk."""

    folder: Path
    evaluation: Rollouts
    batch: Rollouts

    def config(self, place: Path, **changes: object) -> Path:
        """Write a configuration into a folder; a change to None leaves the key out."""
        keys: dict[str, object] = {
            "checkpoint": str(self.folder / "checkpoint"),
            "evaluation": str(self.folder / "evaluation.parquet"),
            "batch": str(self.folder / "batch.parquet"),
            "device": "cpu",
            **changes,
        }
        path = place / "config.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in keys.items() if v is not None}))
        return path


class Demo(NamedTuple):
    """What `funcprobe demo` leaves."""

    folder: Path
    said: str  #: on standard output
