"""The scheduler of units against a simulated device and simulated time."""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.service_times import ServiceTimes
from services.inference.unit_scheduler import (
    MAX_TEXT_UNITS,
    MAX_TEXT_WAIT_S,
    RESERVE_SHARE,
    TEXT_RESERVE_SHARE,
    UnitScheduler,
)
from services.inference.units import ACTION_KINDS, ChunkWork, Text, TextWork, Unit, UnitKind, expert_sizes, group

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


def test_a_chunk_alone_is_a_prefix_and_its_steps_at_once() -> None:
    device = run(make(), chunk("a"))
    assert device.kinds() == [UnitKind.PREFIX] + [UnitKind.EXPERT] * NUM_STEPS
    assert [ran.steps[0] for ran in device.ran[1:]] == list(range(NUM_STEPS))
    assert device.done_s["a", 1] == pytest.approx(ALONE_S)


def test_the_earliest_deadline_runs_first_whoever_came_first() -> None:
    device = run(make(), chunk("slow", within=1.0), chunk("urgent", within=0.1), chunk("middle", within=0.5))
    assert sorted(device.done_s, key=device.done_s.__getitem__) == [("urgent", 1), ("middle", 1), ("slow", 1)]


def test_an_urgent_robot_joins_at_a_step_boundary_with_its_own_step() -> None:
    arrives_s = PREFIX_S[1] + 3.5 * STEP_S[1]
    device = run(make(), chunk("first", within=1.0), chunk("urgent", at=arrives_s, within=0.1))
    prefix = [ran for ran in device.ran if ran.unit.kind is UnitKind.PREFIX][1]
    # The step that ran at its arrival ended first; its prefix came next; then both rows stepped together.
    assert prefix.owners == ("urgent",)
    assert prefix.started_s == pytest.approx(PREFIX_S[1] + 4 * STEP_S[1])
    shared = [ran for ran in device.ran if len(ran.steps) == 2]
    assert dict(zip(shared[0].owners, shared[0].steps, strict=True)) == {"first": 4, "urgent": 0}
    assert len(shared) == 6
    assert [ran.owners for ran in device.ran[-4:]] == [("urgent",)] * 4
    assert device.done_s["first", 1] < device.done_s["urgent", 1]


def test_rows_of_different_buckets_share_steps_but_no_prefix() -> None:
    device = run(make(), chunk("a", within=0.0153, bucket=48), chunk("b", within=0.0154, bucket=200))
    assert all(len(ran.unit.rows) == 1 for ran in device.ran if ran.unit.kind is UnitKind.PREFIX)
    shared = [ran for ran in device.ran if len(ran.steps) == 2]
    assert shared
    assert all(ran.unit.bucket == 200 for ran in shared)


def test_under_pressure_prefixes_go_first_and_steps_are_shared() -> None:
    # One after the other the last would be back too late; with shared steps all four are in time, with what is reserved.
    within = (4 * PREFIX_S[1] + 14 * STEP_S[4]) / (1 - RESERVE_SHARE)
    assert within * (1 - RESERVE_SHARE) < 4 * ALONE_S
    device = run(make(), *(chunk(owner, within=within) for owner in "abcd"))
    assert len(device.done_s) == 4
    assert max(device.done_s.values()) <= within
    assert any(len(ran.steps) == 4 for ran in device.ran)


def test_without_pressure_the_first_is_finished_before_the_next_begins() -> None:
    device = run(make(), chunk("a", within=0.5), chunk("b", within=0.6))
    assert device.done_s["a", 1] == pytest.approx(ALONE_S)
    assert device.done_s["b", 1] == pytest.approx(2 * ALONE_S)


