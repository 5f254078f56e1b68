"""The scheduler against a simulated model and simulated time."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import dataclass

import pytest

from services.inference.scheduler import Scheduler, Work
from services.inference.service_times import ServiceTimes

GROUP = ("tiny", False)


def work(owner: str, *, at: float, within: float, group: object = GROUP, request_id: int = 1) -> Work[None]:
    return Work(owner=owner, request_id=request_id, group=group, arrived_s=at, deadline_s=at + within, payload=None)


def known(**seconds_by_rows: float) -> ServiceTimes:
    times = ServiceTimes()
    for rows, seconds in seconds_by_rows.items():
        for _ in range(40):
            times.observe(GROUP, int(rows.removeprefix("rows")), seconds, 0.0)
    return times


def owners(works: tuple[Work[None], ...]) -> list[str]:
    return [item.owner for item in works]


def test_the_earliest_deadline_runs_first_whoever_came_first() -> None:
    scheduler: Scheduler[None] = Scheduler(max_batch=1)
    for owner, within in (("slow", 1.0), ("urgent", 0.1), ("middle", 0.5)):
        scheduler.submit(work(owner, at=0.0, within=within), 0.0)
    order = [owners(scheduler.next_batch(0.0).batch)[0] for _ in range(3)]
    assert order == ["urgent", "middle", "slow"]
    assert scheduler.next_batch(0.0).batch == ()


def test_a_single_row_runs_at_once_and_a_batch_takes_what_waits() -> None:
    scheduler: Scheduler[None] = Scheduler(max_batch=3)
    scheduler.submit(work("a", at=0.0, within=1.0), 0.0)
    assert owners(scheduler.next_batch(0.0).batch) == ["a"]
    for index in range(5):
        scheduler.submit(work(f"r{index}", at=0.0, within=1.0 + index), 0.0)
    assert owners(scheduler.next_batch(0.0).batch) == ["r0", "r1", "r2"]
    assert owners(scheduler.next_batch(0.0).batch) == ["r3", "r4"]


def test_rows_of_another_model_or_shape_do_not_share_a_pass() -> None:
    scheduler: Scheduler[None] = Scheduler(max_batch=4)
    scheduler.submit(work("a", at=0.0, within=1.0), 0.0)
    scheduler.submit(work("b", at=0.0, within=1.1, group=("other", False)), 0.0)
    scheduler.submit(work("c", at=0.0, within=1.2), 0.0)
    assert owners(scheduler.next_batch(0.0).batch) == ["a", "c"]
    assert owners(scheduler.next_batch(0.0).batch) == ["b"]


def test_a_row_joins_only_when_the_bigger_batch_makes_every_deadline() -> None:
    scheduler: Scheduler[None] = Scheduler(max_batch=4, times=known(rows1=0.010, rows2=0.020))
    scheduler.submit(work("tight", at=0.0, within=0.015), 0.0)
    scheduler.submit(work("loose", at=0.0, within=1.0), 0.0)
    assert owners(scheduler.next_batch(0.0).batch) == ["tight"]
    scheduler.submit(work("tight", at=0.0, within=0.025), 0.0)
    assert owners(scheduler.next_batch(0.0).batch) == ["tight", "loose"]


def test_the_newest_observation_of_a_robot_replaces_the_waiting_one() -> None:
    scheduler: Scheduler[None] = Scheduler(max_batch=4)
    scheduler.submit(work("a", at=0.0, within=1.0, request_id=1), 0.0)
    replaced, accepted = scheduler.submit(work("a", at=0.1, within=1.0, request_id=2), 0.1)
    assert accepted
    assert replaced is not None
    assert replaced.request_id == 1
    assert [item.request_id for item in scheduler.next_batch(0.1).batch] == [2]


def test_what_cannot_make_its_deadline_is_refused_before_it_runs() -> None:
    scheduler: Scheduler[None] = Scheduler(max_batch=1, times=known(rows1=0.050))
    assert scheduler.submit(work("late", at=0.0, within=0.040), 0.0) == (None, False)
    # In time if the model were free, but a pass runs for 50 ms more.
    assert scheduler.submit(work("running", at=0.0, within=1.0), 0.0)[1]
    assert owners(scheduler.next_batch(0.0).batch) == ["running"]
    assert not scheduler.submit(work("behind", at=0.0, within=0.080), 0.0)[1]
    assert scheduler.submit(work("patient", at=0.0, within=0.110), 0.0)[1]


def test_what_waited_too_long_is_refused_when_the_model_is_free_again() -> None:
    scheduler: Scheduler[None] = Scheduler(max_batch=1)
    scheduler.submit(work("a", at=0.0, within=0.1), 0.0)
    scheduler.submit(work("b", at=0.0, within=0.3), 0.0)
    decision = scheduler.next_batch(0.2)
    assert (owners(decision.batch), owners(decision.late)) == (["b"], ["a"])
    assert len(scheduler) == 0


def test_an_update_keeps_its_place_and_a_refused_robot_comes_first_next_time() -> None:
    scheduler: Scheduler[None] = Scheduler(max_batch=1)
    scheduler.submit(work("updates", at=0.0, within=0.5), 0.0)
    scheduler.submit(work("other", at=0.1, within=0.5), 0.1)
    scheduler.submit(work("updates", at=0.2, within=0.5, request_id=2), 0.2)
    assert owners(scheduler.next_batch(0.2).batch) == ["updates"]
    # "other" becomes late; its next request goes before one with an earlier deadline.
    assert owners(scheduler.next_batch(0.7).late) == ["other"]
    scheduler.submit(work("updates", at=0.7, within=0.2, request_id=3), 0.7)
    scheduler.submit(work("other", at=0.7, within=0.5, request_id=2), 0.7)
    assert owners(scheduler.next_batch(0.7).batch) == ["other"]


def test_a_withdrawn_robot_leaves_nothing_behind() -> None:
    scheduler: Scheduler[None] = Scheduler(max_batch=1)
    scheduler.submit(work("a", at=0.0, within=1.0), 0.0)
    withdrawn = scheduler.withdraw("a")
    assert withdrawn is not None
    assert scheduler.next_batch(0.0).batch == ()
    assert scheduler.withdraw("a") is None


def test_a_stall_turns_nobody_away() -> None:
    times = known(rows1=0.010)
    scheduler: Scheduler[None] = Scheduler(max_batch=2, times=times)
    times.observe(GROUP, 1, 2.0, 0.1)
    assert scheduler.submit(work("a", at=0.2, within=0.1), 0.2)[1]
    assert owners(scheduler.next_batch(0.2).batch) == ["a"]
    # It does keep batches small while it is not known what they take.
    scheduler.finished((work("a", at=0.2, within=0.1),), 0.010, 0.21)
    for owner in "bc":
        scheduler.submit(work(owner, at=0.21, within=0.1), 0.21)
    assert owners(scheduler.next_batch(0.21).batch) == ["b"]


def test_a_model_that_became_slow_is_believed_and_what_was_long_ago_is_not() -> None:
    times = known(rows1=0.010)
    for pass_number in range(40):
        times.observe(GROUP, 1, 0.200, 0.2 * pass_number)
    assert times.at_best_s(GROUP, 1, 8.0) == pytest.approx(0.2, rel=0.1)
    assert times.careful_s(GROUP, 1, 8.0) == pytest.approx(0.2, rel=0.1)
    assert times.careful_s(GROUP, 4, 8.0) == pytest.approx(0.8, rel=0.1)  # Unseen: in proportion.
    assert times.careful_s(GROUP, 1, 18.0) < 0.001
    assert times.careful_s(("other", False), 1, 8.0) == 0.0


def test_a_batch_size_that_once_was_slow_is_tried_again() -> None:
    times = ServiceTimes()
    times.observe(GROUP, 2, 5.0, 0.0)  # While the machine was busy with something else.
    for pass_number in range(40):
        times.observe(GROUP, 1, 0.010, 0.1 * pass_number)
    scheduler: Scheduler[None] = Scheduler(max_batch=2, times=times)
    for owner in "ab":
        scheduler.submit(work(owner, at=4.0, within=0.2), 4.0)
    assert owners(scheduler.next_batch(4.0).batch) == ["a", "b"]


@dataclass
class Robot:
    """Asks again a period after its last answer, never with two requests in flight."""

    name: str
    period_s: float
    within_s: float
    served: int = 0
    refused: int = 0
    late: int = 0
    worst_s: float = 0.0
    last_served_s: float = 0.0
    longest_gap_s: float = 0.0


def simulate(
    robots: list[Robot], *, pass_s: dict[int, float], seconds: float, max_batch: int, jitter: float = 0.1
) -> Counter[int]:
    """Runs robots against a model whose passes take pass_s by rows; answers how often each batch size ran."""
    random_numbers = random.Random(7)
    scheduler: Scheduler[None] = Scheduler(max_batch=max_batch)
    by_name = {robot.name: robot for robot in robots}
    events: list[tuple[float, int, str]] = []
    counter = 0

    def ask_later(robot: Robot, now_s: float) -> None:
        nonlocal counter
        counter += 1
        wait_s = robot.period_s * (1 + jitter * random_numbers.uniform(-1, 1))
        heapq.heappush(events, (now_s + wait_s, counter, robot.name))

    def refuse(item: Work[None], now_s: float) -> None:
        by_name[item.owner].refused += 1
        ask_later(by_name[item.owner], now_s)

    for robot in robots:
        ask_later(robot, -robot.period_s * random_numbers.random())
    now_s = 0.0
    free_s = 0.0
    sizes: Counter[int] = Counter()
    while events or len(scheduler):
        now_s = max(free_s, now_s if len(scheduler) else events[0][0])
        if now_s > seconds:
            break
        while events and events[0][0] <= now_s:
            at_s, counter_, name = heapq.heappop(events)
            robot = by_name[name]
            item = work(name, at=at_s, within=robot.within_s, request_id=counter_)
            if not scheduler.submit(item, at_s)[1]:
                refuse(item, at_s)
        decision = scheduler.next_batch(now_s)
        for item in decision.late:
            refuse(item, now_s)
        if decision.batch:
            duration_s = pass_s[len(decision.batch)]
            free_s = now_s + duration_s
            scheduler.finished(decision.batch, duration_s, free_s)
            sizes[len(decision.batch)] += 1
            for item in decision.batch:
                robot = by_name[item.owner]
                robot.served += 1
                robot.late += free_s > item.deadline_s + 1e-9
                robot.worst_s = max(robot.worst_s, free_s - item.arrived_s)
                robot.longest_gap_s = max(robot.longest_gap_s, free_s - robot.last_served_s)
                robot.last_served_s = free_s
                ask_later(robot, free_s)
    return sizes


PASS_S = {rows: 0.006 + 0.002 * rows for rows in range(1, 9)}


def test_a_fleet_within_capacity_misses_nothing() -> None:
    robots = [Robot(f"r{index:02}", period_s=0.2, within_s=0.1) for index in range(16)]
    sizes = simulate(robots, pass_s=PASS_S, seconds=60.0, max_batch=8)
    assert sum(robot.refused for robot in robots) == 0
    assert max(robot.worst_s for robot in robots) <= 0.1
    assert min(robot.served for robot in robots) >= 250
    assert sizes[1] > 0  # Nobody waits for company.
    assert sum(count for rows, count in sizes.items() if rows > 1) > 0


def test_under_overload_the_model_stays_well_used_and_nobody_starves() -> None:
    equals = [Robot(f"r{index:02}", period_s=0.02, within_s=0.1) for index in range(30)]
    hasty = Robot("hasty", period_s=0.001, within_s=0.04)
    patient = Robot("patient", period_s=0.02, within_s=2.0)
    robots = [*equals, hasty, patient]
    sizes = simulate(robots, pass_s=PASS_S, seconds=30.0, max_batch=8)
    full_passes = 30.0 / PASS_S[8] * 8
    assert sum(rows * passes for rows, passes in sizes.items()) > 0.85 * full_passes
    served = [robot.served for robot in equals]
    assert min(served) > 0.8 * max(served)
    assert max(robot.longest_gap_s for robot in equals) < 0.5
    # Short deadlines buy no more than a place in the next pass, long ones are still kept.
    assert hasty.served < 5 * min(served)
    assert patient.served >= 13
    assert patient.longest_gap_s < 2.2
    # Only what was judged before passes were measured may be late.
    assert sum(robot.late for robot in robots) <= 16


def test_so_many_one_after_the_other_stray_less_than_all_of_them_being_slow() -> None:
    times = ServiceTimes(forgets=False)
    for number in range(400):
        times.observe(GROUP, 1, (0.8e-3, 1.2e-3)[number % 2], 0.0)
    one_s, mean_s = times.careful_s(GROUP, 1, 0.0), times.likely_s(GROUP, 1, 0.0)
    assert one_s - mean_s == pytest.approx(0.4e-3, rel=0.1)
    assert times.careful_s(GROUP, 1, 0.0, times=16) == pytest.approx(16 * mean_s + 4 * (one_s - mean_s))
    assert times.careful_s(GROUP, 1, 0.0, times=0) == 0.0


def test_what_does_not_fade_is_estimated_anew_when_it_is_measured_again() -> None:
    times = ServiceTimes(forgets=False)
    times.observe(GROUP, 2, 0.010, 0.0)
    assert times.likely_s(GROUP, 2, 0.0) == times.likely_s(GROUP, 1, 99.0) == pytest.approx(0.010)
    times.observe(GROUP, 2, 0.018, 1.0)
    assert times.likely_s(GROUP, 2, 1.0) == times.likely_s(GROUP, 1, 1.0) == pytest.approx(0.011)
    times.observe(GROUP, 1, 0.004, 1.0)
    assert times.likely_s(GROUP, 1, 1.0) == pytest.approx(0.004)
