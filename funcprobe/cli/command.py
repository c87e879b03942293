"""A command, and the one way in which all of them go: parse, load, do, write, show.

A command is a record in a module of its own, registered by one line in `main`.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from funcprobe import __version__, plugins
from funcprobe.cli import interrupts
from funcprobe.cli.config import Config, dump, load_config
from funcprobe.cli.options import Argument, Option, Parser, described, parsed, split, usage_of
from funcprobe.cli.prepare import check_output, memory_advice, resolved
from funcprobe.cli.progress import Bars
from funcprobe.data.atomic import fresh_directory
from funcprobe.data.ownership import MARKER
from funcprobe.errors import ConfigError, FuncprobeError, InputError, Note, collected_notes
from funcprobe.parallel.environment import is_first
from funcprobe.parallel.launch import launched
from funcprobe.parallel.phases import phase
from funcprobe.parallel.world import world
from funcprobe.report.figures import save_figures
from funcprobe.report.terminal import print_result, text_of
from funcprobe.results.result import Result
from funcprobe.results.storage import FILES

R = TypeVar("R", bound=Result)
T = TypeVar("T")

#: What every command writes beside the stored result.
ALWAYS = frozenset({"config.yaml", "summary.txt", MARKER})


class Beside(NamedTuple):
    """Files that a command writes beside the stored result, its summary and its figures."""

    names: frozenset[str]  #: every name that one of them may have
    write: Callable[[Any, Path], None]  #: of a result, into a folder


class PlainCommand(NamedTuple):
    """A command without a configuration, whose words are all its own."""

    name: str
    description: str
    call: Callable[[argparse.Namespace], None]  #: does everything, given the values of arguments and options
    arguments: tuple[Argument, ...] = ()
    options: tuple[Option, ...] = ()
    epilog: str = ""
    when_interrupted: str = ""

    def main(self, words: Sequence[str]) -> None:
        """Parse the words and do it; of several processes that were started together the first one does.

        Raises:
            FuncprobeError: If anything about the input is not usable.
        """
        if not is_first():
            return
        parser = Parser(prog=f"funcprobe {self.name}", description=self.description, epilog=self.epilog)
        self.call(parsed(parser, words, self.arguments, self.options))


def _nothing_more(config: Config, options: argparse.Namespace) -> None:
    """Check nothing."""


@dataclass(frozen=True)
class Command(Generic[R]):
    """A command that takes a configuration, measures something and leaves a folder of results."""

    name: str
    description: str
    epilog: Callable[[], str]  #: examples and what is particular; the options are told after it
    done: str  #: participle for the head of the configuration as run: "swept"
    do: Callable[[Config, argparse.Namespace, Bars], R]  #: loads what the configuration names, and measures
    warned: Callable[[R, Sequence[Note]], R]  #: the result with those notes and warnings before its own
    options: tuple[Option, ...] = ()
    suffix: str = ""  #: of the output folder, unless one is named on the command line
    check: Callable[[Config, argparse.Namespace], None] = _nothing_more  #: refuses what cannot be done, first of all
    figures: frozenset[str] = frozenset()  #: every name that a figure among the result's blocks may have
    beside: tuple[Beside, ...] = ()
    unfinished: Callable[[Config], Path] | None = None  #: the file in which finished parts are kept until all are done
    when_interrupted: str = ""  #: ends the line that is said then
    written: frozenset[str] = field(init=False)  #: every name that may stand in its folder of results

    def __post_init__(self) -> None:
        figures = (f"{name}.png" for name in self.figures)
        object.__setattr__(self, "written", ALWAYS.union(FILES, figures, *(files.names for files in self.beside)))

    def main(self, words: Sequence[str]) -> None:
        """Parse the words, do it, show the result, and say last where it is.

        Raises:
            FuncprobeError: If anything about the input is not usable; then nothing was written.
        """
        parser = Parser(prog=f"funcprobe {self.name}", description=self.description)
        parser.usage = usage_of(self.name, self.options)
        parser.add_argument("config", metavar="CONFIG.yaml", help="the configuration; it comes first")
        parser.add_argument(
            "overrides", metavar="--key value", nargs=argparse.REMAINDER, help="values that win over the file"
        )
        if {"-h", "--help"} & set(words):
            parser.epilog = "\n\n".join(filter(None, [self.epilog(), described(self.options)]))
            parser.print_help()
            parser.exit()
        if not words:
            parser.error("the configuration is missing: give CONFIG.yaml")
        if words[0].startswith("-"):
            named = next((word for word in words if word.endswith((".yaml", ".yml"))), "CONFIG.yaml")
            parser.error(f"the configuration comes first: funcprobe {self.name} {named} {words[0]} ...")
        carry_out(self, words[0], list(words[1:]))


def carry_out(command: Command[R], path: str | Path, words: Sequence[str] = ()) -> R:
    """Run a command on a configuration file and overrides, show the result, and say last where it is.

    Raises:
        FuncprobeError: If anything about the input is not usable; then nothing was written.
    """
    options, overrides = split(words, command.options)
    config = load_config(path, overrides, [option.key for option in command.options])
    if command.suffix and not any(word == "--output" or word.startswith("--output=") for word in overrides):
        config = config.model_copy(update={"output": config.output.with_name(config.output.name + command.suffix)})
    trackers = [(name, tracker_named(name)) for name in config.trackers]
    with launched() as own, phase(command.name):
        with Bars(None if own.is_first else io.StringIO()) as bars:
            result = measured(command, config, options, bars, Path(path))
        if own.is_first:
            print_result(result)
            for name, tracker in trackers:
                _track(name, tracker, result, config)
            print(f"Results: {config.output}")
    return result


def measured(command: Command[R], config: Config, options: argparse.Namespace, bars: Bars, path: Path) -> R:
    """Return the result of a command on the configuration in `path`, having written its output, whole or not at all.

    Raises:
        ConfigError: If the output folder may not be written, or a field asks for what cannot be done.
        FuncprobeError: If checkpoint, rollouts or numbers are not usable.
    """
    command.check(config, options)
    check_output(config, path)
    with collected_notes("input") as warned:
        config = resolved(config)
        with memory_advice(config):
            result = command.do(config, options, bars)
    result = command.warned(result, warned)
    bars.phase("writing the results")
    interrupts.check()
    with phase("writing the results"):
        if world().is_first:
            _write(command, result, config)
    return result


def _write(command: Command[R], result: R, config: Config) -> None:
    """Write the folder of results, whole or not at all."""

    def placed(output: Path) -> None:
        interrupts.placed(output)
        if command.unfinished is not None:  # before an interruption can come: a journal left here would look unfinished
            command.unfinished(config).unlink(missing_ok=True)

    with fresh_directory(config.output, overwrite=config.force, placed=placed) as folder:
        result.write_into(folder)
        save_figures(result, folder)
        for files in command.beside:
            files.write(result, folder)
        head = f"# As {command.done} by funcprobe {__version__}; every path is absolute.\n"
        (folder / "config.yaml").write_text(head + dump(config), encoding="utf-8")
        (folder / "summary.txt").write_text(text_of(result), encoding="utf-8")


#: Kinds of notes that say what was read and recognised, and are no warnings.
INFORMATION = frozenset({"format", "framework", "trainer log"})


def told(holder: T, found: Sequence[Note]) -> T:
    """Return an outcome or a result with the notes that were collected on the way before its own, each once."""
    own: Any = holder
    of_kind = {known: [note for note in found if (note.kind in INFORMATION) is known] for known in (True, False)}
    notes, warned = (tuple(dict.fromkeys([*of_kind[k], *o])) for k, o in ((True, own.notes), (False, own.warnings)))
    return dataclasses.replace(own, notes=notes, warnings=warned)


def tracker_named(name: str) -> Callable[..., Any]:
    """Return the tracker of that name, which another package brings.

    Raises:
        ConfigError: If there is none, or it cannot be loaded.
    """
    try:
        tracker = plugins.find("tracker", name, {})
    except InputError as error:
        raise ConfigError(f"trackers: {error}") from None
    if tracker is None:
        known = ", ".join(plugins.names("tracker", {})) or "none is installed"
        raise ConfigError(f"trackers: found '{name}', expected names that installed packages bring ({known}).")
    return tracker


def _track(name: str, tracker: Callable[..., Any], result: object, config: Config) -> None:
    try:
        tracker(result)
    except FuncprobeError as error:
        raise ConfigError(f"trackers: {error} The results are in {config.output}.") from error
