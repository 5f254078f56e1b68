"""Pieces of one request's work on several threads at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from typing import TypeVar, cast

ResultT = TypeVar("ResultT")


def side_by_side(executor: Executor, pieces: Sequence[Callable[[], ResultT]]) -> Awaitable[list[ResultT]]:
    """What the pieces answer, in their order; each runs on a thread of the executor's, from now on.

    The loop is woken once, when the last piece is done: to the loop a request is one event, however many cameras it has.
    Awaiting raises what the first piece that failed raised, first in their order.
    """
    loop = asyncio.get_running_loop()
    all_done: asyncio.Future[None] = loop.create_future()
    results: list[ResultT | None] = [None] * len(pieces)
    errors: list[BaseException | None] = [None] * len(pieces)
    lock = threading.Lock()
    num_left = len(pieces)

    def tell() -> None:
        if not all_done.done():  # Whoever waited may have been cancelled.
            all_done.set_result(None)

    def run(index: int) -> None:
        nonlocal num_left
        try:
            results[index] = pieces[index]()
        except BaseException as error:
            errors[index] = error
        with lock:
            num_left -= 1
            is_last = num_left == 0
        if is_last:
            try:
                loop.call_soon_threadsafe(tell)
            except RuntimeError:  # The loop is closed: nobody listens any more.
                pass

    async def collect() -> list[ResultT]:
        await all_done
        for error in errors:
            if error is not None:
                raise error
        return cast("list[ResultT]", results)

    if not pieces:
        tell()
    for index in range(len(pieces)):
        executor.submit(run, index)
    return collect()
