"""`funcprobe attribute`: which parameters, prompts and tokens did it: tables, pictures and pages of tokens."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from funcprobe import __version__
from funcprobe.analysis.attribute import attribute
from funcprobe.attribution.part_bars import BARRED
from funcprobe.attribution.token_tables import TOKEN_TABLES, Columns
from funcprobe.cli.command import Beside, Command, told
from funcprobe.cli.config import Config
from funcprobe.cli.options import Option
from funcprobe.cli.prepare import prepared
from funcprobe.cli.progress import Bars
from funcprobe.errors import ConfigError, Note, missing_extra
from funcprobe.report.heat_map import environment, heat_map
from funcprobe.results.attribution import Attribution

DESCRIPTION = """\
Take the step that `run` measures, and say which parameters, prompts and tokens
moved the entropy: every part in the same unit, summing to the first order.
Writes tables (parquet), charts (PNG) and two pages (HTML) that colour every
token of U and of E by what it contributed."""

EPILOG = """\
example:
  funcprobe attribute config.yaml
  funcprobe attribute config.yaml --influence prompts --lr 2e-7 --output who

The configuration is that of `run`, whose keys may be given here as well (see
`funcprobe run --help`). Results go to OUTPUT-attribution: open batch.html."""

BATCHES: tuple[Literal["batch", "evaluation"], ...] = ("batch", "evaluation")

#: Tables of the parameters that are written.
PARAMETERS = ("parameters", "layers", "kinds")

FIGURES = frozenset({"layers", "kinds", "tokens", "prompts", "influence"})
PAGES = frozenset(f"{of}.html" for of in BATCHES)
TABLES = frozenset(
    f"{name}.parquet"
    for name in (*PARAMETERS, "influence", *(f"{of}-{table}" for of in BATCHES for table in TOKEN_TABLES))
)


def _check(config: Config, options: Namespace) -> None:
    """Refuse impossible options before the passes and not after them.

    Raises:
        ConfigError: If mode or error bars are not those of contributions.
        MissingExtraError: If jinja2 or pyarrow is not installed.
    """
    if config.mode == "reverse":
        raise ConfigError("mode: reverse keeps no tangents of tokens, which contributions are made of; use auto.")
    if options.bars_of and (config.bars is None or options.form == "jacobian"):
        what = "bars none" if config.bars is None else "form jacobian, in which parts are no pieces of the step"
        raise ConfigError(f"--bars-of: can do nothing with {what}; leave one of them out.")
    environment()
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        missing = missing_extra("pyarrow", "app", "writing tables")
        raise missing from error


def _do(config: Config, options: Namespace, bars: Bars) -> Attribution:
    ready = prepared(config, bars)
    return attribute(
        ready.update,
        ready.evaluation,
        config.observables,
        form=options.form,
        influence=options.influence,
        bars_of=options.bars_of,
        tokenizer=ready.tokenizer,
        progress=bars,
        **config.options(),
    )


def _warned(result: Attribution, warned: Sequence[Note]) -> Attribution:
    outcome = told(result.probe.outcome, warned)
    return dataclasses.replace(result, probe=dataclasses.replace(result.probe, outcome=outcome))


def tables_of(attribution: Attribution) -> Iterator[tuple[str, Columns]]:
    """Yield (name of the file, columns) of every table that is written."""
    for of in BATCHES:
        for name in TOKEN_TABLES:
            yield f"{of}-{name}", attribution.columns(name, of)
    for name in PARAMETERS:
        yield name, attribution.columns(name)
    if attribution.influence is not None:
        yield "influence", attribution.columns("influence")


def _save_tables(result: Attribution, folder: Path) -> None:
    for name, columns in tables_of(result):
        _write_table(folder / f"{name}.parquet", columns, result)


def _save_pages(result: Attribution, folder: Path) -> None:
    for of in BATCHES:
        heat_map(result, folder / f"{of}.html", of)


def _write_table(path: Path, columns: Columns, attribution: Attribution) -> None:
    """Write a table, with the unit of its contributions in the file's own metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = {"funcprobe": __version__, "observable": attribution.observable, "unit": attribution.unit}
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd")


FORM = Option(
    "form",
    "additive|jacobian|auto",
    "additive: the step as offset + scale x gradient, so that tokens, momentum and weight decay sum; jacobian: what if "
    "a token weighed a little less; auto: additive where there is one",
    default="auto",
    choices=("auto", "additive", "jacobian"),
)
INFLUENCE = Option(
    "influence",
    "sequences|prompts",
    "also what every sequence of U did to every sequence or prompt of E: the gradient of every row of either batch",
    choices=("sequences", "prompts"),
)
BARS_OF = Option(
    "bars-of",
    "ledger,layers,...",
    f"error bars of every row of these tables: {', '.join(BARRED)}; two forward passes over E a row, and for a row of "
    "U its gradient",
    default=(),
    choices=BARRED,
    several=True,
)

COMMAND = Command(
    name="attribute",
    description=DESCRIPTION,
    epilog=lambda: EPILOG,
    done="attributed",
    do=_do,
    warned=_warned,
    options=(INFLUENCE, FORM, BARS_OF),
    suffix="-attribution",
    check=_check,
    figures=FIGURES,
    beside=(Beside(TABLES, _save_tables), Beside(PAGES, _save_pages)),
)
