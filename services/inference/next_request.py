"""When a robot that asks regularly will ask again, so that what its request passes through can be woken a moment before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

# A rehearsal takes up to three milliseconds, and the loop's timers come up to one late; after some more all is cold again.
AHEAD_S = 0.006
# Two intervals that differ by more are no rhythm.
REGULAR_S = 0.002
# Who asks more often finds everything warm; who asks less often is not waited for.
SHORTEST_S, LONGEST_S = 0.02, 2.0


def next_s(came_s: tuple[float, float, float]) -> float | None:
    """When the next request will come, by when the last three came, in their order; None where there is no rhythm."""
    first_s, second_s, third_s = came_s
    interval_s = third_s - second_s
    if not SHORTEST_S <= interval_s <= LONGEST_S or abs(interval_s - (second_s - first_s)) > REGULAR_S:
        return None
    return third_s + interval_s


class NextRequest:
    """Of one stream, on its loop.

    Args:
        rehearse: Called AHEAD_S before a request is likely to come, unless it came already.
    """

    def __init__(self, rehearse: Callable[[], None], clock: Callable[[], float]) -> None:
        self._rehearse = rehearse
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._came_s = (0.0, 0.0, 0.0)
        self._timer: asyncio.TimerHandle | None = None

    def came(self, at_s: float) -> None:
        self.stop()
        self._came_s = (*self._came_s[1:], at_s)

    def answered(self) -> None:
        """Nothing of the robot's is in work any more."""
        self.stop()
        due_s = next_s(self._came_s)
        if due_s is not None and (wait_s := due_s - AHEAD_S - self._clock()) > 0:
            self._timer = self._loop.call_later(wait_s, self._rehearse)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
