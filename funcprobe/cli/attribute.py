"""`funcprobe attribute`: which parameters, prompts and tokens did it: tables, pictures and pages of tokens."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from funcprobe import __version__
from funcprobe.analysis.attribute import attribute
from funcprobe.attribution.part_bars import BARRED
from funcprobe.attribution.token_tables import TOKEN_TABLES, Columns
from funcprobe.cli.config import Config, dump, load_config
from funcprobe.cli.prepare import check_output, collected_warnings, memory_advice, prepared, resolved
from funcprobe.cli.progress import Bars
from funcprobe.data.atomic import fresh_directory
from funcprobe.errors import ConfigError, missing_extra
from funcprobe.report.attribution_figures import save_attribution_figures
from funcprobe.report.attribution_table import attribution_text, print_attribution
from funcprobe.report.heat_map import environment, heat_map
from funcprobe.results import attribution_file
from funcprobe.results.attribution import Attribution

BATCHES = ("update", "evaluation")

#: Tables of the parameters that are written.
PARAMETERS = ("parameters", "layers", "kinds")

#: Everything that an attribution writes; a folder that holds anything else is not replaced, forced or not.
WRITTEN = {"result.json", *attribution_file.FILES, "config.yaml", "summary.txt"}
WRITTEN |= {f"{name}.png" for name in ("layers", "kinds", "tokens", "prompts", "influence")}
WRITTEN |= {f"{of}.html" for of in BATCHES} | {f"{of}-{name}.parquet" for of in BATCHES for name in TOKEN_TABLES}
WRITTEN |= {f"{name}.parquet" for name in (*PARAMETERS, "influence")} | {"update.safetensors"}


class Asked(NamedTuple):
    """What the command takes beside a configuration."""

    form: Any = "auto"  #: "auto", "additive" or "jacobian"
    influence: Any = None  #: "sequences", "prompts" or None
    bars_of: tuple[str, ...] = ()  #: the tables whose rows get error bars


DEFAULT = Asked()

_CHOICES = {"form": ("auto", "additive", "jacobian"), "influence": ("sequences", "prompts"), "bars-of": BARRED}


def attribute_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Attribution:
    """Attribute the step of a configuration file, print who moved the entropy, and say last where the results are.

    Raises:
        FuncprobeError: If anything about the input is not usable; then nothing was written.
    """
    asked, rest = split_options(overrides)
    config = load_config(path, rest)
    if not any(word == "--output" or word.startswith("--output=") for word in rest):
        config = config.model_copy(update={"output": config.output.with_name(f"{config.output.name}-attribution")})
    with Bars() as bars:
        found = run_attribution(config, asked, bars)
    print_attribution(found)
    print(f"Results: {config.output}")
    return found


def run_attribution(config: Config, asked: Asked = DEFAULT, bars: Bars | None = None) -> Attribution:
    """Attribute a configuration's step and write `config.output`, whole or not at all.

    Raises:
        ConfigError: If the output folder may not be written, or a field asks for what cannot be done.
        FuncprobeError: If checkpoint, rollouts or numbers are not usable.
    """
    bars = bars or Bars()
    if config.mode == "reverse":
        raise ConfigError("mode: reverse keeps no tangents of tokens, which contributions are made of; use auto.")
    if asked.bars_of and (config.bars is None or asked.form == "jacobian"):
        what = "bars none" if config.bars is None else "form jacobian, in which parts are no pieces of the step"
        raise ConfigError(f"--bars-of: can do nothing with {what}; leave one of them out.")
    check_output(config.output, WRITTEN, force=config.force)
    config = resolved(config)
    _check_extras()
    with collected_warnings() as said:
        ready = prepared(config, bars)
        bars.phase("gradient on U")
        with memory_advice(config):
            found = attribute(
                ready.step.policy,
                *ready.given,
                form=asked.form,
                influence=asked.influence,
                bars_of=asked.bars_of,
                tokenizer=ready.tokenizer,
                progress=bars,
                **config.probing(),
            )
    warnings = tuple(dict.fromkeys([*said, *found.result.warnings]))
    found = dataclasses.replace(found, result=dataclasses.replace(found.result, warnings=warnings))
    bars.phase("writing the results")
    _write(config, found)
    return found


def split_options(words: Sequence[str]) -> tuple[Asked, list[str]]:
    """Return what the command takes beside a configuration, and the words that are overrides of the configuration.

    Raises:
        ConfigError: If an option stands twice, has no value or another than there is.

    Example:
        >>> split_options(["--influence", "prompts", "--lr", "1e-6"])
        (Asked(form='auto', influence='prompts', bars_of=()), ['--lr', '1e-6'])
    """
    found: dict[str, Any] = {}
    rest = list(words)
    for name, choices in _CHOICES.items():
        if (value := _taken_out(rest, name, choices[-1])) is None:
            continue
        several = [part.strip() for part in value.split(",")] if name == "bars-of" else [value]
        if wrong := [part for part in several if part not in choices]:
            listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
            raise ConfigError(f"--{name}: found '{wrong[0]}', expected {listed}.")
        found[name.replace("-", "_")] = tuple(several) if name == "bars-of" else value
    return Asked(**found), rest


def _taken_out(rest: list[str], name: str, example: str) -> str | None:
    """Return the value of an option, taken out of the words; None where it is not there.

    Raises:
        ConfigError: If it stands twice or has no value.
    """
    places = [i for i, word in enumerate(rest) if word == f"--{name}" or word.startswith(f"--{name}=")]
    if not places:
        return None
    if len(places) > 1:
        raise ConfigError(f"--{name} stands twice; give it once.")
    (i,) = places
    _, equals, value = rest[i].partition("=")
    if not equals and (i + 1 == len(rest) or rest[i + 1].startswith("--")):
        raise ConfigError(f"--{name} has no value; write --{name} {example}.")
    value = value if equals else rest[i + 1]
    rest[i : i + (1 if equals else 2)] = []
    return value


def tables_of(attribution: Attribution) -> Iterator[tuple[str, Columns]]:
    """Yield (name of the file, columns) of every table that is written."""
    for of in BATCHES:
        for name in TOKEN_TABLES:
            yield f"{of}-{name}", attribution.columns(name, of)  # type: ignore[arg-type]
    for name in PARAMETERS:
        yield name, attribution.columns(name)
    if attribution.influence is not None:
        yield "influence", attribution.columns("influence")


def _write(config: Config, attribution: Attribution) -> None:
    with fresh_directory(config.output, overwrite=config.force) as folder:
        attribution_file.write_into(attribution, folder)
        (folder / "config.yaml").write_text(
            f"# As attributed by funcprobe {__version__}; every path is absolute.\n{dump(config)}", encoding="utf-8"
        )
        (folder / "summary.txt").write_text(attribution_text(attribution), encoding="utf-8")
        for name, columns in tables_of(attribution):
            _write_table(folder / f"{name}.parquet", columns, attribution)
        save_attribution_figures(attribution, folder)
        for of in BATCHES:
            heat_map(attribution, folder / f"{of}.html", of)  # type: ignore[arg-type]


def _write_table(path: Path, columns: Columns, attribution: Attribution) -> None:
    """Write a table, with the unit of its contributions in the file's own metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    said = {"funcprobe": __version__, "observable": attribution.observable, "unit": attribution.unit}
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    pq.write_table(table.replace_schema_metadata(said), path, compression="zstd")


def _check_extras() -> None:
    """Find out now, and not after the passes, that something to write with is missing.

    Raises:
        MissingExtraError: If jinja2 or pyarrow is not installed.
    """
    environment()
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        missing = missing_extra("pyarrow", "app", "writing tables")
        raise missing from error
