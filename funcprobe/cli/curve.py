"""`funcprobe curve`: the change as a function of the learning rate, from one gradient and a few derivatives."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from funcprobe.analysis.curve import curve
from funcprobe.cli.command import Beside, Command, told
from funcprobe.cli.config import Config
from funcprobe.cli.options import Option
from funcprobe.cli.prepare import prepared
from funcprobe.cli.progress import Bars
from funcprobe.cli.sweep import FIGURES, journal_of, save_csv, with_journal
from funcprobe.data.numbers import number
from funcprobe.results.any_lr import CurveResult

DESCRIPTION = """\
Measure the step at every learning rate up to one, where the optimizer moves in
proportion to it: one gradient on U, and derivatives on E at a few learning
rates between which the scores are interpolated, as many as the tolerance asks
for. No further pass is made for a learning rate, so that bounds are searched
for free. Killed half-way, the same command goes on from the derivatives that
are done."""

EPILOG = """\
example:
  funcprobe curve config.yaml --lr-max 1e-3
  funcprobe curve config.yaml --lr-max 1e-4 --tolerance 1e-5 --output my-curve

Sixteen learning rates over four decades are shown and kept. The configuration
is that of `run`, whose keys may be given here as well (see `funcprobe run
--help`); lr, rounding, top_k and keep_delta belong to a run and are not looked
at. Results go to OUTPUT-curve."""


def _positive(text: str) -> float:
    return number(text, above=0)


def _do(config: Config, options: Namespace, bars: Bars) -> CurveResult:
    ready = prepared(config, bars)

    def measure(journal: Path) -> CurveResult:
        return curve(
            ready.update,
            ready.evaluation,
            options.lr_max,
            config.observables,
            journal=journal,
            progress=bars,
            **config.options("rounding", "top_k", "keep_delta"),
        )

    return with_journal(config, measure)


LR_MAX = Option(
    "lr-max",
    "LR",
    "the largest learning rate",
    read=_positive,
    expected="a learning rate above 0, such as 1e-4",
    required=True,
)

COMMAND = Command(
    name="curve",
    description=DESCRIPTION,
    epilog=lambda: EPILOG,
    done="measured along a curve",
    do=_do,
    warned=told,
    options=(LR_MAX,),
    suffix="-curve",
    figures=FIGURES,
    beside=(Beside(frozenset({"sweep.csv"}), save_csv),),
    unfinished=journal_of,
    when_interrupted="; the same command goes on from the derivatives that are done",
)
