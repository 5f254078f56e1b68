"""Which robot's observation runs next. Pure decisions: no torch, no grpc, no threads, the clock is an argument.

Earliest deadline first. A pass takes whatever waits when the model is free and never waits for more rows. At most one
observation of a robot waits: a newer one takes the older one's place in line, so a robot that updates often is not starved
by its own updates, and one that was refused for being late goes to the front with its next observation. A row joins a batch
only when the bigger batch should still make the deadline of every row in it, on a careful estimate; a row is refused only
when even at best it would be late, so that a single stall does not turn robots away.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

PayloadT = TypeVar("PayloadT")

# Weight of the newest measurement, as in TCP's round-trip estimate (RFC 6298): mean 1/8, deviation 1/4.
_MEAN_GAIN = 1 / 8
_DEVIATION_GAIN = 1 / 4
# Without new measurements an estimate halves each second: one stall must not make the service refuse everybody for good.
_FORGET_AFTER_S = 1.0
_LATELY_S = 2.0
FRESH_S = 10.0


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
        if known is None or now_s - known.at_s > FRESH_S:
            by_rows.pop(num_rows, None)
            deviation_s = duration_s / 2
            if by_rows:
                # The sizes measured so far foretold this one: it is as uncertain as they are, or as they were wrong.
                foretold_s, uncertain_s = self._foretell(by_rows, num_rows)
                deviation_s = min(deviation_s, max(uncertain_s, abs(duration_s - foretold_s)))
            by_rows[num_rows] = _Measured(mean_s=duration_s, deviation_s=deviation_s, at_s=now_s)
            return
        error_s = duration_s - known.mean_s
        known.mean_s += _MEAN_GAIN * error_s
        known.deviation_s += _DEVIATION_GAIN * (abs(error_s) - known.deviation_s)
        known.at_s = now_s

    def careful_s(self, group: Hashable, num_rows: int, now_s: float) -> float:
        """Mean and two deviations; 0 where nothing is known."""
        return self._estimate_s(group, num_rows, now_s, 2.0)

    def at_best_s(self, group: Hashable, num_rows: int, now_s: float) -> float:
        """Mean less two deviations; 0 where nothing is known."""
        return self._estimate_s(group, num_rows, now_s, -2.0)

    def _estimate_s(self, group: Hashable, num_rows: int, now_s: float, num_deviations: float) -> float:
        by_rows = self._measured.get(group)
        if not by_rows:
            return 0.0
        mean_s, deviation_s = self._foretell(by_rows, num_rows)
        silent_s = max(0.0, now_s - max(known.at_s for known in by_rows.values()))
        forgotten: float = 0.5 ** max(0.0, silent_s / _FORGET_AFTER_S - 1.0)
        return max(0.0, mean_s + num_deviations * deviation_s) * forgotten

    def _foretell(self, by_rows: Mapping[int, _Measured], num_rows: int) -> tuple[float, float]:
        """(mean, deviation); of a size that did not run lately in proportion to the nearest smaller one that did.

        Else a size that once was slow would never be tried again.
        """
        newest_s = max(known.at_s for known in by_rows.values())
        lately = [rows for rows, known in by_rows.items() if newest_s - known.at_s <= _LATELY_S]
        smaller = [rows for rows in lately if rows <= num_rows]
        known_rows = max(smaller) if smaller else min(lately)
        scale = max(1.0, num_rows / known_rows)
        return by_rows[known_rows].mean_s * scale, by_rows[known_rows].deviation_s * scale

    def rows_per_s(self, group: Hashable, now_s: float) -> float | None:
        """The best rate of passes in the last FRESH_S; None where none ran, so that nobody is judged by old times."""
        by_rows = self._measured.get(group, {})
        fresh = [rows / known.mean_s for rows, known in by_rows.items() if now_s - known.at_s < FRESH_S and known.mean_s > 0]
        return max(fresh, default=None)


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
        self._busy_at_least_until_s = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def submit(self, work: Work[PayloadT], now_s: float) -> tuple[Work[PayloadT] | None, bool]:
        """Takes work in. Answers the older work it replaces, if any, and whether it was accepted.

        Not accepted: even if it ran next it would be late at best. The replaced work is gone in both cases, its robot
        has seen something newer.
        """
        replaced = self._waiting.pop(work.owner, None)
        if replaced is not None:
            self._inherit(replaced)
        free_s = max(now_s, self._busy_at_least_until_s)
        if free_s + self.times.at_best_s(work.group, 1, now_s) > work.deadline_s:
            self._inherit(work)
            return replaced, False
        self._waiting[work.owner] = work
        return replaced, True

    def next_batch(self, now_s: float) -> Decision[PayloadT]:
        """The rows to run now. Call it whenever the model is free and something waits, and finished() after the pass."""
        late: list[Work[PayloadT]] = []
        feasible: list[Work[PayloadT]] = []
        for work in sorted(self._waiting.values(), key=self._rank):
            at_best_s = now_s + self.times.at_best_s(work.group, 1, now_s)
            (late if at_best_s > work.deadline_s else feasible).append(work)
        num_given_up = self._num_to_give_up(feasible, now_s)
        late += feasible[:num_given_up]
        batch = self._fill(feasible[num_given_up:], now_s)
        for work in late:
            del self._waiting[work.owner]
            self._inherit(work)
        for work in batch:
            del self._waiting[work.owner]
            self._place_s.pop(work.owner, None)
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
        self._place_s.pop(owner, None)
        return self._waiting.pop(owner, None)

    def _rank(self, work: Work[PayloadT]) -> tuple[float, float, str]:
        return (min(work.deadline_s, self._place_s.get(work.owner, work.deadline_s)), work.arrived_s, work.owner)

    def _inherit(self, work: Work[PayloadT]) -> None:
        self._place_s[work.owner] = min(work.deadline_s, self._place_s.get(work.owner, work.deadline_s))
