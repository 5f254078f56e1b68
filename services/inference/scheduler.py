"""Which robot's observation runs next. Pure decisions: no torch, no grpc, no threads, the clock is an argument.

Earliest deadline first. A pass takes whatever waits when the model is free and never waits for more rows. At most one
observation of a robot waits: a newer one takes the older one's place in line, so a robot that updates often is not starved
by its own updates, and one that was refused for being late goes to the front with its next observation. A row joins a batch
only when the bigger batch still makes the deadline of every row in it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

PayloadT = TypeVar("PayloadT")

# Weight of the newest measurement, as in TCP's round-trip estimate (RFC 6298): mean 1/8, deviation 1/4.
_MEAN_GAIN = 1 / 8
_DEVIATION_GAIN = 1 / 4
# Without new measurements an estimate halves each second: one stall must not make the service refuse everybody for good.
_FORGET_AFTER_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Work(Generic[PayloadT]):
    """One request, ready to run.

    Attributes:
        owner: The session; at most one work of an owner waits.
        group: Only works of one group share a pass: same model, same shapes.
        arrived_s, deadline_s: On the scheduler's clock.
    """

    owner: str
    request_id: int
    group: Hashable
    arrived_s: float
    deadline_s: float
    payload: PayloadT


@dataclass(frozen=True, kw_only=True)
class Decision(Generic[PayloadT]):
    """What to run now (perhaps nothing), and what can no longer be answered in time."""

    batch: tuple[Work[PayloadT], ...]
    late: tuple[Work[PayloadT], ...]


@dataclass(kw_only=True)
class _Measured:
    mean_s: float
    deviation_s: float
    at_s: float


class ServiceTimes:
    """How long a pass takes, by group and number of rows, learned from the passes that ran."""

    def __init__(self) -> None:
        self._measured: dict[Hashable, dict[int, _Measured]] = {}

    def observe(self, group: Hashable, num_rows: int, duration_s: float, now_s: float) -> None:
        by_rows = self._measured.setdefault(group, {})
        known = by_rows.get(num_rows)
        if known is None or now_s - known.at_s > 10 * _FORGET_AFTER_S:
            by_rows[num_rows] = _Measured(mean_s=duration_s, deviation_s=0.0, at_s=now_s)
            return
        error_s = duration_s - known.mean_s
        known.mean_s += _MEAN_GAIN * error_s
        known.deviation_s += _DEVIATION_GAIN * (abs(error_s) - known.deviation_s)
        known.at_s = now_s

    def estimate_s(self, group: Hashable, num_rows: int, now_s: float) -> float:
        """A careful guess (mean and two deviations); 0 where nothing is known. Unseen sizes scale from a smaller one."""
        by_rows = self._measured.get(group)
        if not by_rows:
            return 0.0
        smaller = [rows for rows in by_rows if rows <= num_rows]
        known_rows = max(smaller) if smaller else min(by_rows)
        known = by_rows[known_rows]
        silent_s = max(0.0, now_s - known.at_s)
        forgotten: float = 0.5 ** max(0.0, silent_s / _FORGET_AFTER_S - 1.0)
        scale = max(1.0, num_rows / known_rows)
        return (known.mean_s + 2 * known.deviation_s) * scale * forgotten

    def mean_s(self, group: Hashable, num_rows: int) -> float | None:
        known = self._measured.get(group, {}).get(num_rows)
        return known.mean_s if known else None


class Scheduler(Generic[PayloadT]):
    """Waiting requests of all robots. Not thread-safe: whoever drives the model holds the lock.

    Args:
        max_batch: Rows in one pass.
        times: Estimates; shared with whoever measures.
    """

    def __init__(self, *, max_batch: int, times: ServiceTimes | None = None) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch ({max_batch}) must be at least 1")
        self.times = times or ServiceTimes()
        self._max_batch = max_batch
        self._waiting: dict[str, Work[PayloadT]] = {}
        # Deadlines that an owner's next request inherits for its place in line.
        self._place_s: dict[str, float] = {}
        self._busy_until_s = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def submit(self, work: Work[PayloadT], now_s: float) -> tuple[Work[PayloadT] | None, bool]:
        """Takes work in. Answers the older work it replaces, if any, and whether it was accepted.

        Not accepted: even if it ran next it could not make its deadline. The replaced work is gone in both cases, its robot
        has seen something newer.
        """
        replaced = self._waiting.pop(work.owner, None)
        if replaced is not None:
            self._inherit(replaced)
        free_s = max(now_s, self._busy_until_s)
        if free_s + self.times.estimate_s(work.group, 1, now_s) > work.deadline_s:
            self._inherit(work)
            return replaced, False
        self._waiting[work.owner] = work
        return replaced, True

    def next_batch(self, now_s: float) -> Decision[PayloadT]:
        """The rows to run now. Call it whenever the model is free and something waits, and started() with its batch."""
        late: list[Work[PayloadT]] = []
        batch: list[Work[PayloadT]] = []
        tightest_s = float("inf")
        for work in sorted(self._waiting.values(), key=self._rank):
            if now_s + self.times.estimate_s(work.group, 1, now_s) > work.deadline_s:
                late.append(work)
                continue
            if batch and (work.group != batch[0].group or len(batch) == self._max_batch):
                continue
            together_s = self.times.estimate_s(work.group, len(batch) + 1, now_s)
            if batch and now_s + together_s > min(tightest_s, work.deadline_s):
                continue
            batch.append(work)
            tightest_s = min(tightest_s, work.deadline_s)
        for work in late:
            del self._waiting[work.owner]
            self._inherit(work)
        for work in batch:
            del self._waiting[work.owner]
            self._place_s.pop(work.owner, None)
        if batch:
            self._busy_until_s = now_s + self.times.estimate_s(batch[0].group, len(batch), now_s)
        return Decision(batch=tuple(batch), late=tuple(late))

    def finished(self, batch: tuple[Work[PayloadT], ...], duration_s: float, now_s: float) -> None:
        """Reports a pass, so that estimates follow the machine."""
        self._busy_until_s = now_s
        if batch:
            self.times.observe(batch[0].group, len(batch), duration_s, now_s)

    def withdraw(self, owner: str) -> Work[PayloadT] | None:
        """Forgets an owner, whose session ended; answers what it had waiting."""
        self._place_s.pop(owner, None)
        return self._waiting.pop(owner, None)

    def _rank(self, work: Work[PayloadT]) -> tuple[float, float, str]:
        return (min(work.deadline_s, self._place_s.get(work.owner, work.deadline_s)), work.arrived_s, work.owner)

    def _inherit(self, work: Work[PayloadT]) -> None:
        self._place_s[work.owner] = min(work.deadline_s, self._place_s.get(work.owner, work.deadline_s))
