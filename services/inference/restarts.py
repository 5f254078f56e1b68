"""Whether and when an engine that died is started again. Pure: the clock is an argument."""

from __future__ import annotations

from collections import deque

WITHIN_S = 60.0
_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 8.0


class RestartPolicy:
    """The first time at once, then after waits that double; not at all after more than limit deaths within WITHIN_S.

    An engine that dies again and again has a reason that starting it does not remove, and somebody has to be told.
    """

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._deaths_s: deque[float] = deque()

    def died(self, now_s: float) -> float | None:
        """Seconds to wait before the next start; None: give up."""
        self._deaths_s.append(now_s)
        while now_s - self._deaths_s[0] > WITHIN_S:
            self._deaths_s.popleft()
        lately = len(self._deaths_s)
        if lately > self._limit:
            return None
        return 0.0 if lately == 1 else min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** (lately - 2))
