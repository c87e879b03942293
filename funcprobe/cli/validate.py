"""`funcprobe validate`: drop the tokens that methods of attribution rank first, redo the step, and measure again."""

from __future__ import annotations

from argparse import Namespace

from funcprobe.analysis.validate import validate
from funcprobe.attribution.rankings import METHODS
from funcprobe.cli.command import Command, told
from funcprobe.cli.config import Config
from funcprobe.cli.options import Option
from funcprobe.cli.prepare import prepared
from funcprobe.cli.progress import Bars
from funcprobe.results.validation import Validation

DESCRIPTION = """\
Try what attribution claims: drop the tokens, or prompts, of U that each method
ranks lowest and highest, redo the true step, and measure it on prompts of E
that no ranking saw, beside random drops."""

EPILOG = """\
example:
  funcprobe validate config.yaml
  funcprobe validate config.yaml --units prompts --methods additive,sgd

Every second prompt of E ranks, the others measure. The configuration is that
of `run`, whose keys may be given here as well (see `funcprobe run --help`);
of the options of a measurement only microbatch is looked at. Results go to
OUTPUT-validation."""


def _do(config: Config, options: Namespace, bars: Bars) -> Validation:
    ready = prepared(config, bars)
    return validate(
        ready.update,
        ready.evaluation,
        config.observables,
        units=options.units,
        methods=options.methods or None,
        random=options.random,
        subsets=options.subsets,
        microbatch=config.options()["microbatch"],
        progress=bars,
    )


UNITS = Option(
    "units", "tokens|prompts", "what is dropped: tokens or prompts", default="tokens", choices=("tokens", "prompts")
)
CHOSEN = Option(
    "methods",
    "additive,sgd,...",
    f"the methods that rank, by default all for which the optimizer has a form: {', '.join(METHODS)}",
    default=(),
    choices=tuple(METHODS),
    several=True,
)
RANDOM = Option("random", "N", "random drops of every share", default=8, read=int, expected="a whole number from 1")
SUBSETS = Option(
    "subsets",
    "N",
    "random halves of the prompts that are stepped with; 0 leaves them and the prompts left out aside",
    default=32,
    read=int,
    expected="a whole number from 0",
)

COMMAND = Command(
    name="validate",
    description=DESCRIPTION,
    epilog=lambda: EPILOG,
    done="validated",
    do=_do,
    warned=told,
    options=(UNITS, CHOSEN, RANDOM, SUBSETS),
    suffix="-validation",
    figures=frozenset({"validation"}),
)
