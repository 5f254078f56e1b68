"""A change that an engine's thread makes between two passes, and somebody else waits for."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future


class TimedChange:
    """Attributes:
    done: Seconds that the change took, or what it raised.
    """

    def __init__(self, change: Callable[[], None]) -> None:
        self._change = change
        self.done: Future[float] = Future()

    def __call__(self) -> None:
        """On the engine's thread; never raises."""
        started_s = time.perf_counter()
        try:
            self._change()
        except Exception as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(time.perf_counter() - started_s)
