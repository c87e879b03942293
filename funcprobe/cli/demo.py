"""`funcprobe demo`: everything on a policy that is made on the spot."""

from __future__ import annotations

from argparse import Namespace

from funcprobe.cli import run
from funcprobe.cli.command import PlainCommand, carry_out
from funcprobe.cli.demo_folder import prepare_demo
from funcprobe.cli.options import Option, counted
from funcprobe.cli.progress import Bars

DESCRIPTION = """\
Make a small policy with its own tokenizer, train it by supervised and then by
RL steps, save it as an ordinary checkpoint folder with two rollout files, and
run on it exactly what `funcprobe run` runs. A second call uses what the first
one made."""


def _call(given: Namespace) -> None:
    with Bars() as bars:
        config = prepare_demo(given.dir, seed=given.seed, force=given.force, progress=bars)
    # the results of an earlier demo are replaced; whatever else may stand in their place is not touched
    carry_out(run.COMMAND, config, ["--output", str(config.parent / "results"), "--force"])
    print(f"Next:    funcprobe sweep {config} --lrs 1e-8:1e-3:11")
    print(f"         funcprobe diagnose {config}")
    print(f"         funcprobe attribute {config}")


COMMAND = PlainCommand(
    name="demo",
    description=DESCRIPTION,
    call=_call,
    options=(
        Option("dir", "DIR", "where the demo is made (default: a cache folder)"),
        Option("seed", "N", "of everything that is random", default=0, **counted(0)),
        Option("force", "", "make the demo anew even if it is there", default=False, flag=True),
    ),
)
