"""The `funcprobe` command. It ends with 0, with 2 and one calm line for bad input, or with 130 when interrupted."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from funcprobe import __version__
from funcprobe.errors import ConfigError, FuncprobeError

DESCRIPTION = """\
How far does one policy-gradient step move a language model's entropy? funcprobe
takes the step as a pure function, measures the change on held-out rollouts,
predicts it by first-order theory, and shows how far to trust either."""

EPILOG = """\
commands to begin with:
  funcprobe demo                        make a small policy and run everything on it
  funcprobe run config.yaml             measure one step of your own checkpoint
  funcprobe run config.yaml --lr 2e-8   the same, with another value of one key
  funcprobe sweep config.yaml --lrs 1e-8:1e-4:9   the same at nine learning rates
  funcprobe attribute config.yaml       which layers, prompts and tokens did it
  funcprobe run --help                  every key of a configuration"""

RUN = """\
Take one optimizer step on the rollouts U, from the checkpoint and the optimizer
state of a folder, and measure how far it moves the entropy on the rollouts E.
Nothing that is read is changed."""

RUN_EPILOG = """\
The smallest configuration:
  checkpoint: outputs/checkpoint-500     # Hugging Face or TRL folder with optimizer.pt
  evaluation: evaluation.parquet         # rollouts E, drawn from this checkpoint
  update: update.parquet                 # rollouts U, apart from E

Every key may be given as --key value, inner ones as --objective.name dapo.
Paths in the file are relative to the file, those given here to where you are.

Keys:
"""

SWEEP = """\
Do at many learning rates what `run` does at one: the gradient on U and the
derivative on E are taken once, each learning rate costs a scoring pass. Shows
where the step is linear, where that ends, and where float32 can no longer
subtract. Killed half-way, the same command goes on from the finished ones."""

SWEEP_EPILOG = """\
example:
  funcprobe sweep config.yaml --lrs 1e-8:1e-4:9      # nine, evenly spread by factors
  funcprobe sweep config.yaml --lrs 1e-6,2e-6,4e-6 --also reward --output my-sweep

The configuration is that of `run`, whose keys may be given here as well (see
`funcprobe run --help`); lr, rounding, top_k and keep_delta belong to a run and
are not looked at. Results go to OUTPUT-sweep.

  --lrs FIRST:LAST:COUNT   required: the learning rates, or a list with commas
  --chunk N                score N learning rates in one pass: pays with LoRA,
                           takes N times the memory (default: 1)"""

ATTRIBUTE = """\
Take the step that `run` measures, and say which parameters, prompts and tokens
moved the entropy: every part in the same unit, summing to the first order. Writes
tables (parquet), charts (PNG) and two pages (HTML) that colour every token of U
and of E by what it contributed."""

ATTRIBUTE_EPILOG = """\
example:
  funcprobe attribute config.yaml
  funcprobe attribute config.yaml --influence prompts --lr 2e-7 --output who

The configuration is that of `run`, whose keys may be given here as well (see
`funcprobe run --help`). Results go to OUTPUT-attribution: open update.html.

  --influence sequences|prompts   also what every update sequence did to every
                                  evaluation sequence or prompt: a backward pass
                                  and a forward-mode pass over U for each
  --form additive|jacobian|auto   additive: the step as offset + scale x gradient,
                                  so that tokens, momentum and weight decay sum;
                                  jacobian: what if a token weighed a little less.
                                  auto (default): additive where there is one
  --bars-of ledger,layers,...     error bars of every row of these tables: ledger,
                                  parameters, layers, kinds, modules, pairs,
                                  prompts, sequences; two forward passes over E
                                  a row, and for a row of U its gradient"""

SAMPLE = """\
Draw rollouts of a checkpoint for a file of prompts, and write them with the
sampler's log-probabilities and rewards, ready for `funcprobe run`. A completion
ends with any end token of the checkpoint: those of its generation_config.json,
and the tokenizer's."""

SAMPLE_EPILOG = """\
example:
  funcprobe sample outputs/checkpoint-500 prompts.txt --temperature 1 \\
      --group-size 8 --reward my_rewards:exact_match --output evaluation.parquet

A prompt that is a list of chat messages, [{"role": "user", "content": "..."}], goes
through the chat template of the checkpoint's own tokenizer (tokenizer_config.json
or chat_template.jinja), which opens the assistant's turn. Text is encoded as it
stands, and prompt_ids are taken as they are."""

