"""Progress bars on standard error, for work that takes longer than two seconds, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import TracebackType
from typing import IO, Any

from funcprobe.cli import interrupts
from funcprobe.errors import missing_extra
from funcprobe.report.terminal import console

#: Seconds for which nothing is shown.
PATIENCE = 2.0


class Bars:
    """A context in which `bars(what, done, total)` moves a bar: the `progress` of funcprobe's functions.

    Between two calls of different names a pulse shows that something is under way. Nothing is drawn before a task has
    lasted `patience` seconds, and nothing at all where standard error is not a terminal.
    """

    def __init__(self, file: IO[str] | None = None, patience: float = PATIENCE) -> None:
        file = sys.stderr if file is None else file
        self._progress = _patient_progress(file, patience) if file.isatty() else None
        self._what: str | None = None
        self._task: Any = None

    def __enter__(self) -> Bars:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show `done` of `total`."""
        interrupts.check()
        if self._progress is None:
            return
        if what != self._what:
            self._begin(what, total)
        self._progress.update(self._task, completed=done, total=total)
        if done >= total:
            self.phase("working")

    def phase(self, what: str) -> None:
        """Show a pulse for something whose length is not known."""
        interrupts.check()
        self._begin(what, None)

    def _begin(self, what: str, total: int | None) -> None:
        if self._progress is None:
            return
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._what, self._task = what, self._progress.add_task(what, total=total)


def _patient_progress(file: IO[str], patience: float) -> Any:
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining
    except ImportError as error:
        missing = missing_extra("rich", "app", "showing progress")
        raise missing from error

    class Patient(Progress):
        def get_renderables(self) -> Iterable[Any]:
            yield self.make_tasks_table([task for task in self.tasks if (task.elapsed or 0.0) >= patience])

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), Remaining())
    return Patient(*columns, console=console(file), transient=True)
