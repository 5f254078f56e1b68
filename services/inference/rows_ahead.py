"""What is known of rows whose pictures are still being decoded, so that the engine prepares the rest meanwhile."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from .engine_port import Row

MadeT = TypeVar("MadeT")


def inputs_of(row: Row) -> Hashable:
    """All that a row says but its pictures, exactly: two rows with the same have the same prompt, noise and prefix."""
    vectors = tuple(
        (name, array.dtype.str, array.tobytes()) for name, array in row.sample.observation.items() if array.ndim == 1
    )
    prefix = None if row.prefix is None else (row.prefix.shape, row.prefix.tobytes())
    return row.sample.task, vectors, prefix, row.delay_steps, row.execution_horizon, row.seed


class RowsAhead(Generic[MadeT]):
    """Things made ahead, each for one row that may come or not. Any thread.

    Args:
        limit: Things kept; the oldest makes room, its row is prepared when it comes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._made: OrderedDict[Hashable, MadeT] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._made)

    def put(self, inputs: Hashable, made: MadeT) -> None:
        with self._lock:
            self._made[inputs] = made
            if len(self._made) > self._limit:
                self._made.popitem(last=False)

    def take(self, inputs: Hashable) -> MadeT | None:
        """What was made of exactly these inputs, once; None where nothing was."""
        with self._lock:
            return self._made.pop(inputs, None)

    def clear(self) -> None:
        with self._lock:
            self._made.clear()
