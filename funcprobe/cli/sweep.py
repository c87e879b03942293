"""`funcprobe sweep`: one gradient, many learning rates, a table and pictures; killed, it goes on from there."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path

from funcprobe import __version__
from funcprobe.analysis.sweep import check_lrs, sweep
from funcprobe.cli.config import Config, dump, load_config
from funcprobe.cli.prepare import check_output, collected_warnings, memory_advice, prepared, resolved
from funcprobe.cli.progress import Bars
from funcprobe.data.atomic import fresh_directory
from funcprobe.errors import ConfigError, InputError
from funcprobe.report.sweep_figures import save_sweep_figures
from funcprobe.report.sweep_table import print_sweep, sweep_text
from funcprobe.results.sweep import SweepResult

#: What a sweep writes; a folder that holds anything else is not replaced, forced or not.
WRITTEN = {"sweep.json", "sweep.csv", "config.yaml", "summary.txt", "sweep.png", "remainder.png"}
WRITTEN |= {f"sweep-{name}.png" for name in ("reward", "kl", "kl_before", "length")}


def sweep_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> SweepResult:
    """Sweep a configuration file, print the table, and say last where the results are.

    Raises:
        FuncprobeError: If anything about the input is not usable; then no results were written.
    """
    lrs, chunk, rest = split_options(overrides)
    config = load_config(path, rest)
    if not any(word == "--output" or word.startswith("--output=") for word in rest):
        config = config.model_copy(update={"output": config.output.with_name(f"{config.output.name}-sweep")})
    with Bars() as bars:
        result = run_sweep(config, lrs, chunk, bars)
    print_sweep(result)
    print(f"Results: {config.output}")
    return result


def run_sweep(config: Config, lrs: Sequence[float], chunk: int = 1, bars: Bars | None = None) -> SweepResult:
    """Sweep a configuration and write `config.output`, whole or not at all; finished points are kept beside it.

    Raises:
        ConfigError: If the output folder may not be written, or a field asks for what cannot be done.
        FuncprobeError: If checkpoint, rollouts or numbers are not usable.
    """
    bars = bars or Bars()
    check_output(config.output, WRITTEN, force=config.force)
    config, journal = resolved(config), journal_of(config)
    with collected_warnings() as said:
        ready = prepared(config, bars)
        bars.phase("gradient on U")
        with memory_advice(config):
            result = sweep(
                ready.step.policy,
                *ready.given,
                lrs=lrs,
                observables=config.observables,
                order=1 if config.order == 1 or config.mode == "reverse" else 2,
                chunk=chunk,
                journal=journal,
                progress=bars,
                **config.measuring(),
            )
    result = dataclasses.replace(result, warnings=tuple(dict.fromkeys([*said, *result.warnings])))
    bars.phase("writing the results")
    _write(config, result)
    journal.unlink()
    return result


def journal_of(config: Config) -> Path:
    """Return the file beside the output in which finished learning rates are kept until all are done."""
    return config.output.with_name(f"{config.output.name}.unfinished.jsonl")


def split_options(words: Sequence[str]) -> tuple[list[float], int, list[str]]:
    """Return the learning rates, how many go together, and the words that are overrides of the configuration.

    Raises:
        ConfigError: If `--lrs` is missing or cannot be read, or `--chunk` is no whole number above 0.

    Example:
        >>> split_options(["--lrs", "1e-8:1e-6:3", "--order", "1"])
        ([1e-08, 1e-07, 1e-06], 1, ['--order', '1'])
    """
    found: dict[str, str] = {}
    rest = list(words)
    for name in ("--lrs", "--chunk"):
        places = [i for i, word in enumerate(rest) if word == name or word.startswith(f"{name}=")]
        if len(places) > 1:
            raise ConfigError(f"{name} stands twice; give it once.")
        for i in places:
            _, equals, value = rest[i].partition("=")
            if not equals and i + 1 == len(rest):
                raise ConfigError(f"{name} has no value; write {name} VALUE.")
            found[name] = value if equals else rest[i + 1]
            rest[i : i + (1 if equals else 2)] = []
    if "--lrs" not in found:
        raise ConfigError("--lrs is missing; give learning rates as FIRST:LAST:COUNT, such as 1e-8:1e-4:9, or a list.")
    chunk = found.get("--chunk", "1")
    if not chunk.isdigit() or int(chunk) < 1:
        raise ConfigError(f"--chunk: found '{chunk}', expected how many learning rates go together, 1 or more.")
    return parse_lrs(found["--lrs"]), int(chunk), rest


def parse_lrs(text: str) -> list[float]:
    """Return the learning rates in `FIRST:LAST:COUNT`, evenly spread by factors, or in a comma-separated list.

    Raises:
        ConfigError: If the text is neither, or no sweep can be made of the rates.

    Example:
        >>> parse_lrs("1e-6, 3e-6")
        [1e-06, 3e-06]
    """
    wrong = ConfigError(
        f"--lrs: found '{text}', expected FIRST:LAST:COUNT, such as 1e-8:1e-4:9, or numbers and commas."
    )
    try:
        if ":" not in text:
            lrs = [float(part) for part in text.split(",") if part.strip()]
        else:
            first, last, count = text.split(":")
            lrs = _spread(float(first), float(last), int(count))
        check_lrs(lrs)
    except InputError as error:
        raise ConfigError(f"--lrs: {error}") from None
    except ValueError:
        raise wrong from None
    return lrs


def _spread(first: float, last: float, count: int) -> list[float]:
    """Return `count` numbers between two, evenly spread by factors; decimal powers come out as they are written.

    Raises:
        ValueError: If there are no two ends.
        InputError: If one of them is no learning rate.
    """
    if count < 2:
        raise ValueError("a range has two ends at least")
    check_lrs([first, last])
    low, high = math.log10(first), math.log10(last)
    return [first, *(float(f"{10 ** (low + (high - low) * k / (count - 1)):.6g}") for k in range(1, count - 1)), last]


def _write(config: Config, result: SweepResult) -> None:
    with fresh_directory(config.output, overwrite=config.force) as folder:
        result.write_into(folder)
        result.to_frame().to_csv(folder / "sweep.csv", index=False)
        (folder / "config.yaml").write_text(
            f"# As swept by funcprobe {__version__}; every path is absolute.\n{dump(config)}", encoding="utf-8"
        )
        (folder / "summary.txt").write_text(sweep_text(result), encoding="utf-8")
        save_sweep_figures(result, folder)
