"""What a control loop, a viewer or an operator's tool says to a robot agent. Blocking; arrays in, arrays out.

with RobotClient("127.0.0.1:50061") as robot:
    robot.acquire("actor/left")
    robot.reset(seed=7)
    while robot.get_observation().outcome is EpisodeOutcome.RUNNING:
        robot.command({"action": policy(...)}, age_s=0.02)
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator

from .. import channel, codec, stamps
from ..common.v1 import common_pb2
from ..errors import InvalidInput, ManyhandsError, Refused
from ..robot.types import (
    ActionLimit,
    Arrays,
    Authority,
    CameraGeometry,
    CommandResult,
    EpisodeOutcome,
    RobotDescription,
    RobotMode,
    RobotObservation,
    RobotStatus,
    TeleopEvent,
    TeleopEventKind,
    ValueHealth,
)
from ..robot.v1 import robot_pb2, robot_pb2_grpc
from ..security import SecuritySettings

__all__ = [
    "ActionLimit",
    "Authority",
    "CameraGeometry",
    "CommandResult",
    "EpisodeOutcome",
    "RobotClient",
    "RobotDescription",
    "RobotMode",
    "RobotObservation",
    "RobotStatus",
    "TeleopEvent",
    "TeleopEventKind",
    "ValueHealth",
]


class RobotClient(channel.Client):
    """One connection to one robot agent; any number of threads may use it, one of them should command.

    Errors are those of manyhands.errors: Refused for a lease that is gone, an emergency stop or a command out of its bounds
    of age; InvalidInput for an action that is not the spec's; Unreachable and TooLate for the link. Nothing is retried:
    the caller knows whether its action is still worth sending.

    Args:
        address: "host:port".
        timeout_s: Deadline of every call but reset().
        reset_timeout_s: Deadline of reset(); a real arm drives home in it.
    """

    SERVER = "robot agent"

    def __init__(
        self,
        address: str,
        *,
        security_settings: SecuritySettings | None = None,
        timeout_s: float = 2.0,
        reset_timeout_s: float = 60.0,
    ) -> None:
        super().__init__(address, security_settings=security_settings)
        self._timeout_s = timeout_s
        self._reset_timeout_s = reset_timeout_s
        self._stub = robot_pb2_grpc.RobotServiceStub(self._channel)
        self._epoch = 0
        self._sequence = itertools.count(1)

    @property
    def epoch(self) -> int:
        """Of the lease that this client took; 0 while it has none. The agent may have ended it meanwhile."""
        return self._epoch

    def close(self) -> None:
        """Releases the lease, if any; an unreachable agent lets it expire instead. Closes the connection."""
        try:
            self.release()
        except ManyhandsError:
            pass
        super().close()

    def describe(self) -> RobotDescription:
        with channel.translated_errors():
            return RobotDescription.from_proto(self._stub.Describe(robot_pb2.DescribeRequest(), timeout=self._timeout_s))

    def acquire(
        self, holder: str, authority: Authority = Authority.POLICY, *, ttl_s: float = 2.0, request_id: str = ""
    ) -> int:
        """Takes the lease and starts counting commands from 1; returns the epoch.

        The lease ends ttl_s (at most 60) after the last command. Raises Refused, naming the holder, while another
        lease lives.
        """
        request = robot_pb2.AcquireControlRequest(
            holder=holder,
            authority=robot_pb2.Authority.ValueType(authority),
            ttl=stamps.to_duration(ttl_s),
            request_id=request_id or uuid.uuid4().hex,
        )
        with channel.translated_errors():
            response = self._stub.AcquireControl(request, timeout=self._timeout_s)
        if response.epoch != self._epoch:
            self._epoch = response.epoch
            self._sequence = itertools.count(1)
        return self._epoch

    def release(self) -> None:
        """Gives the lease back, the robot holds; does nothing when this client has none."""
        epoch, self._epoch = self._epoch, 0
        if epoch:
            with channel.translated_errors():
                self._stub.ReleaseControl(robot_pb2.ReleaseControlRequest(epoch=epoch), timeout=self._timeout_s)

    def reset(self, seed: int, task: str = "") -> RobotObservation:
        """Brings the robot to the start of an episode; the answer has its first observation (no pictures) and task."""
        request = robot_pb2.ResetRequest(epoch=self._require_epoch(), seed=seed, task=task)
        with channel.translated_errors():
            response = self._stub.Reset(request, timeout=self._reset_timeout_s)
        return RobotObservation(message=response.observation, task=response.task)

    def get_observation(
        self,
        *,
        include_images: bool = False,
        image_encoding: common_pb2.ImageEncoding.ValueType = common_pb2.IMAGE_ENCODING_JPEG,
        teleoperator: str = "",
    ) -> RobotObservation:
        """The newest observation; with teleoperator named, also what it would do now."""
        request = robot_pb2.GetObservationRequest(
            include_images=include_images, image_encoding=image_encoding, teleoperator=teleoperator
        )
        with channel.translated_errors():
            response = self._stub.GetObservation(request, timeout=self._timeout_s)
        return RobotObservation(
            message=response.observation,
            health={
                value.name: ValueHealth.from_proto(health)
                for value, health in zip(response.observation.values, response.health, strict=True)
            },
            teleop_action=codec.decode_values(response.teleop_action),
            intervening=response.intervening,
            status=RobotStatus.from_proto(response.status),
            outcome=EpisodeOutcome(response.outcome),
        )

    def observe(self, max_rate_hz: float, *, include_images: bool = True) -> Iterator[RobotObservation]:
        """Newest observations for viewers until the agent drains or the caller closes the iterator; none are queued."""
        call = self._stub.Observe(robot_pb2.ObserveRequest(max_rate_hz=max_rate_hz, include_images=include_images))
        try:
            with channel.translated_errors():
                for response in call:
                    yield RobotObservation(
                        message=response.observation,
                        status=RobotStatus.from_proto(response.status),
                        executed_action=codec.decode_values(response.executed_action),
                        task=response.task,
                    )
        finally:
            call.cancel()

    def command(
        self,
        action: Arrays,
        *,
        age_s: float = 0.0,
        version: common_pb2.PolicyVersion | None = None,
        sequence: int | None = None,
        timeout_s: float | None = None,
    ) -> CommandResult:
        """One action for one control period; the answer says what was executed.

        Args:
            action: Arrays by action feature in the spec's order, in the robot's units.
            age_s: Age of the observation behind the action; over the robot's bound the command is refused.
            version: Which weights decided; None for a person or a script.
            sequence: Given only by who repeats a command whose answer was lost; else counted here.
        """
        number = next(self._sequence) if sequence is None else sequence
        request = robot_pb2.CommandRequest(
            epoch=self._require_epoch(),
            sequence=number,
            action=codec.encode_values(action),
            version=version,
            age=stamps.to_duration(age_s),
        )
        with channel.translated_errors():
            response = self._stub.Command(request, timeout=self._timeout_s if timeout_s is None else timeout_s)
        return CommandResult(
            executed_action=codec.decode_values(response.executed_action),
            clamped_elements=tuple(response.clamped_elements),
            status=RobotStatus.from_proto(response.status),
        )

    def hold(self, reason: str) -> RobotStatus:
        """The robot keeps its present position, whoever has the lease, until the next command."""
        with channel.translated_errors():
            response = self._stub.Hold(robot_pb2.HoldRequest(reason=reason), timeout=self._timeout_s)
        return RobotStatus.from_proto(response.status)

    def emergency_stop(self, reason: str) -> RobotStatus:
        """Latches: only somebody at the robot can clear it, with 'manyhands robot --clear-stop'."""
        with channel.translated_errors():
            response = self._stub.EmergencyStop(robot_pb2.EmergencyStopRequest(reason=reason), timeout=self._timeout_s)
        return RobotStatus.from_proto(response.status)

    def watch_teleop_events(self, from_number: int = 0) -> Iterator[TeleopEvent]:
        """Events of pedals, buttons and detected ends as they happen; from_number replays what is still kept."""
        if from_number < 0:
            raise InvalidInput(
                f"from_number ({from_number}) must be 0 (new ones only) or an event's number", field="from_number"
            )
        call = self._stub.WatchTeleopEvents(robot_pb2.WatchTeleopEventsRequest(from_number=from_number))
        try:
            with channel.translated_errors():
                for response in call:
                    yield TeleopEvent(
                        number=response.number,
                        kind=TeleopEventKind(response.kind),
                        source=response.source,
                        stamp=response.stamp,
                    )
        finally:
            call.cancel()

    def _require_epoch(self) -> int:
        if not self._epoch:
            raise Refused("this client has no lease; call acquire() first", field="epoch")
        return self._epoch
