"""How long the first answer takes, in fresh processes: `python benchmarks/startup.py`.

    python -c pass                       the interpreter, which is in every other row
    funcprobe --version, --help          at most 0.15 s: a command is chosen before anything heavy is imported
    import funcprobe                     the same
    import torch                         what cannot be spared once a verb is used
    the first verb                       at most 0.3 s above that: `import funcprobe as fp; fp.probe`
    the first probe                      a probe of a model of 64 parameters, with what is imported late: above all
                                         torch's compiler, which any torch optimizer loads when it is made

Rounds alternate between the rows, the first is thrown away (it reads files from the disk), and the median of the
others counts; a row is compared with its base of the same round. What is imported is held by tests; time only here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from harness import record

from funcprobe.results.environment import describe_environment

ROOT = Path(__file__).parents[1]

PROBE = """\
import torch, funcprobe as fp


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(8, 8)

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return self.table(input_ids)


policy, params = fp.from_module(Tiny())
batches = [fp.rollouts_from_lists([[1], [2]], [[3, 4], [5]], temperature=1.0, advantages=[a, -1.0]) for a in (1.0, 2.0)]
optimizer = fp.sgd(1e-3)
step = fp.make_step(policy, fp.grpo(), optimizer)
fp.probe(fp.Update.from_step(step, params, optimizer.init(params), batches[0]), batches[1])
"""


class Row(NamedTuple):
    """A program and what it may take."""

    name: str
    words: tuple[str, ...]  #: after the interpreter
    base: str | None = None  #: the row above which the target holds
    target: float | None = None  #: seconds


ROWS = (
    Row("python", ("-c", "pass")),
    Row("funcprobe --version", ("-m", "funcprobe.cli.main", "--version"), None, 0.15),
    Row("funcprobe --help", ("-m", "funcprobe.cli.main", "--help"), None, 0.15),
    Row("import funcprobe", ("-c", "import funcprobe"), None, 0.15),
    Row("import torch", ("-c", "import torch")),
    Row("the first verb", ("-c", "import funcprobe as fp; fp.probe"), "import torch", 0.3),
    Row("the first probe", ("-W", "ignore", "-c", PROBE), "import torch"),
)


def main() -> None:
    """Measure every row, print a table, and write the numbers."""
    options = _parser().parse_args()
    seconds: dict[str, list[float]] = {row.name: [] for row in ROWS}
    for number in range(options.rounds + 1):
        for row in ROWS:
            taken = _seconds(row.words)
            if number:
                seconds[row.name].append(taken)
    rows = [_summary(row, seconds) for row in ROWS]
    for row in rows:
        target = "" if row["target"] is None else f"target {row['target']:.2f}: {'met' if row['met'] else 'MISSED'}"
        above = "" if row["above"] is None else f"{row['above']:+.3f} above {row['base']}"
        print(f"{row['name']:<22}{row['seconds']:.3f} s  {above:<28}{target}")
    record.write(options.json, "startup", {"rounds": options.rounds}, describe_environment("cpu"), rows)


def _seconds(words: tuple[str, ...]) -> float:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _summary(row: Row, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return the medians of a row, over all rounds but the first."""
    mine = seconds[row.name]
    above = None
    if row.base is not None:
        above = statistics.median(a - b for a, b in zip(mine, seconds[row.base], strict=True))
    median = statistics.median(mine)
    met = None if row.target is None else (median if above is None else above) <= row.target
    return {
        "name": row.name,
        "seconds": median,
        "fastest": min(mine),
        "slowest": max(mine),
        "base": row.base,
        "above": above,
        "target": row.target,
        "met": met,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="How long the first answer takes, in fresh processes.")
    add = parser.add_argument
    add("--rounds", type=int, default=9, help="counted rounds (default 9)")
    add("--quick", action="store_const", dest="rounds", const=1, help="one round: to see that it runs")
    add("--json", type=Path, default=record.HERE / "results" / "startup.json")
    return parser


if __name__ == "__main__":
    main()
