"""RobotService: the RPC face of one Agent. Nothing here touches the robot; everything goes through its thread.

Contract: protos/manyhands/robot/v1/robot.proto; design note: docs/design/0002-robot-contract.md.
"""

from __future__ import annotations

import asyncio
import math
import time
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc
import numpy as np

from manyhands import codec, stamps
from manyhands.common.v1 import common_pb2
from manyhands.errors import InvalidInput, ManyhandsError, TooLate
from manyhands.robot.types import Authority
from manyhands.robot.v1 import robot_pb2, robot_pb2_grpc
from manyhands.spec import decode_in_order

from .agent import Agent, Proposal, Snapshot

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]
# How often a stream of events looks for new ones: a pedal is felt within a tick of 50 Hz.
EVENT_POLL_S = 0.02
HOMING_TIMEOUT_S = 45.0


class RobotService(robot_pb2_grpc.RobotServiceServicer):
    def __init__(self, agent: Agent, robot_id: str) -> None:
        self._agent = agent
        self._robot_id = robot_id
        self._pictures = {feature.name for feature in agent.robot.spec.images}
        self._draining = asyncio.Event()
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode")
        # One encoding of a snapshot's pictures serves every viewer.
        self._encoded: weakref.WeakKeyDictionary[Snapshot, dict[int, asyncio.Task[list[common_pb2.NamedValue]]]] = (
            weakref.WeakKeyDictionary()
        )

    async def drain(self) -> None:
        """Ends the streams, so that viewers see a clean end."""
        self._draining.set()

    async def Describe(self, request: robot_pb2.DescribeRequest, context: Context) -> robot_pb2.DescribeResponse:  # noqa: N802
        robot = self._agent.robot
        return robot_pb2.DescribeResponse(
            robot_id=self._robot_id,
            spec=robot.spec.to_proto(),
            limits=[
                robot_pb2.ActionLimit(element_name=limit.name, low=limit.low, high=limit.high, max_step=float(max_step))
                for limit, max_step in zip(robot.rules.elements, self._agent.core.limiter.max_step, strict=True)
            ],
            cameras=[
                robot_pb2.CameraGeometry(
                    name=camera.name,
                    source_height=camera.source_height,
                    source_width=camera.source_width,
                    resize=camera.resize,
                )
                for camera in robot.cameras
            ],
            teleoperators=list(robot.teleoperators),
            tasks=robot.tasks,
            watchdog=stamps.to_duration(robot.rules.watchdog_s),
            status=(await self._do(self._agent.core.status)).to_proto(),
            simulated=robot.simulated,
        )

    async def AcquireControl(  # noqa: N802
        self, request: robot_pb2.AcquireControlRequest, context: Context
    ) -> robot_pb2.AcquireControlResponse:
        try:
            authority = Authority(request.authority)
        except ValueError:
            raise InvalidInput(f"{request.authority} is not one this agent knows", field="authority") from None
        epoch = await self._do(
            lambda: self._agent.core.acquire(request.holder, authority, stamps.to_seconds(request.ttl), request.request_id)
        )
        return robot_pb2.AcquireControlResponse(epoch=epoch)

    async def ReleaseControl(  # noqa: N802
        self, request: robot_pb2.ReleaseControlRequest, context: Context
    ) -> robot_pb2.ReleaseControlResponse:
        await self._do_surely(lambda: self._agent.core.release(request.epoch))
        return robot_pb2.ReleaseControlResponse()

    async def Reset(self, request: robot_pb2.ResetRequest, context: Context) -> robot_pb2.ResetResponse:  # noqa: N802
        await self._do(lambda: self._agent.begin_reset(request.epoch, request.seed, request.task))
        period_s = 1.0 / self._agent.robot.spec.control_rate_hz
        deadline_s = time.monotonic() + HOMING_TIMEOUT_S
        while not await self._do(lambda: self._agent.home_step(request.epoch)):
            if time.monotonic() > deadline_s:
                await self._do(self._agent.hold)
                raise TooLate(f"the robot is not home after {HOMING_TIMEOUT_S:g} s; is something in its way? It holds")
            await asyncio.sleep(period_s)
        snapshot = await self._do(lambda: self._agent.end_reset(request.epoch))
        return robot_pb2.ResetResponse(observation=await self._observation(snapshot), task=snapshot.task)

    async def GetObservation(  # noqa: N802
        self, request: robot_pb2.GetObservationRequest, context: Context
    ) -> robot_pb2.GetObservationResponse:
        encoding = request.image_encoding or common_pb2.IMAGE_ENCODING_JPEG

        def look() -> tuple[Snapshot, Proposal | None]:
            snapshot = self._agent.look(include_images=request.include_images)
            proposal = self._agent.propose(request.teleoperator, snapshot.readings) if request.teleoperator else None
            return snapshot, proposal

        snapshot, proposal = await self._do(look)
        return robot_pb2.GetObservationResponse(
            observation=await self._observation(snapshot, encoding),
            health=[
                robot_pb2.ValueHealth(valid=health.valid, age=stamps.to_duration(health.age_s), reason=health.reason)
                for health in snapshot.health.values()
            ],
            teleop_action=codec.encode_values(proposal.action) if proposal else [],
            intervening=proposal.intervening if proposal else False,
            status=snapshot.status.to_proto(),
            outcome=robot_pb2.EpisodeOutcome.ValueType(snapshot.outcome),
        )

    async def Observe(  # noqa: N802
        self, request: robot_pb2.ObserveRequest, context: Context
    ) -> AsyncIterator[robot_pb2.ObserveResponse]:
        rate_hz = request.max_rate_hz
        control_rate_hz = self._agent.robot.spec.control_rate_hz
        if not (math.isfinite(rate_hz) and 0 < rate_hz <= control_rate_hz):
            raise InvalidInput(
                f"max_rate_hz ({rate_hz}) must be over 0 and at most the control rate, {control_rate_hz:g}",
                field="max_rate_hz",
            )
        period_s = 1.0 / rate_hz
        newest = -1
        while not self._draining.is_set():
            snapshot = await self._do(
                lambda newest=newest: self._agent.look(  # type: ignore[misc]
                    include_images=request.include_images, max_picture_age_s=1.5 / control_rate_hz, newer_than=newest
                )
            )
            if snapshot.version > newest:
                newest = snapshot.version
                yield robot_pb2.ObserveResponse(
                    observation=await self._observation(snapshot),
                    status=snapshot.status.to_proto(),
                    executed_action=codec.encode_values(snapshot.executed),
                    task=snapshot.task,
                )
                # All viewers of one rate look at the same instants, so that they share a rendering.
                pause_s = period_s - time.monotonic() % period_s
            else:
                pause_s = min(period_s, 1.0 / control_rate_hz)
            await self._pause(pause_s)

    async def Command(self, request: robot_pb2.CommandRequest, context: Context) -> robot_pb2.CommandResponse:  # noqa: N802
        try:
            action = decode_in_order(request.action, self._agent.robot.spec.action)
        except ManyhandsError:
            await self._do(self._agent.core.refuse)
            raise
        executed = await self._do(
            lambda: self._agent.command(request.epoch, request.sequence, action, stamps.to_seconds(request.age))
        )
        return robot_pb2.CommandResponse(
            executed_action=codec.encode_values(executed.action),
            clamped_elements=executed.clamped,
            status=executed.status.to_proto(),
        )

    async def Hold(self, request: robot_pb2.HoldRequest, context: Context) -> robot_pb2.HoldResponse:  # noqa: N802
        return robot_pb2.HoldResponse(status=(await self._do_surely(self._agent.hold)).to_proto())

    async def EmergencyStop(  # noqa: N802
        self, request: robot_pb2.EmergencyStopRequest, context: Context
    ) -> robot_pb2.EmergencyStopResponse:
        status = await self._do_surely(lambda: self._agent.stop(request.reason))
        return robot_pb2.EmergencyStopResponse(status=status.to_proto())

    async def WatchTeleopEvents(  # noqa: N802
        self, request: robot_pb2.WatchTeleopEventsRequest, context: Context
    ) -> AsyncIterator[robot_pb2.WatchTeleopEventsResponse]:
        number = request.from_number or self._agent.next_event
        while not self._draining.is_set():
            for event in self._agent.events_since(number):
                number = event.number + 1
                yield robot_pb2.WatchTeleopEventsResponse(
                    number=event.number,
                    kind=robot_pb2.TeleopEventKind.ValueType(event.kind),
                    source=event.source,
                    stamp=event.stamp,
                )
            await self._pause(EVENT_POLL_S)

    async def _do(self, job: Callable[[], T]) -> T:
        """Runs job in the robot's thread, unless the caller gave up before its turn: nobody expects a late command."""
        return await asyncio.wrap_future(self._agent.submit(job))

    async def _do_surely(self, job: Callable[[], T]) -> T:
        """Runs job also for a caller that hung up: what stops a robot is done once it was asked for."""
        return await asyncio.shield(asyncio.wrap_future(self._agent.submit(job)))

    async def _pause(self, seconds: float) -> None:
        """Sleeps, but not through a drain."""
        try:
            await asyncio.wait_for(self._draining.wait(), seconds)
        except TimeoutError:
            pass

    async def _observation(
        self, snapshot: Snapshot, encoding: common_pb2.ImageEncoding.ValueType = common_pb2.IMAGE_ENCODING_JPEG
    ) -> common_pb2.Observation:
        return common_pb2.Observation(
            values=await self._values(snapshot, encoding),
            captured=common_pb2.Stamp(clock_id=stamps.CLOCK_ID, monotonic_ns=snapshot.captured_ns),
            tick=snapshot.tick,
        )

    async def _values(self, snapshot: Snapshot, encoding: common_pb2.ImageEncoding.ValueType) -> list[common_pb2.NamedValue]:
        arrays = {name: reading.value for name, reading in snapshot.readings.items()}
        if self._pictures.isdisjoint(arrays):
            return codec.encode_values(arrays)
        tasks = self._encoded.setdefault(snapshot, {})
        if encoding not in tasks:
            tasks[encoding] = asyncio.ensure_future(
                asyncio.get_running_loop().run_in_executor(self._encoder, _encode, arrays, encoding)
            )
        return await asyncio.shield(tasks[encoding])


def _encode(
    arrays: dict[str, np.ndarray[Any, Any]], encoding: common_pb2.ImageEncoding.ValueType
) -> list[common_pb2.NamedValue]:
    return codec.encode_values(arrays, image_encoding=encoding)
