"""A ledger's tables in parquet: its windows, a file for every 256 of them, and the tokens of steps that were opened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from funcprobe.attribution.token_tables import Columns
from funcprobe.data.atomic import fresh_file
from funcprobe.results.ledger_lines import columns_of
from funcprobe.results.window import Window

#: Windows in one file: rewritten as they come, in milliseconds, until it is full.
IN_A_FILE = 256


def write_windows(folder: Path, windows: Sequence[Window]) -> None:
    """Write the file that the last window stands in, whole or not at all; without pyarrow, nothing."""
    if not windows:
        return
    part = (len(windows) - 1) // IN_A_FILE
    _write(folder / "windows" / f"part-{part:05d}.parquet", columns_of(windows[part * IN_A_FILE :]))


def write_tokens(folder: Path, step: int, columns: Columns) -> None:
    """Write the contributions of all tokens of one step's batch, whole or not at all; without pyarrow, nothing."""
    _write(folder / "tokens" / f"step-{step:07d}.parquet", columns)


def _write(path: Path, columns: dict[str, Any]) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with fresh_file(path, overwrite=True) as partial:
        pyarrow.parquet.write_table(pyarrow.table(columns), partial, compression="zstd")
