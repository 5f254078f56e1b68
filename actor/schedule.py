"""When the next tick is due: an absolute schedule, so that a late tick never makes the following ones late."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

# The kernel wakes a sleeper some tens of microseconds late; the rest is waited for awake.
SPIN_S = 0.0002


class Clock(Protocol):
    """Monotonic seconds and a sleep; tests bring their own."""

    def now(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class MonotonicClock:
    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True, kw_only=True)
class TickTime:
    """One wait.

    Attributes:
        due_s: When the tick was to begin.
        lateness_s: How much later it began, >= 0.
        skipped_count: Whole periods that were lost before it; they are never made up for by a burst.
    """

    due_s: float
    lateness_s: float
    skipped_count: int


class Schedule:
    """Ticks at start, start + period, start + 2 periods, ... on one clock.

    Args:
        rate_hz: Ticks per second; 0 means as fast as the loop goes (simulated robots only).
        clock: Monotonic seconds.
    """

    def __init__(self, rate_hz: float, clock: Clock | None = None) -> None:
        self._clock = clock or MonotonicClock()
        self._period_s = 1.0 / rate_hz if rate_hz > 0 else 0.0
        self._origin_s = self._clock.now()
        self._index = 0

    def restart(self) -> None:
        """The next tick is due now: after a reset or another long pause."""
        self._origin_s = self._clock.now()
        self._index = 0

    def wait(self) -> TickTime:
        """Waits for the next tick. A tick more than a period late skips the periods that are over."""
        now_s = self._clock.now()
        if self._period_s == 0.0:
            return TickTime(due_s=now_s, lateness_s=0.0, skipped_count=0)
        # Multiplied out from the origin: adding periods up would drift by rounding.
        due_s = self._origin_s + self._index * self._period_s
        skipped = max(0, int((now_s - due_s) / self._period_s))
        self._index += skipped + 1
        due_s += skipped * self._period_s
        if now_s < due_s - SPIN_S:
            self._clock.sleep(due_s - SPIN_S - now_s)
            now_s = self._clock.now()
        while now_s < due_s:
            self._clock.sleep(0.0)
            now_s = self._clock.now()
        return TickTime(due_s=due_s, lateness_s=now_s - due_s, skipped_count=skipped)
