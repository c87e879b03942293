"""The whole set, one script after another: `make bench`, or `python benchmarks/all.py --quick` to see that it runs.

On a GPU, one command:

    python benchmarks/all.py --device cuda --model qwen2.5-0.5b --minutes 10

It takes the scripts that have a `--device`, at sizes that should end within ten minutes. That is an estimate, since it
has not been run on a GPU: a forward pass of Qwen2.5-0.5B over 2,048 tokens is 2 TFLOP, a stateful probe of 16 + 16
sequences of 128 tokens eight of these and one with adapters six. `one_step.py` makes some 30 such probes with and
without adapters together, `sweep.py` some 240: 3,500 TFLOP, and `attribution.py` adds some 950: 5 minutes at 15 TFLOP/s
in float32. Four more should do for building the model in a dozen processes, and for the small models of the other
scripts, whose kernels are too short to keep a GPU busy. `--minutes` holds whatever it takes: what has not ended by then
is stopped, and what was not run is named.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Script(NamedTuple):
    """One run of a script, and its options in each setting; None where it is left out there."""

    name: str
    cpu: str = ""
    cuda: str | None = None
    quick: str | None = "--quick"
    compares: bool = False  #: whether it takes --model


#: In the order in which they answer: the two systems against each other, then what the numbers are worth.
SCRIPTS = (
    Script("one_step", "--threads 1 --evaluation 64 --batch 64", "--evaluation 16 --batch 16", compares=True),
    Script(
        "one_step",
        "--threads 1 --evaluation 64 --batch 64 --lora",
        "--evaluation 16 --batch 16 --lora",
        "--quick --lora",
        compares=True,
    ),
    Script(
        "sweep",
        "--threads 1 --evaluation 32 --batch 32 --rounds 2",
        "--evaluation 16 --batch 16 --rounds 2",
        compares=True,
    ),
    Script(
        "sweep",
        "--threads 1 --evaluation 32 --batch 32 --rounds 2 --lora",
        "--evaluation 16 --batch 16 --rounds 2 --lora",
        "--quick --lora",
        compares=True,
    ),
    Script("scaling", "--threads 1", "--microbatch 64"),
    Script("attribution", "--threads 1", "--sequences 64", compares=True),
    Script("attribution", "--threads 1 --lora", "--sequences 64 --lora", None, compares=True),
    Script("precision", "", ""),
    Script("agreement", "", ""),
    Script("engine", "", "", f"--quick --only reverse --json {os.devnull}"),
    Script("path", quick=None),
    Script("predictors"),
    Script("validate", "demo", quick="demo --quick"),
    Script("validate", "larger", quick=None),
    Script("literature"),
    Script("startup"),
    Script("length", "", "", None),
    Script("attention", "", "", f"--longest 256 --rounds 1 --json {os.devnull}"),
    Script("variance", quick=None),
    Script("coverage", quick=None),
    Script("live"),
    Script("trl_settings", quick=None),
    Script("scale", quick=None),
)

#: Scripts that have to be started as a part of the package.
MODULES = ("coverage", "trl_settings", "variance")


def scripts(folder: Path) -> tuple[Script, ...]:
    """Return the scripts above and after them, on the CPU and as they are, the others that the folder holds."""
    named = {script.name for script in SCRIPTS} | {Path(__file__).stem}
    others = (path for path in sorted(folder.glob("*.py")) if path.stem not in named)
    return (*SCRIPTS, *(Script(path.stem, quick=None) for path in others if "\ndef main(" in path.read_text("utf-8")))


def main() -> None:
    """Run what was asked for, and say how long each took and what failed or was left."""
    options = _parser().parse_args()
    stop = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    rows = [(words, _run(words, stop)) for words in commands(options)]
    print("\n".join(f"{said:>12}  {' '.join(words)}" for words, said in rows))
    if any(said == "failed" for _, said in rows):
        raise SystemExit(1)


def commands(options: argparse.Namespace) -> list[list[str]]:
    """Return the words of every command, without the interpreter."""
    found = []
    for script in scripts(Path(__file__).parent):
        given = script.cuda if options.device == "cuda" else script.cpu
        if options.quick and given is not None:
            given = script.quick
        if given is None or (options.only and script.name not in options.only):
            continue
        words = ["-m", f"benchmarks.{script.name}"] if script.name in MODULES else [f"benchmarks/{script.name}.py"]
        words += given.split()
        words += ["--device", "cuda"] if options.device == "cuda" else []
        words += ["--model", options.model] if script.compares and options.model else []
        found.append(words)
    return found


def _run(words: Sequence[str], stop: float | None) -> str:
    """Run one command, its children with it; return the seconds, "failed", "stopped" or "not run"."""
    left = None if stop is None else stop - time.monotonic()
    if left is not None and left <= 0:
        return "not run"
    print(f"\n{' '.join(words)}", flush=True)
    start = time.monotonic()
    running = subprocess.Popen([sys.executable, *words], cwd=ROOT, start_new_session=True)
    try:
        code = running.wait(timeout=left)
    except subprocess.TimeoutExpired:
        _end(running)
        return "stopped"
    except KeyboardInterrupt:
        _end(running)
        raise
    return f"{time.monotonic() - start:.0f} s" if code == 0 else "failed"


def _end(running: subprocess.Popen[bytes]) -> None:
    """End a script and the processes that it measures peaks in."""
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="All benchmarks, one after another.")
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--model", help="the model of one_step.py and sweep.py (default tiny)")
    names = sorted({script.name for script in scripts(Path(__file__).parent)})
    add("--only", nargs="+", choices=names, help="run these alone")
    add("--quick", action="store_true", help="what runs in seconds: to see that it runs, not for figures")
    add("--minutes", type=float, help="stop after so many")
    return parser


if __name__ == "__main__":
    main()
