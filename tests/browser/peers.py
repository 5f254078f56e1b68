"""An actor and a learner that say what a test wants, over real sockets: rare events and exact numbers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

from manyhands import stamps
from manyhands.actor.v1 import actor_pb2, actor_pb2_grpc
from manyhands.common.v1 import common_pb2
from manyhands.dataset.v1 import dataset_pb2
from manyhands.learner.v1 import learner_pb2, learner_pb2_grpc
from manyhands.server import GrpcServer


class ServerThread:
    """One servicer on a free port of loopback, on an event loop of its own."""

    def __init__(self, register: Any, servicer: Any, service_name: str, address: str = "127.0.0.1:0") -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

        async def start() -> GrpcServer:
            server = GrpcServer(address)
            server.add(register, servicer, service_name)
            await server.start()
            return server

        self._server = asyncio.run_coroutine_threadsafe(start(), self.loop).result(10)
        self.address = self._server.address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(0.0), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)


class Script:
    """Messages for a stream: those so far at once, then each new one. Written from the test's thread."""

    def __init__(self) -> None:
        self._messages: list[Any] = []
        self._changed = threading.Condition()

    def add(self, *messages: Any) -> None:
        with self._changed:
            self._messages.extend(messages)

    async def follow(self) -> AsyncIterator[Any]:
        position = 0
        while True:
            while position < len(self._messages):
                yield self._messages[position]
                position += 1
            await asyncio.sleep(0.02)


class ScriptedActor(actor_pb2_grpc.ActorServiceServicer):
    """Args:
    status: Also says which robot it drives, or none.
    """

    service_name = "manyhands.actor.v1.ActorService"

    def __init__(self, status: actor_pb2.GetStatusResponse) -> None:
        self.status = status
        self.script = Script()

    async def GetStatus(self, request: actor_pb2.GetStatusRequest, context: Any) -> actor_pb2.GetStatusResponse:  # noqa: N802
        return self.status

    async def Watch(self, request: actor_pb2.WatchRequest, context: Any) -> AsyncIterator[actor_pb2.WatchResponse]:  # noqa: N802
        yield actor_pb2.WatchResponse(status=self.status)
        async for event in self.script.follow():
            yield event


class ScriptedLearner(learner_pb2_grpc.LearnerServiceServicer):
    service_name = "manyhands.learner.v1.LearnerService"

    def __init__(self, status: learner_pb2.GetStatusResponse) -> None:
        self.status = status
        self.script = Script()

    async def GetStatus(self, request: learner_pb2.GetStatusRequest, context: Any) -> learner_pb2.GetStatusResponse:  # noqa: N802
        return self.status

    async def WatchProgress(  # noqa: N802
        self, request: learner_pb2.WatchProgressRequest, context: Any
    ) -> AsyncIterator[learner_pb2.WatchProgressResponse]:
        async for point in self.script.follow():
            if point.step >= request.from_step:
                yield point


def serve_actor(actor: ScriptedActor) -> ServerThread:
    return ServerThread(actor_pb2_grpc.add_ActorServiceServicer_to_server, actor, actor.service_name)


def serve_learner(learner: ScriptedLearner) -> ServerThread:
    return ServerThread(learner_pb2_grpc.add_LearnerServiceServicer_to_server, learner, learner.service_name)


def version(number: int, model: str = "arm") -> common_pb2.PolicyVersion:
    return common_pb2.PolicyVersion(model=model, number=number, digest=bytes([number]) * 32)


def chunk(request_id: int, *, number: int = 0, refusal: str = "", latency_ms: float = 100.0) -> actor_pb2.WatchResponse:
    """A chunk of version number, or a refusal. Of the latency 10 % is capture, 20 % network, 30 % queue, 40 % compute."""

    def share(part: float) -> Any:
        return stamps.to_duration(latency_ms * part / 1000)

    return actor_pb2.WatchResponse(
        chunk=actor_pb2.ChunkEvent(
            request_id=request_id,
            requested_tick=request_id * 8,
            arrived_tick=request_id * 8 + 3,
            delay_steps=3,
            used_count=8,
            latency=share(1.0),
            capture=share(0.1),
            network=share(0.2),
            server_queue=share(0.3),
            server_compute=share(0.4),
            version=None if refusal else version(number),
            refusal=refusal,
        )
    )


def result(number: int, *, success: bool) -> actor_pb2.WatchResponse:
    """An episode of 120 frames that version 2 drove."""
    return actor_pb2.WatchResponse(
        episode=actor_pb2.EpisodeResult(
            episode_number=number,
            frame_count=120,
            success=success,
            reason=dataset_pb2.EPISODE_END_SUCCESS if success else dataset_pb2.EPISODE_END_TIME_LIMIT,
            versions=[version(2)],
            held_tick_count=4,
        )
    )
