from __future__ import annotations

from actor.telemetry import RECENT_CHUNKS, Cursor, Telemetry
from manyhands.actor.v1 import actor_pb2


def kinds(cursor: Cursor, *, include_tick: bool = True) -> list[str | None]:
    return [event.WhichOneof("event") for event in cursor.take(include_tick=include_tick)]


def test_a_slow_reader_loses_ticks_then_old_chunks_and_never_results() -> None:
    telemetry = Telemetry()
    cursor = Cursor(telemetry)
    assert kinds(cursor) == ["status"]
    for number in range(1000):
        telemetry.tick(actor_pb2.Tick(tick=number))
        telemetry.chunk(actor_pb2.ChunkEvent(request_id=number))
        telemetry.episode(actor_pb2.EpisodeResult(episode_number=number))
    events = cursor.take(include_tick=True)
    ticks = [event.tick.tick for event in events if event.WhichOneof("event") == "tick"]
    chunks = [event.chunk.request_id for event in events if event.WhichOneof("event") == "chunk"]
    results = [event.episode.episode_number for event in events if event.WhichOneof("event") == "episode"]
    assert ticks == [999]
    assert chunks == list(range(1000 - RECENT_CHUNKS, 1000))
    assert results == list(range(1000))
    assert kinds(cursor) == [], "nothing comes twice"


def test_a_reader_that_wants_no_tick_now_gets_the_newest_one_later() -> None:
    telemetry = Telemetry()
    cursor = Cursor(telemetry)
    cursor.take(include_tick=True)
    telemetry.tick(actor_pb2.Tick(tick=1))
    assert kinds(cursor, include_tick=False) == []
    telemetry.tick(actor_pb2.Tick(tick=2))
    assert [event.tick.tick for event in cursor.take(include_tick=True)] == [2]


def test_results_come_before_the_status_that_ends_the_run() -> None:
    telemetry = Telemetry()
    cursor = Cursor(telemetry)
    cursor.take(include_tick=False)
    telemetry.episode(actor_pb2.EpisodeResult())
    telemetry.status(actor_pb2.GetStatusResponse(state=actor_pb2.RUN_STATE_FINISHED))
    assert kinds(cursor) == ["episode", "status"]
    late = Cursor(telemetry)
    assert kinds(late) == ["status", "episode", "status"], "also for who comes after the end"


def test_a_new_run_begins_with_its_own_results() -> None:
    telemetry = Telemetry()
    cursor = Cursor(telemetry)
    telemetry.episode(actor_pb2.EpisodeResult(seed=1))
    telemetry.begin_run([actor_pb2.EpisodeResult(seed=7)])
    telemetry.episode(actor_pb2.EpisodeResult(seed=8))
    seeds = [event.episode.seed for event in cursor.take(include_tick=False) if event.WhichOneof("event") == "episode"]
    assert seeds == [7, 8]
