"""How far the engine is with loading and preparing: a bar where somebody watches, a line of the log for each phase else."""

from __future__ import annotations

import logging
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

logger = logging.getLogger(__name__)


class StartProgress:
    """Shows phases one below the other on standard error; use as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self._is_seen = console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, disable=not self._is_seen, transient=True)
        self._tasks: dict[str, TaskID] = {}

    def show(self, phase: str, done: int, total: int) -> None:
        """total 0: how much there is to do is not known."""
        if phase not in self._tasks:
            for task in self._tasks.values():
                self._bar.stop_task(task)
            self._tasks[phase] = self._bar.add_task(phase, total=total or None)
            if not self._is_seen:
                logger.info("%s", phase)
        self._bar.update(self._tasks[phase], completed=done, total=total or None)

    def __enter__(self) -> StartProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