DEMO = """\
Make a small policy with its own tokenizer, train it by supervised and then by RL
steps, save it as an ordinary checkpoint folder with two rollout files, and run on
it exactly what `funcprobe run` runs. A second call uses what the first one made."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for bad input (one line on stderr), 130 when interrupted."""
    _replace_what_cannot_be_printed()
    try:
        return _dispatch(_parser().parse_args(argv))
    except FuncprobeError as error:
        return _say(str(error), 2)
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # `funcprobe run ... | head` closed our output: results are written
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        return _say(f"{error.strerror or error}: {error.filename}" if error.filename else str(error), 2)
    except KeyboardInterrupt:
        words = sys.argv[1:] if argv is None else list(argv)
        kept = "; the same command goes on from the learning rates that are done" if words[:1] == ["sweep"] else ""
        return _say(f"interrupted; no results were written{kept}.", 130)


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors like any other, and whose help may be worked out when it is asked for."""

    late_epilog: Callable[[], str] | None = None

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help.")

    def format_help(self) -> str:
        if self.late_epilog is not None:
            self.epilog = self.late_epilog()
        return super().format_help()


def _parser() -> argparse.ArgumentParser:
    parser = _new(_Parser, prog="funcprobe", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"funcprobe {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser, required=True)
    _add_run(commands)
    _add_sweep(commands)
    _add_attribute(commands)
    _add_demo(commands)
    _add_sample(commands)
    return parser


def _add_run(commands: argparse._SubParsersAction[_Parser]) -> None:
    run = _new(commands.add_parser, "run", help="measure one step of a checkpoint", description=RUN)
    run.usage = "funcprobe run CONFIG.yaml [--key value ...]"
    run.late_epilog = _run_epilog
    run.add_argument("config", metavar="CONFIG.yaml", help="the configuration; it comes first")
    run.add_argument("overrides", metavar="--key value", nargs=argparse.REMAINDER, help="values that win over the file")


def _add_sweep(commands: argparse._SubParsersAction[_Parser]) -> None:
    sweep = _new(
        commands.add_parser, "sweep", help="measure it at many learning rates", description=SWEEP, epilog=SWEEP_EPILOG
    )
    sweep.usage = "funcprobe sweep CONFIG.yaml --lrs FIRST:LAST:COUNT [--chunk N] [--key value ...]"
    sweep.add_argument("config", metavar="CONFIG.yaml", help="the configuration; it comes first")
    sweep.add_argument(
        "overrides", metavar="--key value", nargs=argparse.REMAINDER, help="values that win over the file"
    )


def _add_attribute(commands: argparse._SubParsersAction[_Parser]) -> None:
    words = {"description": ATTRIBUTE, "epilog": ATTRIBUTE_EPILOG}
    found = _new(commands.add_parser, "attribute", help="say which parameters, prompts and tokens did it", **words)
    found.usage = "funcprobe attribute CONFIG.yaml [--influence ROWS] [--key value ...]"
    found.add_argument("config", metavar="CONFIG.yaml", help="the configuration; it comes first")
    found.add_argument(
        "overrides", metavar="--key value", nargs=argparse.REMAINDER, help="values that win over the file"
    )


def _add_demo(commands: argparse._SubParsersAction[_Parser]) -> None:
    demo = _new(commands.add_parser, "demo", help="run everything on a policy made on the spot", description=DEMO)
    demo.add_argument("--dir", metavar="DIR", help="where the demo is made (default: a cache folder)")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="of everything that is random (default: 0)")
    demo.add_argument("--force", action="store_true", help="make the demo anew even if it is there")


def _add_sample(commands: argparse._SubParsersAction[_Parser]) -> None:
    sample = _new(
        commands.add_parser, "sample", help="draw rollouts of a checkpoint", description=SAMPLE, epilog=SAMPLE_EPILOG
    )
    add = sample.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="Hugging Face or TRL folder")
    add("prompts", metavar="PROMPTS", help=".txt (a line each), .jsonl or .parquet (prompt or prompt_ids)")
    add("--temperature", type=float, required=True, metavar="T", help="required: run scores at this temperature too")
    add("--output", required=True, metavar="FILE", help="required: the .parquet or .jsonl file to write")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="longest completion (default: 256)")
    add("--group-size", type=int, default=1, metavar="N", help="completions a prompt (default: 1)")
    add("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    add("--reward", metavar="MODULE:FUNCTION", help="reward(prompts=, completions=) -> a number a completion")
    add("--batch-size", type=int, default=64, metavar="N", help="completions decoded together (default: 64)")
    add("--base-model", metavar="PATH", help="base of an adapter (default: as the adapter names it)")
    add("--dtype", default="float32", help="what the weights are loaded as (default: float32)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--force", action="store_true", help="replace FILE if it exists")


def _dispatch(options: argparse.Namespace) -> int:
    """Import what the command needs, which `--help` and `--version` do not wait for, and run it."""
    if options.command == "run":
        if {"-h", "--help"} & set(options.overrides):
            return main(["run", "--help"])
        from funcprobe.cli.run import run_config

        run_config(options.config, options.overrides)
    elif options.command == "sweep":
        if {"-h", "--help"} & set(options.overrides):
            return main(["sweep", "--help"])
        from funcprobe.cli.sweep import sweep_config

        sweep_config(options.config, options.overrides)
    elif options.command == "attribute":
        if {"-h", "--help"} & set(options.overrides):
            return main(["attribute", "--help"])
        from funcprobe.cli.attribute import attribute_config

        attribute_config(options.config, options.overrides)
    elif options.command == "sample":
        from funcprobe.cli.sample import sample_command

        sample_command(options)
    else:
        _demo(options)
    return 0


def _demo(options: argparse.Namespace) -> None:
    from funcprobe.cli.demo import prepare_demo
    from funcprobe.cli.progress import Bars
    from funcprobe.cli.run import run_config

    with Bars() as bars:
        config = prepare_demo(options.dir, seed=options.seed, force=options.force, progress=bars)
    # the results of an earlier demo are replaced; whatever else may stand in their place is not touched
    run_config(config, ["--output", str(config.parent / "results"), "--force"])
    print(f"Next:    funcprobe sweep {config} --lrs 1e-8:1e-3:11")
    print(f"         funcprobe attribute {config}")


def _run_epilog() -> str:
    from funcprobe.cli.config import describe_keys

    return RUN_EPILOG + describe_keys()


def _new(make: Callable[..., _Parser], *names: str, **options: Any) -> _Parser:
    return make(*names, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)


def _say(text: str, code: int) -> int:
    print(f"funcprobe: {' '.join(text.split())}", file=sys.stderr)
    return code


def _replace_what_cannot_be_printed() -> None:
    """Let a terminal without Unicode show a question mark, rather than end a finished run with a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
