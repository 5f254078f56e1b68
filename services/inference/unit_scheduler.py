"""Which unit of work runs next, decided every time the device is free. Pure: no torch, no grpc, no threads, no clock.

Chunks: earliest deadline first, and nothing ever waits for company. A row joins the expert at the next Euler step after its
prefix. A chunk is finished before the next prefix begins, unless sharing steps saves enough of the device (sharing.py), or
under pressure (a chunk would be late, or text is overdue): then prefixes go first, as far as the deadlines of chunks in
progress allow, because ten joint steps are cheaper than ten for each. A chunk is refused only before it begins, and only
when it would be late even at best; one in progress is never dropped.

Text runs when no chunk needs the device. It may also go before chunks, but from a chunk's arrival to its answer each
question holds it up by at most one text unit, the one that was running at its arrival included; where k texts step together,
each answers for 1/k of the step (hold_ups.py). And it goes before chunks only as far as all of them keep a good share of
their time, or after the text has waited for MAX_TEXT_WAIT_S. So no question delays another robot's chunk by more than one
text unit, k questions by no more than k, and text is never starved while chunks come to an end. A joint step may be the next
unit before the tokens of the one before are known.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Generic

from . import sharing
from .hold_ups import HoldUps
from .line import Line
from .service_times import ServiceTimes
from .text_line import TextLine
from .units import (
    ACTION_KINDS,
    PREFIX_SIZES,
    ChunkT,
    ChunkWork,
    Decision,
    Finished,
    Row,
    TextT,
    TextWork,
    Unit,
    UnitKind,
    group,
)

# Longer than text waits at the load that is promised. With 0.1 it went before chunks that it made late, and gained little:
# p99 of whole answers in simulated time fell by a quarter on a slow device, and by about a tenth on others.
MAX_TEXT_WAIT_S = 0.3
# Of the time a robot gives, for what comes behind the device: the answer's way back, and estimates that are wrong. With 0.05
# the p99 of a full device was 91 to 95 of 100 ms in simulated time, with 0.1 it is 85 to 91.
RESERVE_SHARE = 0.1
# As much must be left to every chunk where text goes before it: for chunks that come next, and for sharing steps, which
# those near their deadlines cannot do. On a faster card of two, 0.3 gave text 380 tokens/s instead of 1095 in simulated time
# (docs/design/0016), because chunks no longer shared.
TEXT_RESERVE_SHARE = 0.5
# Text units that have begun and are not taken in. Tokens reach the host some time after the device has them, and what runs
# behind them is decided before: one runs, one is on its way to the host, one is next.
MAX_TEXT_UNITS = 3
# A bigger prefix unit makes its first row wait for its last: worth it only when rows get this much cheaper. Those of H200s
# get 3 to 8 % cheaper by twos. With 0.07 two of six simulated fleets on the card that saves 3 % had late chunks on a host
# that stalls now and then, with 0.03 none.
WORTHWHILE_SAVING = 0.03


class UnitScheduler(Generic[ChunkT, TextT]):
    """Chunks and texts of all robots on one device. Not thread-safe: whoever drives the device holds the lock.

    Call next_unit() whenever the device is free and something is pending, run the unit, then call finished() or failed().

    Args:
        max_rows: Chunks in progress at once, which is what their caches have room for and the expert was prepared for.
        max_texts: Texts in progress at once.
        times: Estimates by Unit.group and size; fill them before the first robot comes, by running each prepared unit.
    """

    def __init__(
        self, *, max_rows: int = 8, max_texts: int = 32, max_prefixes: int = 1, times: ServiceTimes | None = None
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows ({max_rows}) must be at least 1")
        self.times = times or ServiceTimes(forgets=False)
        self._max_rows = max_rows
        self._line: Line[ChunkWork[ChunkT]] = Line()
        self._rows: dict[str, Row[ChunkT]] = {}
        self._texts: TextLine[ChunkT, TextT] = TextLine(max_texts=max_texts, max_prefixes=max_prefixes)
        self._hold_ups = HoldUps()
        self._texts_running: dict[int, Unit[ChunkT, TextT]] = {}
        self._busy_at_least_until_s = 0.0

    def __len__(self) -> int:
        """Chunks and texts, waiting and in progress."""
        return len(self._line) + len(self._rows) + len(self._texts)

    @property
    def num_chunks(self) -> int:
        return len(self._line) + len(self._rows)

    @property
    def num_in_progress(self) -> int:
        """Chunks whose prefix has run or runs."""
        return len(self._rows)

    @property
    def num_texts(self) -> int:
        return len(self._texts)

    def submit(self, work: ChunkWork[ChunkT], now_s: float) -> tuple[ChunkWork[ChunkT] | None, bool]:
        """Takes an observation in. Answers the waiting one of its owner that it replaces, and whether it was accepted.

        Not accepted: even if it ran next it would be late at best. What is replaced is gone in both cases.
        """
        replaced = self._line.replace(work.owner)
        if replaced is not None:
            self._hold_ups.left(_key(replaced))
        if max(now_s, self._busy_at_least_until_s) + self._at_best_s(work, now_s) > work.deadline_s:
            self._line.inherit(work)
            return replaced, False
        self._line.add(work)
        self._hold_ups.came(_key(work))
        return replaced, True

    def ask(self, work: TextWork[TextT]) -> None:
        """Takes a question in."""
        self._texts.add(work)

    def withdraw(self, owner: str) -> tuple[ChunkWork[ChunkT], ...]:
        """Forgets an owner that left; answers its chunks. A unit that runs may still hold them."""
        chunks: list[ChunkWork[ChunkT]] = []
        waiting = self._line.withdraw(owner)
        row = self._rows.pop(owner, None)
        chunks = [work for work in (waiting, row.work if row else None) if work is not None]
        for work in chunks:
            self._hold_ups.left(_key(work))
        return tuple(chunks)

    def withdraw_text(self, text_id: Hashable) -> tuple[TextWork[TextT], ...]:
        """Forgets a text that nobody listens to any more; answers it if it was there."""
        return self._texts.withdraw(text_id)

    def restart_prefixes(self) -> tuple[TextWork[TextT], ...]:
        """Questions whose prefix has begun and not ended begin it again; answers them."""
        return self._texts.restart_prefixes()

    def next_unit(self, now_s: float, *, only_begun: bool = False) -> Decision[ChunkT, TextT]:
        """What to run now. only_begun: Chunks in progress come to their end, and nothing else runs."""
        if only_begun:
            unit = self._expert_unit(self._in_progress())
            if unit is not None:
                self._begin(unit, now_s)
            return Decision(unit=unit)
        late_chunks = self._refuse_late(now_s)
        late_texts = self._texts.drop_late(now_s) if len(self._texts) else ()
        text = self._next_text(now_s)
        is_text_overdue = text is not None and now_s - text[1] > MAX_TEXT_WAIT_S
        unit = self._action_unit(now_s, is_text_overdue=is_text_overdue)
        if text is not None and (unit is None or is_text_overdue or self._leaves_time(text[0], now_s)):
            unit = text[0]
        if unit is not None:
            self._begin(unit, now_s)
        return Decision(unit=unit, late_chunks=late_chunks, late_texts=late_texts)

    def finished(
        self,
        unit: Unit[ChunkT, TextT],
        duration_s: float | None,
        now_s: float,
        *,
        num_new_tokens: Mapping[Hashable, int] | None = None,
        num_slices: Mapping[Hashable, int] | None = None,
        ended: Iterable[Hashable] = (),
    ) -> Finished[ChunkT, TextT]:
        """Reports the unit that ran; answers what it completed.

        Action units may be reported when they are launched, since what follows does not depend on what comes out of them;
        then tell times of the duration later. Text units are reported when they are done.

        Args:
            duration_s: None where it was not measured: the device may still be at it.
            num_new_tokens: By text_id where it is not what the kind of unit gives: one for a step and for the last slice of
                a prefix without a draft. A draft check gives what was right of the draft, and one more.
            num_slices: By text_id, of a prefix, all that are done now, where it is not one more than before: the first may
                stand for others that need not run.
            ended: text_ids whose text came to its end before max_tokens.
        """
        if duration_s is not None:
            self.times.observe(unit.group, unit.size, duration_s, now_s)
            self._busy_at_least_until_s = now_s
        if unit.kind not in ACTION_KINDS:
            self._end_text(unit)
            texts = self._texts.finished(
                unit, num_new_tokens=num_new_tokens or {}, num_slices=num_slices or {}, ended=frozenset(ended)
            )
            return Finished(texts=texts)
        complete: list[ChunkWork[ChunkT]] = []
        for row in unit.rows:
            if unit.kind is UnitKind.PREFIX:
                row.has_prefix = True
            else:
                row.step += 1
            if row.num_steps_left <= 0 and self._forget(row):
                complete.append(row.work)
        return Finished(chunks=tuple(complete))

    def failed(self, unit: Unit[ChunkT, TextT], now_s: float) -> None:
        """The unit raised: its rows and texts leave, unanswered by the scheduler."""
        self._busy_at_least_until_s = now_s
        if unit.kind not in ACTION_KINDS:
            self._end_text(unit)
        for row in unit.rows:
            self._forget(row)
        for text in unit.texts:
            self._texts.withdraw(text_id=text.work.text_id)

    def _begin(self, unit: Unit[ChunkT, TextT], now_s: float) -> None:
        self._busy_at_least_until_s = now_s + self.times.at_best_s(unit.group, unit.size, now_s)
        if unit.kind is UnitKind.PREFIX:
            for row in unit.rows:
                self._line.start(row.work)
                self._rows[row.work.owner] = row
        elif unit.kind is not UnitKind.EXPERT:
            self._texts.begin(unit, now_s)
            self._texts_running[id(unit)] = unit
            self._hold_ups.text_begins(id(unit), [text.work.text_id for text in unit.texts])

    def _end_text(self, unit: Unit[ChunkT, TextT]) -> None:
        del self._texts_running[id(unit)]
        self._hold_ups.text_ends(id(unit))

    def _forget(self, row: Row[ChunkT]) -> bool:
        self._hold_ups.left(_key(row.work))
        if self._rows.get(row.work.owner) is not row:
            return False  # Withdrawn while it ran.
        del self._rows[row.work.owner]
        return True

    def _refuse_late(self, now_s: float) -> tuple[ChunkWork[ChunkT], ...]:
        waiting = self._line.ordered()
        if not waiting:
            return ()
        late = [work for work in waiting if now_s + self._at_best_s(work, now_s) > work.deadline_s]
        for work in late:
            self._line.refuse(work)
            self._hold_ups.left(_key(work))
        return tuple(late)

    def _action_unit(self, now_s: float, *, is_text_overdue: bool) -> Unit[ChunkT, TextT] | None:
        rows = self._in_progress()
        waiting = [work for work in self._line.ordered() if work.owner not in self._rows]
        if len(rows) >= self._max_rows or not waiting:
            return self._expert_unit(rows)
        pressed = (
            is_text_overdue
            or self._sharing_pays(rows, waiting[0], now_s)
            or not self._all_in_time(now_s, rows, waiting, now_s, RESERVE_SHARE)
        )
        prefix = self._prefix_unit(rows, waiting, pressed, now_s)
        if not rows:
            return prefix
        is_earlier = self._line.place_s(waiting[0]) < rows[0].work.deadline_s
        if (is_earlier or pressed) and self._rows_in_time(rows, prefix, now_s):
            return prefix
        return self._expert_unit(rows)

    def _sharing_pays(self, rows: Sequence[Row[ChunkT]], work: ChunkWork[ChunkT], now_s: float) -> bool:
        if not rows or rows[0].work.model != work.model:
            return False
        steps = group(UnitKind.EXPERT, work.model, work.bucket)
        return sharing.pays(
            prefix_s=self.times.likely_s(group(UnitKind.PREFIX, work.model, work.bucket), 1, now_s),
            step_s=lambda num_rows: self.times.likely_s(steps, num_rows, now_s),
            num_rows=len(rows),
            steps_left=max(row.num_steps_left for row in rows),
            num_steps=work.num_steps,
        )

    def _in_progress(self) -> list[Row[ChunkT]]:
        return sorted(self._rows.values(), key=lambda row: row.work.deadline_s)

    def _expert_unit(self, rows: Sequence[Row[ChunkT]]) -> Unit[ChunkT, TextT] | None:
        """A step of all rows that share the model of the most urgent one."""
        if not rows:
            return None
        model = rows[0].work.model
        together = tuple(row for row in rows if row.work.model == model)
        bucket = max(row.work.bucket for row in together)
        return Unit(kind=UnitKind.EXPERT, model=model, bucket=bucket, rows=together)

    def _prefix_unit(
        self, rows: Sequence[Row[ChunkT]], waiting: Sequence[ChunkWork[ChunkT]], pressed: bool, now_s: float
    ) -> Unit[ChunkT, TextT]:
        """The first in line, with others where that is worth it and makes none of them late."""
        first = waiting[0]
        alike = [work for work in waiting if (work.model, work.bucket) == (first.model, first.bucket)]
        room = min(len(alike), self._max_rows - len(rows))
        size = next(size for size in PREFIX_SIZES if size <= room)
        while size > 1 and not self._may_share(rows, alike[:size], pressed, now_s):
            size //= 2
        return Unit(
            kind=UnitKind.PREFIX,
            model=first.model,
            bucket=first.bucket,
            rows=tuple(Row(work=work) for work in alike[:size]),
        )

    def _may_share(
        self, rows: Sequence[Row[ChunkT]], works: Sequence[ChunkWork[ChunkT]], pressed: bool, now_s: float
    ) -> bool:
        first = works[0]
        prefixes = group(UnitKind.PREFIX, first.model, first.bucket)
        single_s, together_s = self.times.mean_s(prefixes, 1), self.times.mean_s(prefixes, len(works))
        # A size that never ran is tried, or it would never be known.
        if not pressed and single_s and together_s and together_s > (1 - WORTHWHILE_SAVING) * len(works) * single_s:
            return False
        prefix_s = self.times.careful_s(prefixes, len(works), now_s)
        num_rows = len(rows) + len(works)
        steps_s = self._steps_s(first, first.num_steps, num_rows, now_s)
        return all(now_s + prefix_s + steps_s <= _due_s(work) for work in works)

    def _rows_in_time(self, rows: Sequence[Row[ChunkT]], prefix: Unit[ChunkT, TextT], now_s: float) -> bool:
        """Whether chunks in progress keep their deadlines if prefix runs before their next step, which its rows join."""
        at_s = now_s + self.times.careful_s(prefix.group, prefix.size, now_s)
        num_rows = len(rows) + prefix.size
        return all(at_s + self._steps_s(row.work, row.num_steps_left, num_rows, now_s) <= _due_s(row.work) for row in rows)

    def _all_in_time(
        self,
        at_s: float,
        rows: Sequence[Row[ChunkT]],
        waiting: Sequence[ChunkWork[ChunkT]],
        now_s: float,
        reserve_share: float,
    ) -> bool:
        """Whether all would be in time if the device were theirs from at_s on, each finished before the next begins."""
        free_s = at_s
        for row in rows:
            done_s = at_s + self._steps_s(row.work, row.num_steps_left, len(rows), now_s)
            if done_s > _due_s(row.work, reserve_share):
                return False
            free_s = max(free_s, done_s)
        for work in waiting:
            prefix_s = self.times.careful_s(group(UnitKind.PREFIX, work.model, work.bucket), 1, now_s)
            free_s += prefix_s + self._steps_s(work, work.num_steps, 1, now_s)
            if free_s > _due_s(work, reserve_share):
                return False
        return True

    def _next_text(self, now_s: float) -> tuple[Unit[ChunkT, TextT], float] | None:
        """None also while enough of text is on its way, and while a token is drawn: tokens are taken in in their order."""
        running = self._texts_running.values()
        is_drawn = any(text.work.is_drawn for unit in running for text in unit.texts)
        if not len(self._texts) or len(running) >= MAX_TEXT_UNITS or is_drawn:
            return None

        def may_begin(work: TextWork[TextT]) -> bool:
            """Not before the chunk that it was asked beside; what came later it does not wait for."""
            chunk = self._line.waiting_of(work.asked_by)
            return chunk is None or chunk.arrived_s > work.arrived_s or now_s - work.arrived_s > MAX_TEXT_WAIT_S

        return self._texts.next_unit(self._hold_ups.used(), may_begin=may_begin)

    def _leaves_time(self, text: Unit[ChunkT, TextT], now_s: float) -> bool:
        """Whether all chunks would still be well in time behind a text unit."""
        at_s = now_s + self.times.careful_s(text.group, text.size, now_s)
        return self._all_in_time(at_s, list(self._rows.values()), self._line.ordered(), now_s, TEXT_RESERVE_SHARE)

    def _steps_s(self, work: ChunkWork[ChunkT], num_steps: int, num_rows: int, now_s: float) -> float:
        return self.times.careful_s(group(UnitKind.EXPERT, work.model, work.bucket), num_rows, now_s, times=num_steps)

    def _at_best_s(self, work: ChunkWork[ChunkT], now_s: float) -> float:
        """From beginning to end, alone and undisturbed, if all goes well."""
        prefix_s = self.times.at_best_s(group(UnitKind.PREFIX, work.model, work.bucket), 1, now_s)
        step_s = self.times.at_best_s(group(UnitKind.EXPERT, work.model, work.bucket), 1, now_s)
        return prefix_s + work.num_steps * step_s


def _due_s(work: ChunkWork[ChunkT], reserve_share: float = RESERVE_SHARE) -> float:
    """When a chunk should be done that is to be with its robot in time."""
    return work.deadline_s - reserve_share * (work.deadline_s - work.arrived_s)


def _key(work: ChunkWork[ChunkT]) -> tuple[str, int]:
    return (work.owner, work.request_id)