def test_prefixes_share_a_unit_where_that_is_cheaper() -> None:
    times = known()
    for _ in range(60):
        times.observe(group(UnitKind.PREFIX, "m", 48), 4, 0.008, 0.0)
    scheduler: AnyScheduler = UnitScheduler(times=times)
    for owner in "abcde":
        scheduler.submit(chunk(owner), 0.0)
    unit = scheduler.next_unit(0.0).unit
    assert unit is not None
    assert [row.work.owner for row in unit.rows] == ["a", "b", "c", "d"]


def test_a_prefix_of_an_urgent_robot_does_not_make_a_chunk_in_progress_late() -> None:
    arrives_s = PREFIX_S[1] + STEP_S[1]
    begun = chunk("begun", within=ALONE_S + 0.002)
    # Alone it would be in time, after the chunk in progress it cannot be.
    device = run(make(), begun, chunk("urgent", at=arrives_s, within=ALONE_S + 0.0005))
    assert device.done_s["begun", 1] <= begun.deadline_s
    assert [work.owner for work in device.refused] == ["urgent"]


def test_the_newest_observation_of_a_robot_replaces_the_waiting_one() -> None:
    device = run(make(), chunk("other", within=0.5), chunk("a", at=0.001), chunk("a", at=0.002, request_id=2))
    assert [work.request_id for work in device.replaced] == [1]
    assert set(device.done_s) == {("other", 1), ("a", 2)}


def test_a_robot_has_one_chunk_in_progress_at_a_time() -> None:
    device = run(make(), chunk("a"), chunk("a", at=0.001, within=0.1, request_id=2))
    assert device.done_s["a", 1] == pytest.approx(ALONE_S)
    assert device.done_s["a", 2] == pytest.approx(2 * ALONE_S)
    assert all(len(ran.owners) == 1 for ran in device.ran)


def test_what_cannot_make_its_deadline_is_refused_before_it_runs() -> None:
    device = run(make(), chunk("late", within=0.9 * ALONE_S))
    assert [work.owner for work in device.refused] == ["late"]
    assert device.ran == []
    # In time if the device were free; it is not.
    device = run(make(), chunk("a", within=0.1), chunk("behind", at=0.001, within=1.3 * ALONE_S))
    assert [work.owner for work in device.refused] == ["behind"]
    assert set(device.done_s) == {("a", 1)}


def test_a_refused_robot_comes_first_next_time() -> None:
    scheduler = make()
    assert not scheduler.submit(chunk("unlucky", within=0.001), 0.0)[1]
    scheduler.submit(chunk("unlucky", at=0.1, within=1.0, request_id=2), 0.1)
    scheduler.submit(chunk("hasty", at=0.1, within=0.1), 0.1)
    unit = scheduler.next_unit(0.1).unit
    assert unit is not None
    assert unit.rows[0].work.owner == "unlucky"


def test_text_runs_while_no_chunk_needs_the_device() -> None:
    device = run(make(), question("q", num_prefix_slices=5, max_tokens=20))
    # The prefix gives the first token.
    assert device.kinds() == [UnitKind.TEXT_PREFIX] * 5 + [UnitKind.TEXT] * 19


def test_a_prefix_that_begins_again_runs_all_of_its_slices_again() -> None:
    scheduler = make()
    scheduler.ask(question("q", num_prefix_slices=3, max_tokens=1))
    kinds, ended = [], []
    for number in range(4):
        unit = scheduler.next_unit(0.001 * number).unit
        assert unit is not None
        kinds.append(unit.kind)
        if number == 1:  # Decided on and not run yet.
            assert [work.text_id for work in scheduler.restart_prefixes()] == ["q"]
        ended.append(len(scheduler.finished(unit, SLICE_S[1], 0.001 * number).texts))
    assert kinds == [UnitKind.TEXT_PREFIX] * 4
    assert ended == [0, 0, 0, 1]
    # What has its prefix, or has not begun it, is left alone.
    scheduler.ask(question("decoding", at=0.1, num_prefix_slices=0))
    scheduler.ask(question("waiting", at=0.2, num_prefix_slices=3))
    unit = scheduler.next_unit(0.2).unit
    assert unit is not None
    assert unit.kind is UnitKind.TEXT
    assert scheduler.restart_prefixes() == ()


