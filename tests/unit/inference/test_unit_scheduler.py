"""The scheduler of units against a simulated device and simulated time: chunks, and chunks beside texts."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import defaultdict
from collections.abc import Hashable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.unit_scheduler import RESERVE_SHARE, UnitScheduler
from services.inference.units import ACTION_KINDS, ChunkWork, TextWork, UnitKind, expert_sizes, group
from tests.support.scheduler_lab import (
    ALONE_S,
    LONGEST_TEXT_UNIT_S,
    NUM_STEPS,
    PREFIX_S,
    STEP_S,
    AnyScheduler,
    chunk,
    known,
    make,
    question,
    run,
)


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


def test_a_withdrawn_robot_leaves_nothing_behind_even_while_its_unit_runs() -> None:
    scheduler = make()
    scheduler.submit(chunk("a"), 0.0)
    unit = scheduler.next_unit(0.0).unit
    assert unit is not None
    scheduler.submit(chunk("a", request_id=2, at=0.001), 0.001)
    scheduler.ask(question("q", owner="a"))
    assert [work.request_id for work in scheduler.withdraw("a")] == [2, 1]
    assert [text.text_id for text in scheduler.withdraw_text("q")] == ["q"]
    assert scheduler.finished(unit, PREFIX_S[1], 0.006).chunks == ()
    assert len(scheduler) == 0
    assert scheduler.next_unit(0.006).unit is None


def test_a_question_outlives_the_stream_of_the_robot_that_asked_it() -> None:
    """Who listens to it is another call than the chunks' stream, which a robot may open again at any time."""
    scheduler = make()
    scheduler.submit(chunk("a"), 0.0)
    scheduler.ask(question("q", owner="a"))
    scheduler.withdraw("a")
    unit = scheduler.next_unit(0.0).unit
    assert unit is not None
    assert [text.work.text_id for text in unit.texts] == ["q"]


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


def test_the_largest_number_of_rows_is_prepared_whatever_it_is() -> None:
    assert [expert_sizes(most)[-2:] for most in (2, 7, 16, 40)] == [(1, 2), (6, 7), (12, 16), (32, 40)]


def test_it_is_pure_python() -> None:
    """So that it runs in simulated time anywhere, and nothing it decides waits for a device or a socket."""
    modules = "services.inference.unit_scheduler, services.inference.capacity, services.inference.fleet_simulator"
    look = f"import sys, {modules}; print({{'torch', 'grpc', 'numpy'}} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
