"""When an engine that died is started again."""

from __future__ import annotations

from services.inference.restarts import PROVEN_S, RestartPolicy


def test_the_first_time_at_once_then_later_and_later_then_not_at_all() -> None:
    policy = RestartPolicy(limit=4)
    assert [policy.died(served_s) for served_s in (0.0, 1.0, PROVEN_S / 2, 0.0)] == [0.0, 0.25, 0.5, 1.0]
    assert policy.died(PROVEN_S - 1.0) is None


def test_deaths_before_an_engine_that_served_long_do_not_count() -> None:
    policy = RestartPolicy(limit=1)
    for _ in range(20):
        assert policy.died(PROVEN_S) == 0.0


def test_waits_stop_growing_however_often_it_dies() -> None:
    policy = RestartPolicy(limit=1_000_000)
    waits_s = [policy.died(0.0) for _ in range(5000)]
    assert waits_s[5:9] == [4.0, 8.0, 8.0, 8.0]
    assert set(waits_s[9:]) == {8.0}


def test_none_allowed_means_none() -> None:
    assert RestartPolicy(limit=0).died(5.0) is None
    assert RestartPolicy(limit=0).died(2 * PROVEN_S) is None