def test_one_prefix_is_in_progress_at_a_time_whatever_models_there_are() -> None:
    """A model has room for the state of one."""
    scheduler: AnyScheduler = UnitScheduler(times=known(models=("m", "other")))
    questions = [question(f"q{n}", model=model, at=0.001 * n, max_tokens=5) for n, model in enumerate(["m", "other"] * 4)]
    # Later questions are more urgent.
    device = run(scheduler, *(replace(work, deadline_s=10.0 - work.arrived_s) for work in questions))
    order = [ran.owners[0] for ran in device.ran if ran.unit.kind is UnitKind.TEXT_PREFIX]
    assert [len(list(same)) for _, same in itertools.groupby(order)] == [5] * 8


def test_texts_of_several_robots_take_one_step_together() -> None:
    device = run(make(), *(question(f"q{index}", num_prefix_slices=1) for index in range(8)))
    assert len(device.texts_done_s) == 8
    assert device.kinds().count(UnitKind.TEXT) < 40
    assert any(ran.unit.size == 8 for ran in device.ran)


def test_a_draft_is_checked_in_one_pass() -> None:
    scheduler = make()
    scheduler.ask(question("q", num_prefix_slices=1, num_draft_tokens=20, max_tokens=40))
    unit = scheduler.next_unit(0.0).unit
    assert unit is not None
    scheduler.finished(unit, SLICE_S[1], 0.0012)
    unit = scheduler.next_unit(0.0012).unit
    assert unit is not None
    assert unit.kind is UnitKind.DRAFT_CHECK
    assert unit.texts[0].num_tokens == 0
    finished = scheduler.finished(unit, CHECK_S[1], 0.0024, num_new_tokens={"q": 21}, ended=["q"])
    assert [text.text_id for text in finished.texts] == ["q"]
    assert len(scheduler) == 0
    # A wrong draft is a start: decoding goes on from what was right.
    scheduler.ask(question("r", num_prefix_slices=0, num_draft_tokens=20, max_tokens=10))
    unit = scheduler.next_unit(0.1).unit
    assert unit is not None
    assert scheduler.finished(unit, CHECK_S[1], 0.1012, num_new_tokens={"r": 4}).texts == ()
    unit = scheduler.next_unit(0.1012).unit
    assert unit is not None
    assert (unit.kind, unit.texts[0].num_tokens) == (UnitKind.TEXT, 4)


def decoding(num: int, **changed: Any) -> AnyScheduler:
    """With so many texts of one token each."""
    scheduler = make()
    for number in range(num):
        scheduler.ask(question(f"q{number}", at=-1.0, within=20.0, num_prefix_slices=0, **changed))
        unit = scheduler.next_unit(0.0).unit
        assert unit is not None
        scheduler.finished(unit, TEXT_S[1], 0.0)
    return scheduler


def test_joint_steps_follow_before_the_tokens_of_the_one_before_are_there() -> None:
    scheduler = decoding(4, max_tokens=MAX_TEXT_UNITS + 3)
    units = [scheduler.next_unit(0.001 * number).unit for number in range(MAX_TEXT_UNITS + 1)]
    assert [(unit.kind, unit.size) for unit in units if unit] == [(UnitKind.TEXT, 4)] * MAX_TEXT_UNITS
    assert units[-1] is None
    assert units[0] is not None
    assert units[1] is not None
    # One had ended: what it has stepped since is nobody's.
    assert [work.text_id for work in scheduler.finished(units[0], TEXT_S[1], 0.01, ended=["q0"]).texts] == ["q0"]
    later = scheduler.next_unit(0.01).unit
    assert later is not None
    assert [text.work.text_id for text in later.texts] == ["q1", "q2", "q3"]
    assert scheduler.finished(units[1], TEXT_S[1], 0.02, ended=["q0"]).texts == ()
    assert scheduler.num_texts == 3


