"""Pieces of one request's work on several threads at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TypeVar, cast

ResultT = TypeVar("ResultT")


def side_by_side(
    executor: Executor,
    pieces: Sequence[Callable[[], ResultT]],
    done: Callable[[list[ResultT] | BaseException], None],
    *,
    here: int | None = None,
) -> None:
    """Tells done, on the loop and once, what the pieces answer, in their order, or what the first that failed raised.

    The loop is woken once, when the last piece is done: to the loop a request is one event, however many cameras it has.

    Args:
        executor: Whose threads run the pieces, from now on.
        here: A piece that this thread, the loop's, runs itself: to wake another one takes about as long as a small picture.
            Where all pieces have ended with it, done is told before this returns.
    """
    loop = asyncio.get_running_loop()
    results: list[ResultT | None] = [None] * len(pieces)
    errors: list[BaseException | None] = [None] * len(pieces)
    lock = threading.Lock()
    num_left = len(pieces)

    def run(index: int) -> bool:
        """Whether it was the last."""
        nonlocal num_left
        try:
            results[index] = pieces[index]()
        except BaseException as error:
            errors[index] = error
        with lock:
            num_left -= 1
            return num_left == 0

    def run_and_wake(index: int) -> None:
        if run(index):
            try:
                loop.call_soon_threadsafe(tell)
            except RuntimeError:  # The loop is closed: nobody listens any more.
                pass

    def tell() -> None:
        failed = next((error for error in errors if error is not None), None)
        done(cast("list[ResultT]", results) if failed is None else failed)

    for index in range(len(pieces)):
        if index != here:
            executor.submit(run_and_wake, index)
    if not pieces or (here is not None and run(here)):
        tell()
