"""`funcprobe run`: from a configuration to a result on disk, or one calm line and nothing on disk."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from funcprobe import __version__
from funcprobe.analysis.probe import probe
from funcprobe.cli.config import Config, dump, load_config
from funcprobe.cli.prepare import check_output, collected_warnings, memory_advice, prepared, resolved
from funcprobe.cli.progress import Bars
from funcprobe.data.atomic import fresh_directory
from funcprobe.report.figures import save_figure
from funcprobe.report.terminal import print_summary, summary_text
from funcprobe.results.probe import ProbeResult

#: What a run writes; a folder that holds anything else is not replaced, forced or not.
WRITTEN = {"result.json", "config.yaml", "summary.txt", "measured_vs_predicted.png", "update.safetensors"}


def run_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ProbeResult:
    """Run a configuration file, print the summary, and say last where the results are.

    Raises:
        FuncprobeError: If anything about the input is not usable; then nothing was written.
    """
    config = load_config(path, overrides)
    with Bars() as bars:
        result = run(config, bars)
    print_summary(result)
    print(f"Results: {config.output}")
    return result


def run(config: Config, bars: Bars | None = None) -> ProbeResult:
    """Run a configuration and write `config.output`, whole or not at all.

    Raises:
        ConfigError: If the output folder may not be written, or a field asks for what cannot be done.
        FuncprobeError: If checkpoint, rollouts or numbers are not usable.
    """
    bars = bars or Bars()
    check_output(config.output, WRITTEN, force=config.force)
    config = resolved(config)
    with collected_warnings() as said:
        ready = prepared(config, bars)
        bars.phase("gradient on U")
        with memory_advice(config):
            result = probe(
                ready.step.policy,
                *ready.given,
                progress=bars,
                **config.probing(),
            )
    result = dataclasses.replace(result, warnings=tuple(dict.fromkeys([*said, *result.warnings])))
    bars.phase("writing the results")
    _write(config, result)
    return result


def _write(config: Config, result: ProbeResult) -> None:
    with fresh_directory(config.output, overwrite=config.force) as folder:
        result.write_into(folder)
        (folder / "config.yaml").write_text(
            f"# As run by funcprobe {__version__}; every path is absolute.\n{dump(config)}", encoding="utf-8"
        )
        (folder / "summary.txt").write_text(summary_text(result), encoding="utf-8")
        save_figure(result, folder / "measured_vs_predicted.png")