def test_no_step_is_taken_beyond_the_last_token() -> None:
    scheduler = decoding(4, max_tokens=3)
    first, second = scheduler.next_unit(0.0).unit, scheduler.next_unit(0.001).unit
    assert scheduler.next_unit(0.002).unit is None
    assert first is not None
    assert second is not None
    assert scheduler.finished(first, TEXT_S[1], 0.003).texts == ()
    assert len(scheduler.finished(second, TEXT_S[1], 0.004).texts) == 4


@pytest.mark.parametrize("changed", [{"is_drawn": True}, {"num_prefix_slices": 3}, {"num_draft_tokens": 8}])
def test_what_depends_on_the_host_waits_for_it(changed: dict[str, Any]) -> None:
    scheduler = make()
    asked = {"num_prefix_slices": 0, "max_tokens": 20, **changed}
    for number in range(2):
        scheduler.ask(question(f"q{number}", **asked))
    first = scheduler.next_unit(0.0).unit
    assert first is not None
    others = [scheduler.next_unit(0.001).unit for _ in range(2)]
    ids = [text.work.text_id for unit in (first, *others) if unit for text in unit.texts]
    assert len(ids) == len(set(ids)), "each has one unit on its way"
    scheduler.finished(first, TEXT_S[1], 0.002, num_new_tokens={"q0": 1})
    assert scheduler.next_unit(0.002).unit is not None


def test_only_steps_follow_what_is_on_its_way() -> None:
    amid_prefix = Text(work=question("q", num_prefix_slices=3), num_running=1, is_checked=True, touched_s=0.0)
    unchecked = Text(work=question("q", num_prefix_slices=0, num_draft_tokens=5), num_running=1, touched_s=0.0)
    stepping = Text(work=question("q", num_prefix_slices=0), num_running=1, is_checked=True, touched_s=0.0)
    assert [text.may_go_on for text in (amid_prefix, unchecked, stepping)] == [False, False, True]


def test_texts_that_step_on_their_own_meet_again() -> None:
    scheduler = decoding(1)
    first = scheduler.next_unit(0.0).unit
    scheduler.ask(question("q1", at=-1.0, within=20.0, num_prefix_slices=0))
    second = scheduler.next_unit(0.001).unit
    assert first is not None
    assert second is not None
    assert [text.work.text_id for text in second.texts] == ["q1"]
    scheduler.finished(first, TEXT_S[1], 0.002)
    assert scheduler.next_unit(0.002).unit is None, "it waits for the other, or they would take turns for good"
    scheduler.finished(second, TEXT_S[1], 0.003)
    together = scheduler.next_unit(0.003).unit
    assert together is not None
    assert together.size == 2


def test_the_largest_number_of_rows_is_prepared_whatever_it_is() -> None:
    assert [expert_sizes(most)[-2:] for most in (2, 7, 16, 40)] == [(1, 2), (6, 7), (12, 16), (32, 40)]


def test_a_lone_question_has_one_unit_at_a_time_so_that_a_chunk_that_comes_waits_for_one() -> None:
    scheduler = make()
    scheduler.ask(question("q", num_prefix_slices=0))
    assert scheduler.next_unit(0.0).unit is not None
    assert scheduler.next_unit(0.001).unit is None


def test_tokens_that_are_late_leave_no_gap_between_joint_steps() -> None:
    asked = [question(f"q{index}", num_prefix_slices=0, max_tokens=50, within=60.0) for index in range(8)]
    device = run(make(), *asked, text_lag_s=0.0015)
    together = [ran for ran in device.ran if ran.unit.size > 1]
    assert len(together) > 45
    assert all(later.started_s == earlier.finished_s for earlier, later in itertools.pairwise(together))
    assert len(device.texts_done_s) == 8


