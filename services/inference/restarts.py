"""Whether and when an engine that died is started again. Pure."""

from __future__ import annotations

# An engine that served for so long was no failure to start: what it died of is another reason than the last one's.
PROVEN_S = 60.0
_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 8.0


class RestartPolicy:
    """The first time at once, then after waits that double; not at all after more than limit deaths with no engine between
    that served for PROVEN_S.

    An engine that dies again and again has a reason that starting it does not remove, and somebody has to be told. How long
    starts take does not count: a large model's can take a minute.
    """

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._num_deaths = 0

    def died(self, served_s: float) -> float | None:
        """Seconds to wait before the next start; None: give up.

        Args:
            served_s: For how long the engine had been ready; 0 for one that never was.
        """
        if served_s >= PROVEN_S:
            self._num_deaths = 0
        self._num_deaths += 1
        if self._num_deaths > self._limit:
            return None
        if self._num_deaths == 1:
            return 0.0
        num_doublings = min(self._num_deaths - 2, 10)  # Who allows a million deaths gets no number that is too large.
        return min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0**num_doublings)
