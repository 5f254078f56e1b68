"""When an engine that died is started again, on a clock of the test's own."""

from __future__ import annotations

from services.inference.restarts import WITHIN_S, RestartPolicy


def test_the_first_time_at_once_then_later_and_later_then_not_at_all() -> None:
    policy = RestartPolicy(limit=4)
    waits = [policy.died(now_s) for now_s in (0.0, 1.0, 2.0, 3.0)]
    assert waits == [0.0, 0.25, 0.5, 1.0]
    assert policy.died(4.0) is None


def test_deaths_that_are_long_past_do_not_count() -> None:
    policy = RestartPolicy(limit=1)
    for number in range(20):
        assert policy.died(number * (WITHIN_S + 1.0)) == 0.0


def test_none_allowed_means_none() -> None:
    assert RestartPolicy(limit=0).died(5.0) is None
