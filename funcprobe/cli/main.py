"""The `funcprobe` command. It ends with 0, with 2 and one calm line for bad input, with 130 or 143 when interrupted.

Nothing heavy is imported before a command is chosen: `--help` and `--version` answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from funcprobe import __version__
from funcprobe.cli import interrupts, streams
from funcprobe.cli.allocation import keep_freed_memory
from funcprobe.cli.options import Parser
from funcprobe.errors import ConfigError, FuncprobeError
from funcprobe.parallel.environment import is_first
from funcprobe.visible_text import calm, shortened

DESCRIPTION = """\
How far does one policy-gradient step move a language model's entropy?
funcprobe takes the step as a pure function, measures the change on held-out
rollouts, predicts it by first-order theory, and shows how far to trust either."""

EPILOG = """\
commands to begin with:
  funcprobe demo                             everything on a small policy
  funcprobe run config.yaml                  one step of your own checkpoint
  funcprobe run config.yaml --lr 2e-8        with another value of one key
  funcprobe curve config.yaml --lr-max 1e-4  at every learning rate up to there
  funcprobe diagnose config.yaml             what ails it, on one page
  funcprobe attribute config.yaml            which prompts and tokens did it
  funcprobe run --help                       every key of a configuration"""


class Registered(NamedTuple):
    """Where a command is, and its line in `funcprobe --help`."""

    module: str  #: whose COMMAND is the command's record; imported when it is chosen
    help: str


#: What a system says of standard output that takes no more.
_OF_OUTPUT = (errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EBADF)

#: A new command is a module with a record, and a line here.
COMMANDS = {
    "run": Registered("funcprobe.cli.run", "measure one step of a checkpoint"),
    "sweep": Registered("funcprobe.cli.sweep", "measure it at many learning rates"),
    "curve": Registered("funcprobe.cli.curve", "measure it at every learning rate up to one"),
    "attribute": Registered("funcprobe.cli.attribute", "say which parameters, prompts and tokens did it"),
    "diagnose": Registered("funcprobe.cli.diagnose", "answer what one would ask of it, on one page"),
    "validate": Registered("funcprobe.cli.validate", "drop what attribution ranks highest, and step again"),
    "demo": Registered("funcprobe.cli.demo", "run everything on a policy made on the spot"),
    "ledger": Registered("funcprobe.cli.ledger", "sum up the ledger of a training run"),
    "sample": Registered("funcprobe.cli.sample", "draw rollouts of a checkpoint"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for bad input (one line on stderr), 130 or 143 if interrupted."""
    streams.open_all()
    command: Any = None
    try:
        with interrupts.heard():
            try:
                name, words = _chosen(list(sys.argv[1:] if argv is None else argv))
                keep_freed_memory()
                command = importlib.import_module(COMMANDS[name].module).COMMAND
                interrupts.check()
                command.main(words)
            except FuncprobeError as error:
                return 2 if error.is_shared and not is_first() else _end(str(error), 2)
            except RecursionError:
                return _end("something that was given is nested too deeply to be read.", 2)
            except MemoryError:
                return _end("there is not enough memory for this; give shorter or fewer rows, or a smaller model.", 2)
            except OSError as error:
                return _end_of_system(error)
            return _end_of_output(streams.flush())
    except KeyboardInterrupt as error:
        streams.flush()
        return _interrupted(error, "" if command is None else command.when_interrupted)


def _interrupted(error: KeyboardInterrupt, kept: str) -> int:
    signalled = error if isinstance(error, interrupts.Interrupted) else interrupts.Interrupted(signal.SIGINT)
    where = interrupts.written()
    what = f"no results were written{kept}" if where is None else f"the results are in {where}"
    return _end(f"{signalled.word}; {what}.", signalled.code)


def _end_of_system(error: OSError) -> int:
    if isinstance(error, BrokenPipeError):  # `funcprobe run ... | head` closed our output: results are written
        streams.drop()
        return 0
    if error.filename is None and error.errno in _OF_OUTPUT:  # files name themselves
        streams.drop()
        return _end_of_output(error)
    name = error.filename if not isinstance(error.filename, bytes) else os.fsdecode(error.filename)
    return _end(f"{error.strerror or error}: {name}" if name else str(error), 2)


def _end_of_output(error: OSError | None) -> int:
    """Return the exit code of a command whose output could, or could not, be written out."""
    if error is None or isinstance(error, BrokenPipeError):
        return 0
    where = "" if interrupts.written() is None else f"; the results are in {interrupts.written()}"
    return _end(f"standard output cannot be written ({error.strerror}){where}.", 2)


def _chosen(words: list[str]) -> tuple[str, list[str]]:
    """Return the name of the command and the words after it; help and version end here.

    Raises:
        ConfigError: If there is no such command.
    """
    if words and words[0] in COMMANDS:
        return words[0], words[1:]
    if words and not words[0].startswith("-"):
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        meant = f", did you mean '{near[0]}'?" if near else "."
        listed = ", ".join(COMMANDS)
        raise ConfigError(
            f"'{shortened(words[0], 60)}' is no command{meant} The commands are {listed}; see funcprobe --help."
        )
    # argparse's own list of commands would break a line after the longest name
    listed = "\n".join(f"  {name:<11}{registered.help}" for name, registered in COMMANDS.items())
    parser = Parser(
        prog="funcprobe",
        usage="funcprobe [-h] [--version] COMMAND ...",
        description=f"{DESCRIPTION}\n\ncommands:\n{listed}",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"funcprobe {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", help=argparse.SUPPRESS, required=True)
    for name in COMMANDS:
        commands.add_parser(name, add_help=False)
    return parser.parse_args(words).command, []


def _end(text: str, code: int) -> int:
    streams.say(f"funcprobe: {calm(text)}")
    return code


def process() -> None:
    """Run the command of this process and end it; a signal while the interpreter shuts down changes nothing."""
    code = main()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


if __name__ == "__main__":
    process()
