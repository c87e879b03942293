"""How a benchmark's numbers are kept: with what was asked for, the commit that was measured, and the environment."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
RESULTS = HERE / "results"


def write(path: Path, benchmark: str, options: dict[str, Any], environment: dict[str, Any], rows: list[Any]) -> None:
    """Write the rows of a benchmark as JSON, beside what they were measured with."""
    report = {
        "benchmark": benchmark,
        "options": options,
        "commit": commit(),
        "environment": environment,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def commit() -> str | None:
    """Return the commit that was measured, marked where the package differs from it; None outside a repository."""
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", "../funcprobe")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + (" with changes" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True)
    return done.stdout.strip()
