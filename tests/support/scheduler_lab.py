"""A device in simulated time that runs what a UnitScheduler says, and what robots ask of it."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from services.inference.service_times import ServiceTimes
from services.inference.unit_scheduler import UnitScheduler
from services.inference.units import ACTION_KINDS, ChunkWork, TextWork, Unit, UnitKind, group

# As measured on an H200: prefixes cost in proportion, expert and text steps hardly grow.
PREFIX_S = {1: 0.0059, 2: 0.0118, 4: 0.0235}
STEP_S = {1: 0.000163, 2: 0.000182, 4: 0.000220, 8: 0.000392}
TEXT_S = {1: 0.00117, 32: 0.00132}
SLICE_S = {1: 0.00118}
CHECK_S = {1: 0.0012}
NUM_STEPS = 10
ALONE_S = PREFIX_S[1] + NUM_STEPS * STEP_S[1]
DURATIONS_S = {
    UnitKind.PREFIX: PREFIX_S,
    UnitKind.EXPERT: STEP_S,
    UnitKind.TEXT_PREFIX: SLICE_S,
    UnitKind.DRAFT_CHECK: CHECK_S,
    UnitKind.TEXT: TEXT_S,
}
LONGEST_TEXT_UNIT_S = 0.00132

AnyScheduler = UnitScheduler[None, None]
AnyUnit = Unit[None, None]


def known(*buckets: int, models: Sequence[str] = ("m",)) -> ServiceTimes:
    """Estimates as an engine's warm-up leaves them."""
    times = ServiceTimes(forgets=False)
    for model, bucket, kind in itertools.product(models, buckets or (48,), DURATIONS_S):
        for size, seconds in DURATIONS_S[kind].items():
            for _ in range(40):
                times.observe(group(kind, model, bucket), size, seconds, 0.0)
    return times


def make(**options: Any) -> AnyScheduler:
    return UnitScheduler(times=known(48, 200), **options)


def chunk(owner: str, *, at: float = 0.0, within: float = 1.0, **changed: Any) -> ChunkWork[None]:
    values = {"request_id": 1, "model": "m", "bucket": 48, "num_steps": NUM_STEPS, "payload": None, **changed}
    return ChunkWork(owner=owner, arrived_s=at, deadline_s=at + within, **values)


def question(text_id: str, *, at: float = 0.0, within: float = 10.0, **changed: Any) -> TextWork[None]:
    values = {"owner": text_id, "model": "m", "bucket": 48, "num_prefix_slices": 5, "num_draft_tokens": 0, **changed}
    values.setdefault("max_tokens", 20)
    return TextWork(text_id=text_id, arrived_s=at, deadline_s=at + within, payload=None, **values)


def duration_s(unit: AnyUnit) -> float:
    by_size = DURATIONS_S[unit.kind]
    return next(seconds for size, seconds in sorted(by_size.items()) if size >= unit.size)


@dataclass
class Ran:
    unit: AnyUnit
    started_s: float
    finished_s: float
    owners: tuple[str, ...]
    steps: tuple[int, ...]


@dataclass
class Device:
    """Runs what the scheduler says, from arrivals given beforehand.

    text_lag_s: From the end of a text unit to its report.
    """

    scheduler: AnyScheduler
    arrivals: list[ChunkWork[None] | TextWork[None]] = field(default_factory=list)
    text_lag_s: float = 0.0
    ran: list[Ran] = field(default_factory=list)
    done_s: dict[tuple[str, int], float] = field(default_factory=dict)
    texts_done_s: dict[object, float] = field(default_factory=dict)
    refused: list[ChunkWork[None]] = field(default_factory=list)
    replaced: list[ChunkWork[None]] = field(default_factory=list)
    late_texts: list[TextWork[None]] = field(default_factory=list)

    def run(self, until_s: float = 100.0) -> None:
        events: list[tuple[float, int, Any]] = [(work.arrived_s, index, work) for index, work in enumerate(self.arrivals)]
        heapq.heapify(events)
        now_s = 0.0
        while now_s < until_s:
            self._arrive(events, now_s)
            decision = self.scheduler.next_unit(now_s)
            self.refused += decision.late_chunks
            self.late_texts += decision.late_texts
            unit = decision.unit
            if unit is None:
                if not events:
                    return
                now_s = events[0][0]
                continue
            end_s = now_s + duration_s(unit)
            ran = Ran(
                unit=unit,
                started_s=now_s,
                finished_s=end_s,
                owners=tuple(row.work.owner for row in unit.rows) or tuple(text.work.owner for text in unit.texts),
                steps=tuple(row.step for row in unit.rows),
            )
            self.ran.append(ran)
            self._arrive(events, end_s)
            if unit.kind in ACTION_KINDS or not self.text_lag_s:
                self._finish(ran)
            else:
                heapq.heappush(events, (end_s + self.text_lag_s, len(self.arrivals) + len(self.ran), ran))
            now_s = end_s

    def _finish(self, ran: Ran) -> None:
        finished = self.scheduler.finished(ran.unit, ran.finished_s - ran.started_s, ran.finished_s)
        for work in finished.chunks:
            self.done_s[work.owner, work.request_id] = ran.finished_s
        for text in finished.texts:
            self.texts_done_s[text.text_id] = ran.finished_s

    def _arrive(self, events: list[tuple[float, int, Any]], now_s: float) -> None:
        while events and events[0][0] <= now_s:
            at_s, _, work = heapq.heappop(events)
            if isinstance(work, Ran):
                self._finish(work)
                continue
            if isinstance(work, TextWork):
                self.scheduler.ask(work)
                continue
            replaced, accepted = self.scheduler.submit(work, at_s)
            self.replaced += [replaced] if replaced else []
            self.refused += [] if accepted else [work]

    def kinds(self) -> list[UnitKind]:
        return [ran.unit.kind for ran in self.ran]


def run(scheduler: AnyScheduler, *arrivals: ChunkWork[None] | TextWork[None], text_lag_s: float = 0.0) -> Device:
    device = Device(scheduler, list(arrivals), text_lag_s)
    device.run()
    return device
