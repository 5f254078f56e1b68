"""A session's last refusals, for people. Pure: the clock is an argument, in seconds.

A robot that does something wrong does it at its control rate. Refusals for one reason that come close together are a
burst: one record with a count, and one line in the log, with another a minute while it goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

BURSTS_KEPT = 16
# A burst ends when nothing of its kind came for so long.
QUIET_S = 5.0
LOGGED_AGAIN_AFTER_S = 60.0
MAX_MESSAGE_CHARACTERS = 500


@dataclass(kw_only=True)
class Burst:
    """Refusals for one reason.

    Attributes:
        reason: A number of the contract's RefusalReason.
        field, message: Of the last one.
        of_question: Of questions to the text head, not of observations.
    """

    reason: int
    field: str
    message: str
    first_s: float
    last_s: float
    last_request_id: int
    logged_s: float
    of_question: bool
    count: int = 1
    logged_count: int = 1


class RefusalLog:
    """The newest bursts, oldest first."""

    def __init__(self) -> None:
        self._bursts: deque[Burst] = deque(maxlen=BURSTS_KEPT)

    def __iter__(self) -> Iterator[Burst]:
        """Ordered by their last refusal."""
        return iter(sorted(self._bursts, key=lambda burst: burst.last_s))

    def __len__(self) -> int:
        return len(self._bursts)

    def add(self, *, reason: int, field: str, message: str, request_id: int, now_s: float, of_question: bool = False) -> int:
        """How many refusals a line in the log now speaks for; 0 means that none is due."""
        message, field = message[:MAX_MESSAGE_CHARACTERS], field[:MAX_MESSAGE_CHARACTERS]
        bursts = (b for b in self._bursts if (b.reason, b.of_question) == (reason, of_question))
        burst = next((b for b in bursts if now_s - b.last_s <= QUIET_S), None)
        if burst is None:
            burst = Burst(
                reason=reason,
                field=field,
                message=message,
                first_s=now_s,
                last_s=now_s,
                last_request_id=request_id,
                logged_s=now_s,
                of_question=of_question,
            )
            self._bursts.append(burst)
            return 1
        burst.count += 1
        burst.field, burst.message, burst.last_s, burst.last_request_id = field, message, now_s, request_id
        if now_s - burst.logged_s < LOGGED_AGAIN_AFTER_S:
            return 0
        speaks_for, burst.logged_count, burst.logged_s = burst.count - burst.logged_count, burst.count, now_s
        return speaks_for

    @property
    def last_message(self) -> str:
        """Empty where nothing was refused."""
        return max(self._bursts, key=lambda burst: burst.last_s).message if self._bursts else ""