def test_text_waits_for_chunks_whose_deadline_is_near_but_not_for_ever() -> None:
    # Robots in turn keep the device busy, and each has less time to spare than a text step takes.
    arrivals: list[ChunkWork[None] | TextWork[None]] = [question("q", num_prefix_slices=0, max_tokens=5, within=60.0)]
    for index in range(400):
        at = max(0.0, index * ALONE_S - 0.0001)
        arrivals.append(chunk("ab"[index % 2], at=at, within=ALONE_S + 0.0008, request_id=index))
    device = run(make(), *arrivals)
    steps = [ran.started_s for ran in device.ran if ran.unit.kind is UnitKind.TEXT]
    assert MAX_TEXT_WAIT_S < steps[0] < MAX_TEXT_WAIT_S + 2 * ALONE_S
    assert len(steps) == 5
    assert steps[-1] < 5 * (MAX_TEXT_WAIT_S + 2 * ALONE_S)
    # It cost those chunks that met it, one each at most.
    assert len(device.done_s) >= 395


def busy(num_robots: int, *, within: float) -> list[ChunkWork[None]]:
    """Robots that keep the device busy without a pause, each chunk behind those of the others."""
    every_s = num_robots * ALONE_S
    return [
        chunk(f"r{robot}", at=turn * every_s + 0.9 * robot * ALONE_S, within=within, request_id=turn + 1)
        for robot in range(num_robots)
        for turn in range(20)
    ]


def text_units_amid(device: Device, work: ChunkWork[None]) -> list[AnyUnit]:
    """Those that ran between the chunk's arrival and its answer."""
    done_s = device.done_s[work.owner, work.request_id]
    return [
        ran.unit
        for ran in device.ran
        if ran.unit.kind not in ACTION_KINDS and ran.finished_s > work.arrived_s + 1e-9 and ran.started_s < done_s - 1e-9
    ]


def test_a_question_alone_delays_no_chunk_by_more_than_one_text_unit_however_long_the_chunk_waits_for_others() -> None:
    chunks = busy(6, within=0.2)
    device = run(make(), *chunks, question("q", max_tokens=100, within=60.0))
    waited_s = [device.done_s[work.owner, work.request_id] - work.arrived_s for work in chunks]
    assert max(waited_s) > 3 * ALONE_S
    num_units = [len(text_units_amid(device, work)) for work in chunks]
    assert max(num_units) == 1
    assert sum(num_units) > len(chunks) / 2, "it went on beside them"
    assert "q" in device.texts_done_s


@pytest.mark.parametrize("number", [2, 5, 16])
def test_so_many_joint_questions_delay_a_chunk_by_as_many_steps_and_no_more(number: int) -> None:
    long = chunk("long", at=0.05, within=10.0, num_steps=400)
    asked = [question(f"q{index}", num_prefix_slices=0, max_tokens=200, within=60.0) for index in range(number)]
    device = run(make(), long, *asked)
    # The one that ran at its arrival counts.
    assert [unit.size for unit in text_units_amid(device, long)] == [number] * number


def test_joint_questions_hold_chunks_up_only_while_all_of_them_keep_time() -> None:
    """Sixteen might step sixteen times while a chunk is there; near its deadline they do not, nor near those behind it."""
    asked = [question(f"q{index}", num_prefix_slices=0, max_tokens=300, within=60.0) for index in range(16)]
    for others in (0, 2):
        within_s = (others + 1) * ALONE_S / (1 - TEXT_RESERVE_SHARE) + 0.013
        chunks = [chunk(f"r{index}", at=0.0101, within=within_s + 0.001 * index) for index in range(others + 1)]
        device = run(make(), *chunks, *asked)
        for work in chunks:
            assert device.done_s[work.owner, work.request_id] <= work.deadline_s - 0.9 * TEXT_RESERVE_SHARE * within_s
        assert 4 <= len(text_units_amid(device, chunks[-1])) <= 10
        assert len(device.texts_done_s) == 16


