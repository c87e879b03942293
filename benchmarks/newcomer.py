"""How long a newcomer's path takes, from nothing to a diagnosis: `python benchmarks/newcomer.py`.

    environment   a fresh virtual environment
    install       the package with its extras hf and app, from this checkout, held to constraints.txt
    demo          `funcprobe demo`: a policy, its rollouts and its optimizer state, and the main job on them
    diagnose      `funcprobe diagnose config.yaml` on what the demo left: the page

The target is five minutes for all of it. Whether wheels come over the network or from pip's cache is the largest part
of the difference between two runs; `--no-cache` takes none from the cache. All is done once: a newcomer has one try.
Beside the seconds of the clock stand those of the processors, and the load of the machine when a stage began: other
programs on it make the first longer than the second.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from harness import record

from funcprobe.results.environment import describe_environment

ROOT = Path(__file__).parents[1]

#: Seconds for all stages together.
TARGET = 300.0

#: The page that a newcomer looks at last, below the folder of the demo.
PAGE = Path("results-diagnosis") / "diagnosis.html"


class Stage(NamedTuple):
    """A command of the path."""

    name: str
    words: tuple[str, ...]


def main() -> None:
    """Walk the path in a folder of its own, print a table, and write the numbers."""
    options = _parser().parse_args()
    with tempfile.TemporaryDirectory() as place:
        rows = [_row(stage) for stage in stages(Path(place), options.no_cache)]
        size = (Path(place) / "demo" / PAGE).stat().st_size
    total, busy = (sum(row[what] for row in rows) for what in ("seconds", "processor_seconds"))
    met = {"target": TARGET, "met": total <= TARGET}
    rows.append({"name": "all", "seconds": total, "processor_seconds": busy, **met, "page_bytes": size})
    for row in rows:
        target = f"  target {TARGET:g}: {'met' if row['met'] else 'MISSED'}" if "met" in row else ""
        load = f"  load {row['load']:.1f}" if "load" in row else ""
        print(f"{row['name']:<12}{row['seconds']:8.1f} s{row['processor_seconds']:8.1f} s of processors{load}{target}")
    settings: dict[str, Any] = {"no_cache": options.no_cache, "threads": os.environ.get("OMP_NUM_THREADS")}
    record.write(options.json, "newcomer", settings, describe_environment("cpu"), rows)


def stages(place: Path, no_cache: bool) -> list[Stage]:
    """Return the commands of the path, in a folder."""
    python, demo = place / "env" / "bin" / "python", place / "demo"
    cache = ("--no-cache-dir",) if no_cache else ()
    install = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *cache)
    command = (str(python), "-m", "funcprobe")
    return [
        Stage("environment", (sys.executable, "-m", "venv", str(place / "env"))),
        Stage("install", (*install, "--constraint", str(ROOT / "constraints.txt"), f"{ROOT}[hf,app]")),
        Stage("demo", (*command, "demo", "--dir", str(demo))),
        Stage("diagnose", (*command, "diagnose", str(demo / "config.yaml"))),
    ]


def _row(stage: Stage) -> dict[str, Any]:
    """Return what a stage took, run outside of this checkout so that what is installed is what runs."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    load, start, busy = os.getloadavg()[0], time.perf_counter(), _processor_seconds()
    subprocess.run(stage.words, cwd=tempfile.gettempdir(), env=environment, check=True, stdout=subprocess.DEVNULL)
    seconds, processors = time.perf_counter() - start, _processor_seconds() - busy
    return {"name": stage.name, "seconds": seconds, "processor_seconds": processors, "load": load}


def _processor_seconds() -> float:
    """Return the seconds that processes which have ended spent on processors."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="How long a newcomer's path takes, from nothing to a diagnosis.")
    add = parser.add_argument
    add("--no-cache", action="store_true", help="take no wheels from pip's cache")
    add("--json", type=Path, default=record.RESULTS / "newcomer.json")
    return parser


if __name__ == "__main__":
    main()
