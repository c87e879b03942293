"""`funcprobe diagnose`: the questions in the order in which one would ask them, on one page."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from funcprobe.analysis.diagnose import IDLE, diagnose
from funcprobe.attribution.part_bars import BARRED
from funcprobe.cli.command import Beside, Command, told
from funcprobe.cli.config import Config
from funcprobe.cli.options import Option, table
from funcprobe.cli.prepare import prepared
from funcprobe.cli.progress import Bars
from funcprobe.errors import ConfigError
from funcprobe.report.diagnosis_page import diagnosis_page
from funcprobe.report.heat_map import environment
from funcprobe.results.diagnosis import Diagnosis
from funcprobe.results.diagnosis_rules import THRESHOLDS

DESCRIPTION = """\
Ask of one step what one would ask of it, in this order, each with its number,
bar and one thing to try: does the entropy fall, and can one tell? The batch or
momentum? Which prompts, tokens, layers? Is the step too large? Does clipping
act? Is the batch stale? Is the step lost in storage? What would change it, at
what price in reward? Leaves one page (HTML) that loads nothing."""

EPILOG = """\
example:
  funcprobe diagnose config.yaml
  funcprobe diagnose config.yaml --bars-of layers,prompts --output why

The configuration is that of `run`, whose keys may be given here as well (see
`funcprobe run --help`); order, exact, rounding, top_k and keep_delta are not
looked at. Results go to OUTPUT-diagnosis: open diagnosis.html.

A number is told from 0 where its interval over prompts leaves 0 out. Verdicts
change at:
"""

PAGE = "diagnosis.html"


def _check(config: Config, options: Namespace) -> None:
    """Refuse impossible options before the passes and not after them.

    Raises:
        ConfigError: If bars are asked for that cannot be.
        MissingExtraError: If jinja2 is not installed.
    """
    if options.bars_of and (config.bars is None or config.mode == "reverse"):
        what = "bars none" if config.bars is None else "mode reverse"
        raise ConfigError(f"--bars-of: can do nothing with {what}; leave one of them out.")
    environment()


def _do(config: Config, options: Namespace, bars: Bars) -> Diagnosis:
    ready = prepared(config, bars)
    return diagnose(
        ready.update,
        ready.evaluation,
        config.observables,
        bars_of=options.bars_of or None,
        tokenizer=ready.tokenizer,
        progress=bars,
        **config.options(*IDLE),
    )


def _save_page(result: Diagnosis, folder: Path) -> None:
    diagnosis_page(result, folder / PAGE)


BARS_OF = Option(
    "bars-of",
    "layers,prompts,...",
    f"error bars of every row of these tables: {', '.join(BARRED)}; two forward passes over E a row; left out: the "
    "ledger's, and those of layers and prompts where they are few",
    default=(),
    choices=BARRED,
    several=True,
)

COMMAND = Command(
    name="diagnose",
    description=DESCRIPTION,
    epilog=lambda: EPILOG + table((f"{t.name} {t.value:g}", t.meaning) for t in THRESHOLDS),
    done="diagnosed",
    do=_do,
    warned=told,
    options=(BARS_OF,),
    suffix="-diagnosis",
    check=_check,
    beside=(Beside(frozenset({PAGE}), _save_page),),
)