def test_a_new_question_goes_on_beside_those_that_have_used_up_what_they_may() -> None:
    long = chunk("long", at=0.01, within=10.0, num_steps=1000)
    first = [question(f"q{index}", num_prefix_slices=0, max_tokens=200, within=60.0) for index in range(4)]
    device = run(make(), long, *first, question("new", at=0.05, num_prefix_slices=0, max_tokens=50, within=60.0))
    amid = text_units_amid(device, long)
    assert [unit.size for unit in amid] == [4] * 4 + [1]
    assert [text.work.text_id for text in amid[-1].texts] == ["new"]


def test_decoding_of_one_model_goes_on_while_that_of_another_pauses() -> None:
    scheduler: AnyScheduler = UnitScheduler(times=known(models=("m", "other")))
    asked = [question(model, model=model, num_prefix_slices=0, max_tokens=200, within=60.0) for model in ("m", "other")]
    long = chunk("long", at=0.05, within=10.0, num_steps=1000)
    device = run(scheduler, long, *asked)
    assert sorted(unit.model for unit in text_units_amid(device, long)) == ["m", "other"]


def test_a_robot_with_many_questions_does_not_keep_others_from_asking() -> None:
    greedy = [question(f"g{index}", owner="greedy") for index in range(40)]
    device = run(make(max_texts=4), *greedy, question("modest", at=0.1, within=10.0))
    later = [text_id for text_id, done in device.texts_done_s.items() if done > device.texts_done_s["modest"]]
    assert len(device.texts_done_s) == 41
    assert len(later) > 25


def test_text_past_its_deadline_is_dropped_also_in_progress() -> None:
    device = run(make(), question("q", within=0.010, max_tokens=100))
    assert [work.text_id for work in device.late_texts] == ["q"]
    assert device.ran[-1].finished_s < 0.013


def test_a_withdrawn_robot_leaves_nothing_behind_even_while_its_unit_runs() -> None:
    scheduler = make()
    scheduler.submit(chunk("a"), 0.0)
    unit = scheduler.next_unit(0.0).unit
    assert unit is not None
    scheduler.submit(chunk("a", request_id=2, at=0.001), 0.001)
    scheduler.ask(question("q", owner="a"))
    chunks, texts = scheduler.withdraw("a")
    assert ([work.request_id for work in chunks], [text.text_id for text in texts]) == ([2, 1], ["q"])
    assert scheduler.finished(unit, PREFIX_S[1], 0.006).chunks == ()
    assert len(scheduler) == 0
    assert scheduler.next_unit(0.006).unit is None


def test_a_unit_that_failed_takes_its_rows_with_it() -> None:
    scheduler = make()
    for owner in "ab":
        scheduler.submit(chunk(owner), 0.0)
    unit = scheduler.next_unit(0.0).unit
    assert unit is not None
    scheduler.failed(unit, 0.001)
    unit = scheduler.next_unit(0.001).unit
    assert unit is not None
    assert [row.work.owner for row in unit.rows] == ["b"]


def test_models_do_not_share_units_and_each_gets_its_turn() -> None:
    scheduler: AnyScheduler = UnitScheduler(times=known(models=("m", "other")))
    device = run(scheduler, *(chunk(f"{m}{i}", model=m, within=0.2) for i in range(4) for m in ("m", "other")))
    assert len(device.done_s) == 8
    assert all(len({row.work.model for row in ran.unit.rows}) == 1 for ran in device.ran)


