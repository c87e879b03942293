"""Page faults of a probe with glibc's own thresholds and with those that a command sets (`cli.allocation`).

    python benchmarks/allocation.py [--demo FOLDER]       Linux with glibc; fresh processes, one thread

Each process probes the same problem a few times. What is read is the kernel's account of it (`getrusage`): processor
time in the system and as a whole, minor page faults, and the peak of the resident set. `MALLOC_*` variables are taken
out of the environment. Rounds alternate between the two settings.

What was expected: nearly all faults are of memory that is used again, so nearly none are left after the first probe,
and system time with them; and the resident set may grow by what is kept, at most 256 MiB and one pass's tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import comparing, pair, record

import funcprobe as fp
from funcprobe.cli.allocation import KEEP, MAP_FROM, keep_freed_memory
from funcprobe.cli.config import load_config
from funcprobe.cli.demo_folder import prepare_demo
from funcprobe.cli.prepare import prepared
from funcprobe.cli.progress import Bars
from funcprobe.results.environment import describe_environment

SETTINGS = ("glibc's own", "a command's")
PROBLEMS = ("demo", "tiny")

#: What is read of a process, or of one probe in it.
Reading = dict[str, float]


def main() -> None:
    """Measure both settings in processes of their own, print and write."""
    options = _parser().parse_args()
    if options.child:
        print(json.dumps(probed(*options.child, options.demo, options.probes)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        demo = prepare_demo(options.demo or folder).parent
        for problem in options.problems:
            taken: dict[str, list[list[Reading]]] = {setting: [] for setting in SETTINGS}
            for _ in range(options.rounds):
                for setting in SETTINGS:
                    taken[setting].append(_process(problem, setting, demo, options.probes))
            rows += [_row(problem, setting, taken[setting]) for setting in SETTINGS]
    columns = ("problem", "thresholds", "probe", "processor time", "in the system", "page faults", "peak RSS, MiB")
    table = []
    for row in rows:
        for probe in ("first", "last"):
            r = row[probe]
            numbers = (f"{r['cpu']:.2f} s", f"{r['system']:.3f} s", f"{r['faults']:.0f}", f"{r['peak']:.0f}")
            table.append([row["problem"], row["thresholds"], probe, *numbers])
    comparing.show("medians over processes", columns, table)
    given = {"rounds": options.rounds, "probes": options.probes, "map_from": MAP_FROM, "keep": KEEP}
    record.write(options.json, "allocation", given, describe_environment("cpu"), rows)


def probed(problem: str, setting: str, demo: Path, probes: int) -> list[Reading]:
    """Probe in this process, and return one reading a probe.

    Raises:
        RuntimeError: If the C library does not take the thresholds.
    """
    if setting == SETTINGS[1] and not keep_freed_memory():
        raise RuntimeError("The C library took no thresholds: this benchmark is about glibc.")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    run, readings = _run_of(problem, demo), []
    for _ in range(probes):
        before = resource.getrusage(resource.RUSAGE_SELF)
        run()
        after = resource.getrusage(resource.RUSAGE_SELF)
        user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
        faults = after.ru_minflt - before.ru_minflt
        readings.append({"cpu": user + system, "system": system, "faults": faults, "peak": after.ru_maxrss / 1024})
    return readings


def _run_of(problem: str, demo: Path) -> Callable[[], Any]:
    if problem == "tiny":
        return pair.build(pair.Shape()).functional
    with Bars() as bars:
        config = load_config(demo / "config.yaml")
        ready = prepared(config, bars)
    return lambda: fp.probe(ready.update, ready.evaluation, config.observables, **config.options())


def _process(problem: str, setting: str, demo: Path, probes: int) -> list[Reading]:
    command = [sys.executable, __file__, "--child", problem, setting, "--demo", str(demo), "--probes", str(probes)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    readings: list[Reading] = json.loads(done.stdout.splitlines()[-1])
    return readings


def _row(problem: str, setting: str, processes: list[list[Reading]]) -> dict[str, Any]:
    row: dict[str, Any] = {"problem": problem, "thresholds": setting, "processes": processes}
    for name, place in (("first", 0), ("last", -1)):
        row[name] = {key: statistics.median(p[place][key] for p in processes) for key in processes[0][0]}
    return row


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Page faults of a probe with two settings of the C library.")
    add = parser.add_argument
    add("--demo", type=Path, help="the folder of a demo that is there, or where it is made (default: a temporary one)")
    add("--problems", nargs="+", choices=PROBLEMS, default=PROBLEMS)
    add("--rounds", type=int, default=3, help="processes of either setting (default 3)")
    add("--probes", type=int, default=4, help="probes a process (default 4)")
    add("--json", type=Path, default=record.HERE / "results" / "allocation-cpu.json")
    add("--child", nargs=2, help=argparse.SUPPRESS)  # what a child process is asked for
    return parser


if __name__ == "__main__":
    main()
