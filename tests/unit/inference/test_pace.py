"""How fast requests of one robot are taken, on a clock of the test's own."""

from __future__ import annotations

from services.inference.pace import Pace


def test_a_robot_within_its_rate_never_waits() -> None:
    pace = Pace(10.0, 3)
    assert [pace.take(0.1 * tick) for tick in range(100)] == [0.0] * 100


def test_a_burst_after_a_silence_is_taken_at_once_and_what_follows_waits_its_turn() -> None:
    pace = Pace(10.0, 3)
    waits_s = [pace.take(5.0) for _ in range(5)]
    assert waits_s == [0.0, 0.0, 0.0, 0.1, 0.2]


def test_over_time_it_is_the_rate_whatever_is_sent() -> None:
    pace, now_s, count = Pace(10.0, 3), 0.0, 0
    while now_s < 100.0:
        now_s += pace.take(now_s)
        count += 1
    assert 1000 <= count <= 1005


def test_who_waited_has_no_burst_left_until_it_was_silent() -> None:
    pace = Pace(10.0, 3)
    for _ in range(4):
        pace.take(0.0)
    assert pace.take(0.1) > 0.0
    assert [pace.take(10.0) for _ in range(3)] == [0.0] * 3