@st.composite
def fleets(draw: st.DrawFn) -> list[ChunkWork[None] | TextWork[None]]:
    """Robots that replan at their own rates with jitter, and their questions; some more than the device can do."""
    arrivals: list[ChunkWork[None] | TextWork[None]] = []
    random = Random(draw(st.integers(0, 1000)))
    num_robots = draw(st.integers(1, 16))
    within_s = draw(st.sampled_from([0.02, 0.06, 0.2]))
    replan_s = draw(st.sampled_from([0.05, 0.2, 0.5]))
    ask_every_s = draw(st.sampled_from([0.0, 0.1, 0.5]))
    for robot in range(num_robots):
        at = random.random() * replan_s
        request_id = 0
        while at < 0.6:
            request_id += 1
            bucket = random.choice([48, 200])
            arrivals.append(chunk(f"r{robot}", at=at, within=within_s, request_id=request_id, bucket=bucket))
            at += replan_s * random.uniform(0.8, 1.2)
        at = random.random() * ask_every_s
        while ask_every_s and at < 0.6:
            text = question(
                f"q{robot}-{at}",
                owner=f"r{robot}",
                at=at,
                within=30.0,
                num_prefix_slices=random.choice([0, 1, 5]),
                num_draft_tokens=random.choice([0, 12]),
                max_tokens=random.choice([1, 5, 20]),
            )
            arrivals.append(text)
            at += ask_every_s * random.uniform(0.5, 1.5)
    return arrivals


@settings(max_examples=60, deadline=None)
@given(fleets(), st.sampled_from([0.0, 0.0015]))
def test_no_question_holds_a_chunk_up_by_more_than_one_text_unit_and_nothing_starves(
    arrivals: list[ChunkWork[None] | TextWork[None]], text_lag_s: float
) -> None:
    device = run(make(max_prefixes=2), *arrivals, text_lag_s=text_lag_s)
    asked = {(work.owner, work.request_id): work for work in arrivals if isinstance(work, ChunkWork)}
    refused = {(work.owner, work.request_id) for work in (*device.refused, *device.replaced)}
    # Every chunk has exactly one fate, and so has every text.
    assert refused.isdisjoint(device.done_s)
    assert refused | set(device.done_s) == set(asked)
    texts = [work for work in arrivals if isinstance(work, TextWork)]
    assert len(device.texts_done_s) + len(device.late_texts) == len(texts)
    assert device.late_texts == []
    begun_s = {}
    text_units = [ran for ran in device.ran if ran.unit.kind not in ACTION_KINDS]
    for ran in device.ran:
        if ran.unit.kind is UnitKind.PREFIX:
            begun_s.update({(row.work.owner, row.work.request_id): ran.started_s for row in ran.unit.rows})
    for key, done_s in device.done_s.items():
        arrived_s = asked[key].arrived_s
        parts: dict[Hashable, float] = defaultdict(float)
        num_units, in_all_s = 0, 0.0
        for ran in text_units:
            if ran.finished_s > arrived_s + 1e-9 and ran.started_s < done_s - 1e-9:
                in_all_s += ran.finished_s - ran.started_s
                num_units += 1
                for text in ran.unit.texts:
                    parts[text.work.text_id] += 1.0 / ran.unit.size
        assert max(parts.values(), default=0.0) < 1.0 + 1e-6
        assert num_units <= len(parts)
        # What has begun comes to its end: other prefixes pass it only as far as its deadline allows, and text.
        assert done_s <= max(asked[key].deadline_s, begun_s[key] + 4 * ALONE_S) + in_all_s + LONGEST_TEXT_UNIT_S
    if text_lag_s:
        return
    # The device is never idle while something waits.
    for earlier, later in itertools.pairwise(device.ran):
        if later.started_s > earlier.finished_s + 1e-9:
            assert any(work.arrived_s == pytest.approx(later.started_s) for work in arrivals)


def test_a_size_that_is_not_prepared_takes_what_the_next_bigger_one_takes() -> None:
    """Five rows run as eight: who promises by five eighths of it is late."""
    times = known(48)
    expert = group(UnitKind.EXPERT, "m", 48)
    assert times.careful_s(expert, 5, 0.0) == times.careful_s(expert, 8, 0.0) > times.careful_s(expert, 4, 0.0)
