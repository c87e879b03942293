"""Peak memory of one pass above what was there before it, each pass in a process of its own.

On a CPU the reading is the resident set: its high-water mark after the pass minus its size right before. The mark is
cleared in between where the kernel allows that (Linux), so that neither the building of the model nor the warm-up is
in it; elsewhere `ru_maxrss` must do, and a pass that stays under an earlier mark reads 0. On a GPU it is the caching
allocator's own count of allocated bytes.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from . import workload
from .workload import PASSES, Size

MIB = 2**20

#: Freed blocks go back to the system at once, so that the resident set follows the living tensors.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_in_subprocess(name: str, size: Size, device: str, threads: int) -> float:
    """Return the peak of the named pass above its base, in MiB."""
    request = json.dumps({"name": name, "size": asdict(size), "device": device, "threads": threads})
    command, place = [sys.executable, "-m", "harness.memory", request], Path(__file__).parents[1]
    environment = {**os.environ, **_ALLOCATOR}
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"measuring '{name}' failed: {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout.strip().splitlines()[-1])


def _peak(name: str, size: Size, device: str) -> float:
    """Warm up on a few tokens of the same model, then read the memory around one pass."""
    work = workload.build(size, device)
    few = replace(size, length=2 * workload.PROMPT, sequences=2, microbatch=1)
    PASSES[name](workload.batch_of(work, few))
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        PASSES[name](work)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    clear_high_water()
    before = resident("VmRSS")
    PASSES[name](work)
    return (resident("VmHWM") - before) / MIB


def clear_high_water() -> None:
    """Set the high-water mark of the resident set back to its size."""
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the mark stands as it is
        Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """Return VmRSS or VmHWM in bytes; without /proc, the high-water mark for both."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return mark if sys.platform == "darwin" else mark * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    print(_peak(asked["name"], Size(**asked["size"]), asked["device"]))
