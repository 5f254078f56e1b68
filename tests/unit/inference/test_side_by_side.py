"""Pieces of work on threads: side by side, in order, and whole."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest

from services.inference.side_by_side import side_by_side


async def answer(executor: Executor, pieces: list[Callable[[], int]], here: int | None = None) -> list[int]:
    told: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()

    def done(outcome: list[int] | BaseException) -> None:
        if isinstance(outcome, BaseException):
            told.set_exception(outcome)
        else:
            told.set_result(outcome)

    side_by_side(executor, pieces, done, here=here)
    return await told


def failing(message: str) -> Callable[[], int]:
    def fail() -> int:
        raise ValueError(message)

    return fail


@pytest.mark.parametrize("here", [None, 0, 1])
async def test_pieces_run_at_the_same_time_and_answer_in_their_order(here: int | None) -> None:
    both = threading.Barrier(2)
    with ThreadPoolExecutor(2) as executor:
        pieces = [lambda: both.wait(10.0) * 0 + 1, lambda: both.wait(10.0) * 0 + 2]
        assert await answer(executor, pieces, here) == [1, 2]


async def test_one_thread_is_enough_for_any_number_and_none_need_no_thread() -> None:
    with ThreadPoolExecutor(1) as executor:
        assert await answer(executor, [lambda: 1, lambda: 2, lambda: 3]) == [1, 2, 3]
    assert await answer(executor, []) == []  # It is shut down.


async def test_the_piece_for_this_thread_runs_here_and_where_it_is_the_last_one_that_is_told_at_once() -> None:
    told: list[object] = []
    with ThreadPoolExecutor(1) as executor:
        side_by_side(executor, [threading.get_ident], told.append, here=0)
    assert told == [[threading.get_ident()]]


@pytest.mark.parametrize("here", [None, 1, 2])
async def test_the_first_in_order_that_failed_is_raised_when_all_have_ended(here: int | None) -> None:
    ended = threading.Event()
    with ThreadPoolExecutor(3) as executor:

        def late() -> int:
            threading.Event().wait(0.05)
            ended.set()
            raise ValueError("first")

        with pytest.raises(ValueError, match="first"):
            await answer(executor, [late, failing("second"), lambda: 3], here)
        assert ended.is_set()
