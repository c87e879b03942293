"""Trackers as sinks: names that are none, packages that are not there, and (marked) the real ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from funcprobe.errors import InputError, MissingExtraError
from funcprobe.integrations.trackers import SINKS, sinks_of
from funcprobe.live.sinks import scalars_of
from funcprobe.results.window import Window
from tests.cases import ledgers
from tests.cases.ledgers import Loop
from tests.cases.packages import Install, install  # noqa: F401  a fixture


def run(folder: Path, tracker: Any) -> list[Window]:
    """Train two generations, told to a tracker, the first of them opened."""
    loop = Loop()
    book = ledgers.ledger(loop, folder, open_every=2, sinks=sinks_of([tracker], folder))
    windows = loop.run(book, 2)
    book.close()
    return windows


def test_a_name_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="no tracker 'tensorbored'; expected one of tensorboard, wandb, mlflow, trackio"
    ):
        sinks_of(["tensorbored"], tmp_path)
    with pytest.raises(InputError, match="A tracker is int; expected a name, or an object with scalars"):
        sinks_of([3], tmp_path)  # type: ignore[list-item]


@pytest.mark.parametrize("name", SINKS)
def test_a_package_that_is_not_there_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = {"tensorboard": "torch.utils.tensorboard"}.get(name, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"tracker '{name}' needs .*funcprobe\[trackers\]"):
        sinks_of([name], tmp_path)


@pytest.mark.trackers
def test_tensorboard_has_the_numbers(tmp_path: Path) -> None:
    windows = run(tmp_path, "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path)).Reload()
    for name, value in scalars_of(windows[1]).items():
        event = next(e for e in found.Scalars(name) if e.step == 1)
        assert event.value == pytest.approx(value, rel=1e-6), name  # float32 in the file


@pytest.mark.trackers
def test_wandb_has_the_numbers_and_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    with pytest.raises(InputError, match="wandb has no run open"):
        sinks_of(["wandb"], tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    opened = wandb.init(mode="offline", dir=str(tmp_path), project="test")
    windows = run(tmp_path / "ledger", "wandb")
    summary = dict(opened.summary)
    opened.finish()
    for name, value in scalars_of(windows[1]).items():
        assert summary[name] == pytest.approx(value), name
    assert summary["funcprobe/step"] == 1
    assert list(tmp_path.rglob("*.html"))


@pytest.mark.trackers
def test_mlflow_has_the_numbers_and_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow

    mlflow.set_tracking_uri(f"file://{tmp_path}/store")
    windows = run(tmp_path / "ledger", "mlflow")
    assert mlflow.active_run() is None, "the run that was begun here is ended here"
    (found,) = mlflow.search_runs(output_format="list")
    for name, value in scalars_of(windows[1]).items():
        assert found.data.metrics[name] == pytest.approx(value), name
    assert list(tmp_path.rglob("tokens-0000000.html"))


@pytest.mark.trackers
def test_trackio_has_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import trackio

    with pytest.raises(InputError, match="trackio has no run open"):
        sinks_of(["trackio"], tmp_path)
    trackio.init(project="test", name="run")
    windows = run(tmp_path / "ledger", "trackio")
    trackio.finish()
    from trackio.sqlite_storage import SQLiteStorage

    rows = {row["funcprobe/step"]: row for row in SQLiteStorage.get_logs("test", "run")}
    for window in windows:
        for name, value in scalars_of(window).items():
            assert rows[window.last][name] == pytest.approx(value), name


def test_another_packages_sink_is_found(tmp_path: Path, install: Install) -> None:  # noqa: F811
    kept = tmp_path / "kept.json"
    source = (
        "import json, pathlib\n"
        "class Lines:\n"
        "    def __init__(self, folder): self.rows = {}\n"
        "    def scalars(self, step, values): self.rows[step] = dict(values)\n"
        "    def page(self, step, name, text): pass\n"
        f"    def close(self): pathlib.Path({str(kept)!r}).write_text(json.dumps(self.rows))\n"
    )
    install("lines-sink", {"funcprobe.sinks": {"lines": "lines_sink:Lines"}}, source)
    windows = run(tmp_path / "ledger", "lines")
    assert json.loads(kept.read_text())["1"] == scalars_of(windows[1])
