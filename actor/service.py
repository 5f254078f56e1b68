"""ActorService: the actor's gRPC face."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from manyhands.actor.v1 import actor_pb2, actor_pb2_grpc

from .daemon import Actor
from .telemetry import Cursor

# How often a watcher that wants no ticks is looked after; with ticks it is their rate.
WATCH_INTERVAL_S = 0.05
LEAST_WATCH_INTERVAL_S = 0.01


class ActorServicer(actor_pb2_grpc.ActorServiceServicer):
    def __init__(self, actor: Actor) -> None:
        self._actor = actor
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """Ends all Watch streams."""
        self._draining.set()

    async def GetStatus(  # noqa: N802
        self,
        request: actor_pb2.GetStatusRequest,
        context: grpc.aio.ServicerContext[actor_pb2.GetStatusRequest, actor_pb2.GetStatusResponse],
    ) -> actor_pb2.GetStatusResponse:
        await asyncio.to_thread(self._actor.learn_robot_id)
        return self._actor.status()

    async def StartRun(  # noqa: N802
        self,
        request: actor_pb2.StartRunRequest,
        context: grpc.aio.ServicerContext[actor_pb2.StartRunRequest, actor_pb2.StartRunResponse],
    ) -> actor_pb2.StartRunResponse:
        return actor_pb2.StartRunResponse(run_id=await asyncio.to_thread(self._actor.start_run, request.run))

    async def StopRun(  # noqa: N802
        self,
        request: actor_pb2.StopRunRequest,
        context: grpc.aio.ServicerContext[actor_pb2.StopRunRequest, actor_pb2.StopRunResponse],
    ) -> actor_pb2.StopRunResponse:
        await asyncio.to_thread(self._actor.stop_run, request.run_id, discard_episode=request.discard_episode)
        return actor_pb2.StopRunResponse()

    async def Watch(  # noqa: N802
        self,
        request: actor_pb2.WatchRequest,
        context: grpc.aio.ServicerContext[actor_pb2.WatchRequest, actor_pb2.WatchResponse],
    ) -> AsyncIterator[actor_pb2.WatchResponse]:
        # Looking at intervals instead of being woken keeps watchers from costing the control loop anything.
        wants_ticks = request.max_tick_rate_hz > 0
        interval_s = min(WATCH_INTERVAL_S, 1.0 / request.max_tick_rate_hz) if wants_ticks else WATCH_INTERVAL_S
        tick_interval_s = 1.0 / request.max_tick_rate_hz if wants_ticks else 0.0
        loop = asyncio.get_running_loop()
        next_tick_s = loop.time()
        cursor = Cursor(self._actor.telemetry)
        while not self._draining.is_set():
            tick_is_due = wants_ticks and loop.time() >= next_tick_s
            for event in cursor.take(include_tick=tick_is_due):
                if event.WhichOneof("event") == "tick":
                    next_tick_s = max(next_tick_s + tick_interval_s, loop.time())
                yield event
            await asyncio.sleep(max(interval_s, LEAST_WATCH_INTERVAL_S))
        for event in cursor.take(include_tick=False):
            yield event
