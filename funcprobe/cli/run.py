"""`funcprobe run`: one step of a checkpoint, measured."""

from __future__ import annotations

import dataclasses
import shutil
from argparse import Namespace
from collections.abc import Sequence

from funcprobe.analysis.probe import probe
from funcprobe.cli.command import Command, told
from funcprobe.cli.config import Config, describe_keys
from funcprobe.cli.prepare import prepared
from funcprobe.cli.progress import Bars
from funcprobe.errors import Note
from funcprobe.results.probe import ProbeResult

DESCRIPTION = """\
Take one optimizer step on the rollouts U, from the checkpoint and the
optimizer state of a folder, and measure how far it moves the entropy on the
rollouts E. Nothing that is read is changed."""

EPILOG = """\
The smallest configuration:
  checkpoint: outputs/checkpoint-500  # folder of Hugging Face or TRL
  evaluation: evaluation.parquet      # rollouts E, drawn from this checkpoint
  batch: batch.parquet                # rollouts U, apart from E

Every key may be given as --key value, inner ones as --objective.name dapo.
Paths in the file are relative to the file, those given here to where you are.

Keys:
"""


def _do(config: Config, options: Namespace, bars: Bars) -> ProbeResult:
    ready = prepared(config, bars)
    return probe(ready.update, ready.evaluation, config.observables, progress=bars, **config.options())


def _warned(result: ProbeResult, warned: Sequence[Note]) -> ProbeResult:
    return dataclasses.replace(result, outcome=told(result.outcome, warned))


COMMAND = Command(
    name="run",
    description=DESCRIPTION,
    epilog=lambda: EPILOG + describe_keys(min(shutil.get_terminal_size().columns, 120)),
    done="run",
    do=_do,
    warned=_warned,
    figures=frozenset({"measured_vs_predicted"}),
)
