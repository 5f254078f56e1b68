"""What watchers see: the newest tick, recent chunks, every episode of the run, the present status.

The control loop publishes and never waits; a reader takes what is there when it is ready. A slow reader loses ticks first,
then old chunks, never episode results.
"""

from __future__ import annotations

import threading
from collections import deque

from manyhands.actor.v1 import actor_pb2

RECENT_CHUNKS = 256


class Telemetry:
    """One writer side (any threads), any number of Cursors."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._run_number = 0
        self._results: list[actor_pb2.EpisodeResult] = []
        self._chunks: deque[tuple[int, actor_pb2.ChunkEvent]] = deque(maxlen=RECENT_CHUNKS)
        self._chunk_count = 0
        self._tick: actor_pb2.Tick | None = None
        self._tick_count = 0
        self._status: actor_pb2.GetStatusResponse = actor_pb2.GetStatusResponse()
        self._status_count = 0

    def begin_run(self, results: list[actor_pb2.EpisodeResult] | None = None) -> None:
        """A new run: results are those of its part before a restart."""
        with self._lock:
            self._run_number += 1
            self._results = list(results or ())
            self._chunks.clear()
            self._tick = None

    def tick(self, tick: actor_pb2.Tick) -> None:
        with self._lock:
            self._tick = tick
            self._tick_count += 1

    def chunk(self, event: actor_pb2.ChunkEvent) -> None:
        with self._lock:
            self._chunk_count += 1
            self._chunks.append((self._chunk_count, event))

    def episode(self, result: actor_pb2.EpisodeResult) -> None:
        with self._lock:
            self._results.append(result)

    def status(self, status: actor_pb2.GetStatusResponse) -> None:
        with self._lock:
            self._status = status
            self._status_count += 1

    def results(self) -> list[actor_pb2.EpisodeResult]:
        with self._lock:
            return list(self._results)


class Cursor:
    """One reader's place."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._run_number = telemetry._run_number
        self._result_count = 0
        self._chunk_count = telemetry._chunk_count
        self._tick_count = telemetry._tick_count
        self._status_count = -1

    def take(self, *, include_tick: bool) -> list[actor_pb2.WatchResponse]:
        """What is new since the last call. A run's results come before the status that says it is over."""
        events: list[actor_pb2.WatchResponse] = []
        source = self._telemetry
        with source._lock:
            first = self._status_count < 0
            if self._run_number != source._run_number:
                self._run_number = source._run_number
                self._result_count = 0
            if first:
                events.append(actor_pb2.WatchResponse(status=source._status))
                self._status_count = source._status_count
            for number, event in source._chunks:
                if number > self._chunk_count:
                    events.append(actor_pb2.WatchResponse(chunk=event))
            self._chunk_count = source._chunk_count
            if include_tick and source._tick is not None and source._tick_count != self._tick_count:
                self._tick_count = source._tick_count
                events.append(actor_pb2.WatchResponse(tick=source._tick))
            for result in source._results[self._result_count :]:
                events.append(actor_pb2.WatchResponse(episode=result))
            self._result_count = len(source._results)
            if first and len(events) > 1:
                # A reader that came late sees the results of a run that is over before the status that says so.
                self._status_count = -1
            if self._status_count != source._status_count:
                self._status_count = source._status_count
                events.append(actor_pb2.WatchResponse(status=source._status))
        return events
