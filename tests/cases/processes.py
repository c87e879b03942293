"""Several processes of one world on this machine, each of which runs one function; what they return, by rank."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[2]

#: A process that imports the function's module, joins the others by a file, and leaves what the function returns.
PROGRAM = """
import importlib, sys, torch
from datetime import timedelta
torch.set_num_threads(1)
module, name, rank, size, folder = sys.argv[1:]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/meeting", rank=int(rank), world_size=int(size), timeout=timedelta(seconds=60)
)
found = getattr(importlib.import_module(module), name)()
torch.save(found, f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


class Ended(NamedTuple):
    """How the processes ended."""

    returned: list[Any]  #: by rank; None where there is nothing
    codes: list[int]
    words: list[str]  #: standard error


def together(function: Callable[[], Any], size: int, **variables: str) -> Ended:
    """Run a function of some module in `size` processes, with variables of their environment."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
        command = [sys.executable, "-c", PROGRAM, function.__module__, function.__name__]
        running = [
            subprocess.Popen(
                [*command, str(rank), str(size), folder], env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT
            )
            for rank in range(size)
        ]
        words = [process.communicate(timeout=300)[1] for process in running]
        files = [Path(folder, f"{rank}.pt") for rank in range(size)]
        returned = [torch.load(file, weights_only=False) if file.exists() else None for file in files]
        return Ended(returned, [process.returncode for process in running], words)
