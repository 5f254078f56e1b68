from __future__ import annotations

import itertools

import pytest

from actor.inference_stream import FIRST_BACKOFF_S, LONGEST_BACKOFF_S, STABLE_S, Backoff
from actor.schedule import MonotonicClock, Schedule


class SimulatedClock:
    """Time passes only when somebody sleeps or works; a sleeper wakes late by what oversleep says."""

    def __init__(self, start_s: float = 1000.0) -> None:
        self.time_s = start_s
        self.oversleep_s = 0.0

    def now(self) -> float:
        return self.time_s

    def sleep(self, seconds: float) -> None:
        self.time_s += seconds + (self.oversleep_s if seconds > 0 else 1e-5)


def test_work_of_any_length_under_a_period_does_not_move_the_grid() -> None:
    clock = SimulatedClock()
    schedule = Schedule(100.0, clock)
    begun = []
    for work_s in itertools.islice(itertools.cycle([0.0, 0.009, 0.001, 0.0099]), 3000):
        schedule.wait()
        begun.append(clock.time_s)
        clock.time_s += work_s
    # 30 s later every tick is still within the spin's step of its own place: no drift.
    assert max(abs(at - (1000.0 + index * 0.01)) for index, at in enumerate(begun)) < 5e-5


def test_oversleeping_shows_as_lateness_and_is_not_carried_over() -> None:
    clock = SimulatedClock()
    schedule = Schedule(100.0, clock)
    schedule.wait()
    clock.oversleep_s = 0.003
    assert schedule.wait().lateness_s == pytest.approx(0.0028, abs=1e-6)
    clock.oversleep_s = 0.0
    assert schedule.wait().lateness_s < 2e-5


def test_lost_periods_are_skipped_and_never_made_up_for() -> None:
    clock = SimulatedClock()
    schedule = Schedule(10.0, clock)
    schedule.wait()
    clock.time_s += 0.57
    late = schedule.wait()
    assert late.skipped_count == 4
    assert late.lateness_s == pytest.approx(0.07)
    on_time = schedule.wait()
    assert on_time.skipped_count == 0
    assert clock.time_s == pytest.approx(1000.6, abs=1e-4), "back on the old grid"


def test_restart_makes_the_next_tick_due_at_once() -> None:
    clock = SimulatedClock()
    schedule = Schedule(10.0, clock)
    schedule.wait()
    clock.time_s += 33.333
    schedule.restart()
    tick = schedule.wait()
    assert (tick.skipped_count, tick.lateness_s) == (0, 0.0)


def test_the_real_clock_keeps_100_hz() -> None:
    schedule = Schedule(100.0)
    clock = MonotonicClock()
    began_s = clock.now()
    for _ in range(21):
        schedule.wait()
    assert 0.2 <= clock.now() - began_s < 0.25


def test_attempts_at_a_stream_grow_apart_until_one_lives() -> None:
    backoff = Backoff()
    assert backoff.next_s(0.0) == 0.0, "the first one is not waited for"
    waits = [backoff.next_s(0.0) for _ in range(10)]
    assert FIRST_BACKOFF_S / 2 <= waits[0] <= FIRST_BACKOFF_S
    assert all(LONGEST_BACKOFF_S / 2 <= wait <= LONGEST_BACKOFF_S for wait in waits[5:])
    backoff.opened(100.0)
    assert backoff.next_s(100.0 + STABLE_S / 2) > 0.5, "one that breaks at once does not count"
    backoff.opened(200.0)
    assert backoff.next_s(201.0 + STABLE_S) == 0.0
