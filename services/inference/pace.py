"""How fast one robot's requests are taken. Pure: the clock is an argument, in seconds."""

from __future__ import annotations


class Pace:
    """At most per_s requests a second over time, and burst of them at once after a silence.

    Args:
        per_s: > 0.
        burst: At least 1.
    """

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s = per_s
        self._burst = float(burst)
        self._left = float(burst)
        self._counted_s = float("-inf")

    def take(self, now_s: float) -> float:
        """Counts a request; answers for how many seconds the next one is to wait."""
        if self._left < self._burst:
            self._left = min(self._burst, self._left + (now_s - self._counted_s) * self._per_s)
        self._counted_s = now_s
        self._left -= 1.0
        return max(0.0, -self._left / self._per_s)
