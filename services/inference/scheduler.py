"""Which robot's observation runs next. Pure decisions: no torch, no grpc, no threads, the clock is an argument.

Earliest deadline first (line.py). A pass takes whatever waits when the model is free and never waits for more rows. A row
joins a batch only when the bigger batch should still make the deadline of every row in it, on a careful estimate; a row is
refused only when even at best it would be late, so that a single stall does not turn robots away. Whole passes: for engines
that prepare smaller units, unit_scheduler.py.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from .line import Line
from .service_times import ServiceTimes

PayloadT = TypeVar("PayloadT")


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
        self._line: Line[Work[PayloadT]] = Line()
        self._busy_at_least_until_s = 0.0

    def __len__(self) -> int:
        return len(self._line)

    def submit(self, work: Work[PayloadT], now_s: float) -> tuple[Work[PayloadT] | None, bool]:
        """Takes work in. Answers the older work it replaces, if any, and whether it was accepted.

        Not accepted: even if it ran next it would be late at best. The replaced work is gone in both cases, its robot
        has seen something newer.
        """
        replaced = self._line.replace(work.owner)
        free_s = max(now_s, self._busy_at_least_until_s)
        if free_s + self.times.at_best_s(work.group, 1, now_s) > work.deadline_s:
            self._line.inherit(work)
            return replaced, False
        self._line.add(work)
        return replaced, True

    def next_batch(self, now_s: float) -> Decision[PayloadT]:
        """The rows to run now. Call it whenever the model is free and something waits, and finished() after the pass."""
        late: list[Work[PayloadT]] = []
        feasible: list[Work[PayloadT]] = []
        for work in self._line.ordered():
            at_best_s = now_s + self.times.at_best_s(work.group, 1, now_s)
            (late if at_best_s > work.deadline_s else feasible).append(work)
        num_given_up = self._num_to_give_up(feasible, now_s)
        late += feasible[:num_given_up]
        batch = self._fill(feasible[num_given_up:], now_s)
        for work in late:
            self._line.refuse(work)
        for work in batch:
            self._line.start(work)
        if batch:
            self._busy_at_least_until_s = now_s + self.times.at_best_s(batch[0].group, len(batch), now_s)
        return Decision(batch=tuple(batch), late=tuple(late))

    def _fill(self, ordered: Sequence[Work[PayloadT]], now_s: float) -> list[Work[PayloadT]]:
        """The first row and those of its group that can join without making one of them late."""
        batch: list[Work[PayloadT]] = []
        tightest_s = float("inf")
        for work in ordered:
            if batch:
                if work.group != batch[0].group or len(batch) == self._max_batch:
                    continue
                together_s = self.times.careful_s(work.group, len(batch) + 1, now_s)
                if now_s + together_s > min(tightest_s, work.deadline_s):
                    continue
            batch.append(work)
            tightest_s = min(tightest_s, work.deadline_s)
        return batch

    def _num_to_give_up(self, ordered: Sequence[Work[PayloadT]], now_s: float) -> int:
        """How many of the first rows to refuse although they could still run, 0 nearly always.

        Under overload the first rows have hardly any time left, allow only small batches, and so make all that follow late
        as well. They are given up when that saves more rows than it costs.
        """
        batch = self._fill(ordered, now_s)
        if not batch or len(batch) == self._max_batch:
            return 0
        kept = self._num_losses(ordered, batch, now_s)
        for num_skipped in range(1, min(len(ordered), self._max_batch)):
            bigger = self._fill(ordered[num_skipped:], now_s)
            if len(bigger) > len(batch):
                lost = num_skipped + self._num_losses(ordered[num_skipped:], bigger, now_s)
                return num_skipped if lost < kept else 0
        return 0

    def _num_losses(self, ordered: Sequence[Work[PayloadT]], batch: Sequence[Work[PayloadT]], now_s: float) -> int:
        """Rows that would be late if batch ran now and full passes after it."""
        running = {work.owner for work in batch}
        rest = [work for work in ordered if work.owner not in running]
        free_s = now_s + self.times.careful_s(batch[0].group, len(batch), now_s)
        full_s = self.times.careful_s(batch[0].group, self._max_batch, now_s)
        return sum(free_s + (index // self._max_batch + 1) * full_s > work.deadline_s for index, work in enumerate(rest))

    def finished(self, batch: tuple[Work[PayloadT], ...], duration_s: float, now_s: float) -> None:
        """Reports a pass, so that estimates follow the machine."""
        self._busy_at_least_until_s = now_s
        if batch:
            self.times.observe(batch[0].group, len(batch), duration_s, now_s)

    def withdraw(self, owner: str) -> Work[PayloadT] | None:
        """Forgets an owner, whose session ended; answers what it had waiting."""
        return self._line.withdraw(owner)
