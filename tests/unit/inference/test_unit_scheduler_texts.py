"""Texts on the scheduler of units: their own order, ahead of their tokens, and what they may cost a chunk."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from services.inference.unit_scheduler import MAX_TEXT_UNITS, MAX_TEXT_WAIT_S, TEXT_RESERVE_SHARE, UnitScheduler
from services.inference.units import ACTION_KINDS, ChunkWork, Text, TextWork, UnitKind
from tests.support.scheduler_lab import (
    ALONE_S,
    CHECK_S,
    SLICE_S,
    TEXT_S,
    AnyScheduler,
    AnyUnit,
    Device,
    chunk,
    known,
    make,
    question,
    run,
)


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


def test_a_slice_may_stand_for_those_that_need_not_run() -> None:
    scheduler = make()
    scheduler.ask(question("q", num_prefix_slices=5, max_tokens=2))
    kinds, done = [], [3, 4, 5]
    while (unit := scheduler.next_unit(0.0).unit) is not None:
        kinds.append(unit.kind)
        scheduler.finished(unit, SLICE_S[1], 0.0, num_slices={"q": done.pop(0)} if done else {})
    assert kinds == [UnitKind.TEXT_PREFIX] * 3 + [UnitKind.TEXT]


def test_a_question_begins_behind_the_prefix_of_its_robots_chunk_but_does_not_wait_for_ever() -> None:
    scheduler = make()
    scheduler.submit(chunk("robot", at=0.0, within=5.0), 0.0)
    for asked_by in ("robot", "other"):
        scheduler.ask(question(asked_by, at=0.0, num_prefix_slices=1, max_tokens=1, asked_by=asked_by))
    order = []
    while (unit := scheduler.next_unit(0.0).unit) is not None:
        order.append((unit.kind, unit.texts[0].work.text_id if unit.texts else unit.rows[0].work.owner))
        scheduler.finished(unit, 0.001, 0.0)
    assert order[0] == (UnitKind.TEXT_PREFIX, "other"), "there is time for text before the chunk"
    assert order.index((UnitKind.PREFIX, "robot")) < order.index((UnitKind.TEXT_PREFIX, "robot"))
    # What came later than the question is not waited for.
    scheduler.submit(chunk("robot", at=0.02, within=5.0), 0.02)
    scheduler.ask(question("early", at=0.01, num_prefix_slices=1, max_tokens=1, asked_by="robot"))
    unit = scheduler.next_unit(0.02).unit
    assert unit is not None
    assert unit.texts[0].work.text_id == "early"
    scheduler.finished(unit, 0.001, 0.02)
    # Nor is anything for ever.
    scheduler.ask(question("late", at=0.02, num_prefix_slices=1, max_tokens=1, asked_by="robot"))
    unit = scheduler.next_unit(0.02 + MAX_TEXT_WAIT_S + 0.001).unit
    assert unit is not None
    assert unit.texts[0].work.text_id == "late"


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
