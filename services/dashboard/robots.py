"""Robots and their actors: one stream each upstream, whatever the number of viewers."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass

from manyhands import channel, codec, errors
from manyhands.actor.v1 import actor_pb2, actor_pb2_grpc
from manyhands.common.v1 import common_pb2
from manyhands.robot.v1 import robot_pb2, robot_pb2_grpc

from . import shapes
from .feed import Json
from .upstream import Target, Upstream, keep_trying, same_place, suppressed_bad_values

logger = logging.getLogger(__name__)

HISTORY_S = 20.0
CHUNKS_KEPT = 400
LATENCY_WINDOW = 512
RESULTS_KEPT = 200
TICK_RATE_HZ = 4.0
STOP_TIMEOUT_S = 2.0
CALL_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Picture:
    """The newest picture of one camera: JPEG bytes and a number that grows."""

    number: int
    jpeg: bytes


class RobotWatch:
    """One robot: what it is, how it is, what it sees."""

    def __init__(self, upstream: Upstream, target: Target, *, observe_rate_hz: float) -> None:
        self.name = target.name
        self.address = target.address
        self.robot_id = ""
        self.pictures: dict[str, Picture] = {}
        self._upstream = upstream
        self._feed = upstream.feed
        self._observe_rate_hz = observe_rate_hz
        self._shown: Json = {"name": self.name, "address": self.address, "connected": False, "note": ""}
        self._num_pictures = 0
        self._show()
        if self.address:
            upstream.add_service("robot", self.address, name=self.name)
            upstream.spawn(keep_trying(f"robot {self.name}", self._watch), f"robot {self.name}")

    @property
    def topic(self) -> str:
        return f"robot:{self.name}"

    async def hold(self, reason: str) -> Json:
        """Holds the present position. Raises ManyhandsError when the robot cannot be told."""
        with channel.translated_errors():
            response = await self._stub().Hold(robot_pb2.HoldRequest(reason=reason), timeout=STOP_TIMEOUT_S)
        return shapes.robot_status(response.status)

    async def emergency_stop(self, reason: str) -> Json:
        """Latches the stop. Raises ManyhandsError when the robot cannot be told."""
        with channel.translated_errors():
            request = robot_pb2.EmergencyStopRequest(reason=reason)
            response = await self._stub().EmergencyStop(request, timeout=STOP_TIMEOUT_S)
        return shapes.robot_status(response.status)

    def _stub(self) -> robot_pb2_grpc.RobotServiceAsyncStub:
        if not self.address:
            raise errors.Refused(f"{self.name} has no address of its own; stop it at its actor's machine", field="robot")
        return robot_pb2_grpc.RobotServiceStub(self._upstream.channel(self.address))

    async def _watch(self) -> None:
        try:
            described = await self._stub().Describe(robot_pb2.DescribeRequest(), timeout=CALL_TIMEOUT_S)
            self.robot_id = described.robot_id
            self._show(
                connected=True,
                note="",
                robot_id=described.robot_id,
                robot_type=described.spec.robot_type,
                simulated=described.simulated,
                rate_hz=described.spec.control_rate_hz,
                features=shapes.features(described.spec),
                cameras=shapes.cameras(described.spec),
                status=shapes.robot_status(described.status),
            )
            rate_hz = min(self._observe_rate_hz, described.spec.control_rate_hz)
            while True:
                await self._observe(rate_hz, include_images=self._feed.num_viewers > 0)
        finally:
            self._show(connected=False)

    async def _observe(self, rate_hz: float, *, include_images: bool) -> None:
        """One stream, until somebody begins or the last one ends looking: pictures nobody sees are not rendered."""
        request = robot_pb2.ObserveRequest(max_rate_hz=rate_hz, include_images=include_images)
        call = self._stub().Observe(request)
        try:
            async for response in call:
                with suppressed_bad_values(lambda note: self._show(note=note)):
                    await self._take(response, keep=round(HISTORY_S * rate_hz))
                if include_images != (self._feed.num_viewers > 0):
                    return
            raise errors.Unreachable("the robot ended the stream")
        finally:
            call.cancel()

    async def _take(self, response: robot_pb2.ObserveResponse, *, keep: int) -> None:
        self._show(connected=True, task=response.task, status=shapes.robot_status(response.status))
        for value in response.observation.values:
            if value.WhichOneof("value") == "image":
                self._num_pictures += 1
                self.pictures[value.name] = Picture(number=self._num_pictures, jpeg=await _as_jpeg(value))
        sample = {
            "t": self._feed.now_s(),
            "tick": response.observation.tick,
            "values": {**shapes.vectors(response.observation.values), **shapes.vectors(response.executed_action)},
            "pictures": {name: picture.number for name, picture in self.pictures.items()},
        }
        self._feed.append(f"{self.topic}:samples", sample, keep=keep)

    def _show(self, **changes: Json) -> None:
        self._shown = {**self._shown, **changes}
        self._feed.set(self.topic, self._shown)


async def _as_jpeg(value: common_pb2.NamedValue) -> bytes:
    if value.image.encoding == common_pb2.IMAGE_ENCODING_JPEG:
        return value.image.data

    def encode() -> bytes:
        return codec.encode_image(codec.decode_image(value.image, field=value.name)).data

    return await asyncio.to_thread(encode)


class Fleet:
    """All robots and actors the page shows."""

    def __init__(self, upstream: Upstream, *, observe_rate_hz: float) -> None:
        self.robots: dict[str, RobotWatch] = {}
        self._upstream = upstream
        self._feed = upstream.feed
        self._observe_rate_hz = observe_rate_hz
        self._feed.set("robots", [])

    def add_robot(self, target: Target) -> RobotWatch:
        robot = RobotWatch(self._upstream, target, observe_rate_hz=self._observe_rate_hz)
        self.robots[target.name] = robot
        self._feed.set("robots", list(self.robots))
        return robot

    def add_actor(self, address: str) -> None:
        watch = ActorWatch(self._upstream, self, address)
        self._upstream.spawn(keep_trying(f"actor at {address}", watch.watch), f"actor at {address}")
        self._upstream.add_service("actor", address, name=address)

    def robot_of(self, status: actor_pb2.GetStatusResponse) -> RobotWatch:
        """The robot an actor drives; one that nobody named is added. Unreachable while the actor does not know it."""
        for robot in self.robots.values():
            if status.robot_address and same_place(robot.address) == same_place(status.robot_address):
                return robot
        for robot in self.robots.values():
            if status.robot_id and status.robot_id in (robot.robot_id, robot.name):
                return robot
        if not status.robot_id:
            raise errors.Unreachable("the actor has not met its robot yet")
        return self.add_robot(Target(name=status.robot_id, address=status.robot_address))


class ActorWatch:
    """One actor: its run, its chunks, its episodes, shown with its robot."""

    def __init__(self, upstream: Upstream, fleet: Fleet, address: str) -> None:
        self._feed = upstream.feed
        self._upstream = upstream
        self._fleet = fleet
        self._address = address
        self._stub: actor_pb2_grpc.ActorServiceAsyncStub = actor_pb2_grpc.ActorServiceStub(upstream.channel(address))
        self._run_id = ""
        self._recent: deque[Json] = deque(maxlen=LATENCY_WINDOW)

    async def watch(self) -> None:
        status = await self._stub.GetStatus(actor_pb2.GetStatusRequest(), timeout=CALL_TIMEOUT_S)
        robot = self._fleet.robot_of(status)
        self._upstream.rename_service(f"actor:{self._address}", robot.name)
        topic = robot.topic
        try:
            self._show_status(topic, status)
            # A stream begins with all results of the present run.
            self._feed.clear(f"{topic}:results")
            async for response in self._stub.Watch(actor_pb2.WatchRequest(max_tick_rate_hz=TICK_RATE_HZ)):
                self._take(topic, response)
            raise errors.Unreachable("the actor ended the stream")
        finally:
            run = self._feed.latest(f"{topic}:run") or {}
            self._feed.set(f"{topic}:run", {**run, "connected": False})

    def _take(self, topic: str, response: actor_pb2.WatchResponse) -> None:
        event = response.WhichOneof("event")
        if event == "status":
            self._show_status(topic, response.status)
        elif event == "tick":
            self._feed.set(f"{topic}:tick", shapes.tick(response.tick))
        elif event == "chunk":
            chunk = {"t": self._feed.now_s(), **shapes.chunk(response.chunk)}
            self._recent.append(chunk)
            self._feed.append(f"{topic}:chunks", chunk, keep=CHUNKS_KEPT)
            self._feed.set(f"{topic}:latency", shapes.latency(self._recent))
        elif event == "episode":
            result = {"t": self._feed.now_s(), **shapes.episode_result(response.episode)}
            self._feed.append(f"{topic}:results", result, keep=RESULTS_KEPT)

    def _show_status(self, topic: str, status: actor_pb2.GetStatusResponse) -> None:
        if status.run.run_id != self._run_id:
            self._run_id = status.run.run_id
            self._feed.clear(f"{topic}:results")
        self._feed.set(f"{topic}:run", {**shapes.actor_status(status), "connected": True})
