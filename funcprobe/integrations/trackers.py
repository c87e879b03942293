"""Trackers as sinks of a ledger: TensorBoard, Weights & Biases, MLflow, Trackio; others by entry point.

    LedgerCallback("runs/ledger", trackers=["tensorboard"])

A tracker that a trainer has a run open on is written to that run, beside the trainer's own numbers and never through
them. Another package brings one as `[project.entry-points."funcprobe.sinks"]`: a function of the ledger's folder that
returns a `Sink`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from funcprobe import plugins
from funcprobe.errors import InputError, listed, missing_extra
from funcprobe.live.sinks import Sink


class TensorBoard:
    """Scalars in an event file of a folder; it takes no HTML."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise missing_extra("tensorboard", "trackers", "The tracker 'tensorboard'") from error
        self._writer: Any = SummaryWriter(str(folder))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Keep numbers of a step, on disk before this returns."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def page(self, step: int, name: str, text: str) -> None:
        """Do nothing: TensorBoard shows no HTML."""

    def close(self) -> None:
        """End the event file."""
        self._writer.close()


class WeightsAndBiases:
    """Scalars and pages in the run that is open; they have a step of their own, `funcprobe/step`."""

    def __init__(self, folder: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise missing_extra("wandb", "trackers", "The tracker 'wandb'") from error
        if wandb.run is None:
            raise InputError("wandb has no run open; train with report_to='wandb', or call wandb.init first.")
        self._html: Any = wandb.Html
        self._run: Any = wandb.run
        self._run.define_metric("funcprobe/step")
        self._run.define_metric("funcprobe/*", step_metric="funcprobe/step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Keep numbers of a step."""
        self._run.log({**values, "funcprobe/step": step})

    def page(self, step: int, name: str, text: str) -> None:
        """Keep a page."""
        self._run.log({name: self._html(text), "funcprobe/step": step})

    def close(self) -> None:
        """Do nothing: the run is ended by whoever opened it."""


class MLflow:
    """Scalars, and pages as artefacts, in the run that is active; else in one that is begun."""

    def __init__(self, folder: Path) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise missing_extra("mlflow", "trackers", "The tracker 'mlflow'") from error
        self._own = mlflow.active_run() is None
        self._mlflow: Any = mlflow
        self._run: str = (mlflow.start_run() if self._own else mlflow.active_run()).info.run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Keep numbers of a step."""
        self._mlflow.log_metrics(dict(values), step=step, run_id=self._run)

    def page(self, step: int, name: str, text: str) -> None:
        """Keep a page as an artefact."""
        self._mlflow.log_text(text, f"{name}-{step:07d}.html", run_id=self._run)

    def close(self) -> None:
        """End the run, if it was begun here."""
        if self._own:
            self._mlflow.end_run()


class Trackio:
    """Scalars in the run that is open; it takes no HTML."""

    def __init__(self, folder: Path) -> None:
        try:
            import trackio
            from trackio import context_vars
        except ImportError as error:
            raise missing_extra("trackio", "trackers", "The tracker 'trackio'") from error
        if context_vars.current_run.get() is None:
            raise InputError("trackio has no run open; train with report_to='trackio', or call trackio.init first.")
        self._trackio: Any = trackio

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Keep numbers of a step."""
        self._trackio.log({**values, "funcprobe/step": step})

    def page(self, step: int, name: str, text: str) -> None:
        """Do nothing: Trackio shows no HTML."""

    def close(self) -> None:
        """Do nothing: the run is ended by whoever opened it."""


SINKS: dict[str, Callable[[Path], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def sinks_of(trackers: Sequence[str | Sink], folder: Path) -> tuple[Sink, ...]:
    """Return the sinks of some trackers, by name or as they are; `folder` is the ledger's.

    Raises:
        InputError: If there is none of a name, it has no run open, or it is no sink.
        MissingExtraError: If its package is not installed.
    """
    return tuple(_sink(each, folder) for each in trackers)


def _sink(tracker: str | Sink, folder: Path) -> Sink:
    made = tracker
    if isinstance(tracker, str):
        make = plugins.find("sink", tracker, SINKS) or SINKS.get(tracker)
        if make is None:
            known = listed(plugins.names("sink", SINKS), 10)
            raise InputError(f"There is no tracker '{tracker}'; expected one of {known}, or an object of your own.")
        made = make(folder)
    if not isinstance(made, Sink):
        raise InputError(
            f"A tracker is {type(made).__name__}; expected a name, or an object with scalars, page, close."
        )
    return made
