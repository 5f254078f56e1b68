"""Pieces of work on threads: side by side, in order, and whole."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.inference.side_by_side import side_by_side


def failing(message: str) -> Callable[[], int]:
    def fail() -> int:
        raise ValueError(message)

    return fail


async def test_pieces_run_at_the_same_time_and_answer_in_their_order() -> None:
    both = threading.Barrier(2)
    with ThreadPoolExecutor(2) as executor:
        pieces = [lambda: both.wait(10.0) * 0 + 1, lambda: both.wait(10.0) * 0 + 2]
        assert await side_by_side(executor, pieces) == [1, 2]


async def test_one_thread_is_enough_for_any_number_and_none_need_no_thread() -> None:
    with ThreadPoolExecutor(1) as executor:
        assert await side_by_side(executor, [lambda: 1, lambda: 2, lambda: 3]) == [1, 2, 3]
    assert await side_by_side(executor, []) == []  # It is shut down.


async def test_the_first_in_order_that_failed_is_raised_when_all_have_ended() -> None:
    ended = threading.Event()
    with ThreadPoolExecutor(3) as executor:

        def late() -> int:
            threading.Event().wait(0.05)
            ended.set()
            raise ValueError("first")

        with pytest.raises(ValueError, match="first"):
            await side_by_side(executor, [late, failing("second"), lambda: 3])
        assert ended.is_set()


async def test_who_gives_up_is_not_disturbed_by_what_ends_later() -> None:
    unhandled: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    gate = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        waiting = asyncio.create_task(side_by_side(executor, [lambda: gate.wait(10.0)]))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        gate.set()
    await asyncio.sleep(0.01)
    assert unhandled == []
