"""The queue against a model that a page can hold: which chunk must act at which tick."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actor.chunk_queue import Chunk, ChunkQueue
from manyhands.common.v1 import common_pb2


def chunk(first_tick: int, steps: int = 8, *, request_id: int = 0, observed_s: float = 0.0, version: int = 0) -> Chunk:
    """Action i of the chunk is (first_tick, step i), so that a value tells where it came from."""
    actions = np.stack([np.full(steps, first_tick), np.arange(steps)], axis=1).astype(np.float32)
    return Chunk(
        request_id=request_id or first_tick + 1,
        first_tick=first_tick,
        actions=actions,
        model_actions=np.concatenate([actions, actions], axis=1) / np.float32(100),
        version=common_pb2.PolicyVersion(model="m", number=version),
        observed_s=observed_s,
    )


def queue(**changes: float) -> ChunkQueue:
    settings = {"replan_interval_steps": 4, "max_age_s": 100.0, **changes}
    return ChunkQueue(**settings)  # type: ignore[arg-type]


def test_merge_drops_what_has_passed_and_replaces_the_rest() -> None:
    q = queue()
    assert q.merge(chunk(0), now_tick=0, waited_ticks=0).delay_steps == 0
    for tick in range(6):
        taken = q.take(tick, 0.0)
        assert taken is not None
        assert taken.values.tolist() == [0, tick]
    merge = q.merge(chunk(3), now_tick=6, waited_ticks=3)
    assert (merge.delay_steps, merge.replaced_used_count, merge.accepted) == (3, 6, True)
    taken = q.take(6, 0.0)
    assert taken is not None
    assert taken.values.tolist() == [3, 3], "its first three actions were for ticks that are over"
    assert q.remaining(7) == 4


def test_each_action_names_the_weights_that_made_it() -> None:
    q = queue()
    q.merge(chunk(0, version=1), now_tick=0, waited_ticks=0)
    first = q.take(0, 0.0)
    q.merge(chunk(1, version=2), now_tick=1, waited_ticks=0)
    second = q.take(1, 0.0)
    assert first is not None
    assert second is not None
    assert (first.version.number, second.version.number) == (1, 2)


def test_a_chunk_that_is_late_as_a_whole_changes_nothing() -> None:
    q = queue()
    q.merge(chunk(5), now_tick=5, waited_ticks=0)
    late = q.merge(chunk(2, steps=3), now_tick=6, waited_ticks=4)
    assert not late.accepted
    assert late.delay_steps == 4
    taken = q.take(6, 0.0)
    assert taken is not None
    assert taken.values.tolist() == [5, 1]


def test_an_older_observation_never_replaces_a_newer_one() -> None:
    q = queue()
    q.merge(chunk(4), now_tick=5, waited_ticks=1)
    assert not q.merge(chunk(3), now_tick=5, waited_ticks=2).accepted
    taken = q.take(5, 0.0)
    assert taken is not None
    assert taken.values.tolist() == [4, 1]


def test_an_action_over_the_age_bound_is_never_handed_out() -> None:
    q = queue(max_age_s=0.5)
    q.merge(chunk(0, observed_s=10.0), now_tick=0, waited_ticks=0)
    fresh = q.take(0, 10.5)
    assert fresh is not None
    assert fresh.age_s == pytest.approx(0.5)
    assert q.take(1, 10.501) is None
    assert q.remaining(1) > 0, "it was there, and too old"
    q.requested(0)
    assert not q.wants_chunk(1, 10.5)
    assert q.wants_chunk(1, 10.501), "a robot that holds for its age must ask, whatever the interval"


def test_after_a_failed_request_the_next_tick_asks() -> None:
    q = queue()
    q.merge(chunk(0), now_tick=0, waited_ticks=0)
    q.requested(1)
    assert not q.wants_chunk(2, 0.0)
    q.request_failed()
    assert q.wants_chunk(2, 0.0)


def test_leftover_is_the_model_space_rest_from_the_present_tick() -> None:
    q = queue()
    assert q.leftover(0) is None
    first = chunk(10)
    q.merge(first, now_tick=12, waited_ticks=2)
    leftover = q.leftover(13)
    assert leftover is not None
    np.testing.assert_array_equal(leftover, first.model_actions[3:])
    assert q.leftover(18) is None


def test_delay_is_a_high_quantile_of_recent_waits_and_never_over_what_is_left() -> None:
    q = queue()
    assert q.delay_steps(0) == 0, "nothing is known yet"
    for first in range(12):
        q.merge(chunk(first, steps=30), now_tick=first, waited_ticks=2)
    q.merge(chunk(12, steps=30), now_tick=12, waited_ticks=5)
    assert q.delay_steps(12) == 2, "one slow answer in thirteen"
    q.merge(chunk(13, steps=30), now_tick=13, waited_ticks=5)
    q.merge(chunk(14, steps=30), now_tick=14, waited_ticks=5)
    assert q.delay_steps(14) == 5
    assert q.delay_steps(14 + 28) == 2
    for first in range(15, 40):
        q.merge(chunk(first, steps=30), now_tick=first, waited_ticks=1)
    assert q.delay_steps(39) == 1, "slow answers are forgotten"


def test_asks_at_the_interval_and_sooner_when_the_rest_would_not_last() -> None:
    q = queue(replan_interval_steps=4)
    assert q.wants_chunk(0, 0.0)
    q.requested(0)
    q.merge(chunk(0), now_tick=0, waited_ticks=1)
    assert [q.wants_chunk(tick, 0.0) for tick in range(5)] == [False, False, False, False, True]
    slow = queue(replan_interval_steps=8)
    slow.requested(0)
    slow.merge(chunk(0), now_tick=0, waited_ticks=3)
    assert [slow.wants_chunk(tick, 0.0) for tick in range(3, 6)] == [False, True, True], "4 left, 3 pass until an answer"


def test_a_busy_server_lengthens_the_interval_and_never_shortens_it() -> None:
    q = queue(replan_interval_steps=4)
    q.server_interval(6)
    assert q.replan_interval_steps == 6
    q.server_interval(2)
    assert q.replan_interval_steps == 4


def test_clear_forgets_plans_and_keeps_the_delay() -> None:
    q = queue()
    q.merge(chunk(0), now_tick=0, waited_ticks=3)
    q.clear()
    assert q.take(0, 0.0) is None
    assert q.leftover(0) is None
    assert q.wants_chunk(0, 0.0)
    q.merge(chunk(0), now_tick=0, waited_ticks=3)
    assert q.delay_steps(0) == 3


def test_interpolated_chunks_count_ticks_outside_and_steps_inside() -> None:
    q = queue(replan_interval_steps=6, ticks_per_step=3)
    q.merge(chunk(0, steps=4), now_tick=0, waited_ticks=4)
    q.requested(0)
    taken = [q.take(tick, 0.0) for tick in range(10)]
    assert [t.values[1] for t in taken if t is not None] == pytest.approx(np.arange(10) / 3)
    assert q.take(10, 0.0) is None
    leftover = q.leftover(6)
    assert leftover is not None
    assert len(leftover) == 2, "steps 2 and 3"
    assert q.delay_steps(6) == 2, "4 ticks are 2 steps"
    assert not q.wants_chunk(5, 0.0), "between two steps the prefix would not fit"
    assert q.wants_chunk(6, 0.0)


@settings(max_examples=200, deadline=None)
@given(
    delays=st.lists(st.integers(0, 12), min_size=1, max_size=30),
    horizon=st.integers(1, 10),
    interval=st.integers(1, 10),
)
def test_every_tick_is_executed_from_the_newest_chunk_that_is_there(delays: list[int], horizon: int, interval: int) -> None:
    """A robot with any sequence of answer times, one request in flight; holds do not advance the tick."""
    q = queue(replan_interval_steps=interval)
    pending: tuple[int, int, int] | None = None  # Arrives in period, requested tick, requested period.
    arrived: list[int] = []  # First ticks of chunks that came, each accepted if any of it was left.
    tick = requests = 0
    for period in range(80):
        if pending is not None and pending[0] <= period:
            _, requested_tick, requested_period = pending
            pending = None
            merge = q.merge(chunk(requested_tick, horizon), now_tick=tick, waited_ticks=period - requested_period)
            assert merge.delay_steps == tick - requested_tick, "dropped is exactly what was executed meanwhile"
            assert merge.accepted == (tick - requested_tick < horizon)
            if merge.accepted:
                arrived.append(requested_tick)
        if pending is None and q.wants_chunk(tick, 0.0):
            leftover = q.leftover(tick)
            assert q.delay_steps(tick) <= (0 if leftover is None else len(leftover))
            pending = (period + delays[requests % len(delays)], tick, period)
            requests += 1
            q.requested(tick)
        covering = [first for first in arrived if first <= tick < first + horizon]
        taken = q.take(tick, 0.0)
        if not covering or (arrived and arrived[-1] + horizon <= tick):
            assert taken is None
        else:
            assert taken is not None
            assert taken.values.tolist() == [max(covering), tick - max(covering)]
            tick += 1
