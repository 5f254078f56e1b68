"""When a robot is expected to ask again."""

from __future__ import annotations

import asyncio
import time

import pytest

from services.inference import next_request
from services.inference.next_request import LONGEST_S, REGULAR_S, SHORTEST_S, NextRequest, next_s


@pytest.mark.parametrize(
    ("came_s", "expected_s"),
    [
        ((1.0, 1.1, 1.2), 1.3),
        ((1.0, 1.1, 1.2 + REGULAR_S / 2), 1.3 + REGULAR_S),
        ((1.0, 1.1, 1.2 + REGULAR_S * 2), None),
        ((1.0, 1.1, 1.2 - REGULAR_S * 2), None),
        ((0.0, 0.0, 1.0), None),
        ((0.0, SHORTEST_S / 2, SHORTEST_S), None),
        ((0.0, LONGEST_S * 2, LONGEST_S * 4), None),
    ],
)
def test_the_next_request_comes_in_the_rhythm_of_the_last_ones(
    came_s: tuple[float, float, float], expected_s: float | None
) -> None:
    assert next_s(came_s) == (None if expected_s is None else pytest.approx(expected_s))


def regular() -> tuple[NextRequest, list[float], float]:
    """Of a robot that has just asked, as a tenth of a second ago and two; when it is rehearsed; and now."""
    rehearsed: list[float] = []
    asks = NextRequest(lambda: rehearsed.append(time.monotonic()), time.monotonic)
    now_s = time.monotonic()
    for at_s in (now_s - 0.2, now_s - 0.1, now_s):
        asks.came(at_s)
    return asks, rehearsed, now_s


async def test_a_rehearsal_comes_before_the_next_request_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_request, "AHEAD_S", 0.05)
    asks, rehearsed, now_s = regular()
    asks.answered()
    asks.answered()
    await asyncio.sleep(0.3)
    [rehearsed_s] = rehearsed
    assert rehearsed_s - now_s > 0.04


@pytest.mark.parametrize("why", ["it came already", "the stream is over", "it is too late for one"])
async def test_there_is_no_rehearsal_where(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_request, "AHEAD_S", 1.0 if why == "it is too late for one" else 0.05)
    asks, rehearsed, now_s = regular()
    asks.answered()
    if why == "it came already":
        asks.came(now_s + 0.1)
    elif why == "the stream is over":
        asks.stop()
    await asyncio.sleep(0.15)
    assert rehearsed == []
