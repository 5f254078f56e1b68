"""The robot contract's enums and statuses as Python values; what the client answers and the agent fills in."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .. import codec, spec, stamps
from ..common.v1 import common_pb2
from .v1 import robot_pb2

Arrays = Mapping[str, npt.NDArray[np.generic]]


class RobotMode(enum.IntEnum):
    IDLE = robot_pb2.ROBOT_MODE_IDLE
    ACTIVE = robot_pb2.ROBOT_MODE_ACTIVE
    HOLDING = robot_pb2.ROBOT_MODE_HOLDING
    EMERGENCY_STOP = robot_pb2.ROBOT_MODE_EMERGENCY_STOP
    FAULT = robot_pb2.ROBOT_MODE_FAULT


class Authority(enum.IntEnum):
    NONE = robot_pb2.AUTHORITY_UNSPECIFIED
    POLICY = robot_pb2.AUTHORITY_POLICY
    HUMAN = robot_pb2.AUTHORITY_HUMAN


class EpisodeOutcome(enum.IntEnum):
    RUNNING = robot_pb2.EPISODE_OUTCOME_UNSPECIFIED
    SUCCESS = robot_pb2.EPISODE_OUTCOME_SUCCESS
    FAILURE = robot_pb2.EPISODE_OUTCOME_FAILURE


class TeleopEventKind(enum.IntEnum):
    INTERVENTION_START = robot_pb2.TELEOP_EVENT_KIND_INTERVENTION_START
    INTERVENTION_END = robot_pb2.TELEOP_EVENT_KIND_INTERVENTION_END
    SUCCESS = robot_pb2.TELEOP_EVENT_KIND_SUCCESS
    FAILURE = robot_pb2.TELEOP_EVENT_KIND_FAILURE
    RERECORD = robot_pb2.TELEOP_EVENT_KIND_RERECORD
    STOP = robot_pb2.TELEOP_EVENT_KIND_STOP


@dataclass(frozen=True, kw_only=True)
class ActionLimit:
    """Bounds of one element of the action, in the element's unit; max_step is the largest change between two ticks."""

    element_name: str
    low: float
    high: float
    max_step: float


@dataclass(frozen=True, kw_only=True)
class CameraGeometry:
    """Size of the picture before any resizing (pixels) and how it became the spec's: "none", "pad" or "squash"."""

    name: str
    source_height: int
    source_width: int
    resize: str


@dataclass(frozen=True, kw_only=True)
class RobotStatus:
    """What the agent says of itself with every answer. lease_epoch is 0 when nobody ever had control."""

    mode: RobotMode
    lease_epoch: int
    lease_holder: str
    authority: Authority
    fault: str
    clamped_count: int
    refused_count: int
    hold_count: int

    def to_proto(self) -> robot_pb2.RobotStatus:
        return robot_pb2.RobotStatus(
            mode=robot_pb2.RobotMode.ValueType(self.mode),
            lease_epoch=self.lease_epoch,
            lease_holder=self.lease_holder,
            authority=robot_pb2.Authority.ValueType(self.authority),
            fault=self.fault,
            clamped_count=self.clamped_count,
            refused_count=self.refused_count,
            hold_count=self.hold_count,
        )

    @classmethod
    def from_proto(cls, message: robot_pb2.RobotStatus) -> RobotStatus:
        return cls(
            mode=RobotMode(message.mode),
            lease_epoch=message.lease_epoch,
            lease_holder=message.lease_holder,
            authority=Authority(message.authority),
            fault=message.fault,
            clamped_count=message.clamped_count,
            refused_count=message.refused_count,
            hold_count=message.hold_count,
        )


@dataclass(frozen=True, kw_only=True)
class ValueHealth:
    """Of one observed value. An invalid one must not be acted on; reason says why."""

    valid: bool
    age_s: float
    reason: str

    @classmethod
    def from_proto(cls, message: robot_pb2.ValueHealth) -> ValueHealth:
        return cls(valid=message.valid, age_s=stamps.to_seconds(message.age), reason=message.reason)


@dataclass(frozen=True, kw_only=True)
class RobotDescription:
    """What the robot is. tasks holds the instructions its scene offers, none for a real robot."""

    robot_id: str
    spec: spec.Spec
    limits: tuple[ActionLimit, ...]
    cameras: tuple[CameraGeometry, ...]
    teleoperators: tuple[str, ...]
    tasks: tuple[str, ...]
    watchdog_s: float
    status: RobotStatus
    simulated: bool

    @classmethod
    def from_proto(cls, message: robot_pb2.DescribeResponse) -> RobotDescription:
        """Raises InvalidInput when the spec's digest is not that of its content."""
        return cls(
            robot_id=message.robot_id,
            spec=spec.Spec.from_proto(message.spec),
            limits=tuple(
                ActionLimit(element_name=limit.element_name, low=limit.low, high=limit.high, max_step=limit.max_step)
                for limit in message.limits
            ),
            cameras=tuple(
                CameraGeometry(
                    name=camera.name,
                    source_height=camera.source_height,
                    source_width=camera.source_width,
                    resize=camera.resize,
                )
                for camera in message.cameras
            ),
            teleoperators=tuple(message.teleoperators),
            tasks=tuple(message.tasks),
            watchdog_s=stamps.to_seconds(message.watchdog),
            status=RobotStatus.from_proto(message.status),
            simulated=message.simulated,
        )


@dataclass(frozen=True, kw_only=True)
class RobotObservation:
    """One observation as it came.

    Attributes:
        message: The wire's message: forward it to a policy server and pictures are not encoded twice.
        health: Per feature name; empty in what Reset and Observe answer.
        teleop_action: What the asked teleoperator would do now, arrays by action feature; empty when none was asked.
        intervening: That teleoperator wants, or has, the authority.
        status: None in what Reset answers.
        outcome: Of the running episode.
        executed_action: The last one; only in what Observe answers.
        task: The running instruction; only in what Reset and Observe answer.
    """

    message: common_pb2.Observation
    health: Mapping[str, ValueHealth] = field(default_factory=dict)
    teleop_action: Arrays = field(default_factory=dict)
    intervening: bool = False
    status: RobotStatus | None = None
    outcome: EpisodeOutcome = EpisodeOutcome.RUNNING
    executed_action: Arrays = field(default_factory=dict)
    task: str = ""

    @cached_property
    def values(self) -> dict[str, npt.NDArray[np.generic]]:
        """Arrays by feature name, pictures (H, W, 3) uint8 RGB; decoded on first use and kept."""
        return codec.decode_values(self.message.values)

    @property
    def valid(self) -> bool:
        """Every value is fresh; False means: do not act on this."""
        return all(health.valid for health in self.health.values())

    @property
    def tick(self) -> int:
        """Control periods since the episode began."""
        return self.message.tick

    @property
    def captured(self) -> common_pb2.Stamp:
        """The agent's own stamp of the oldest value; only the agent can compare it."""
        return self.message.captured


@dataclass(frozen=True, kw_only=True)
class CommandResult:
    """executed_action: arrays by action feature, after the safety limits; clamped_elements: what a limit changed."""

    executed_action: Arrays
    clamped_elements: tuple[str, ...]
    status: RobotStatus


@dataclass(frozen=True, kw_only=True)
class TeleopEvent:
    """number grows by one an event; give number + 1 as from_number to go on after it."""

    number: int
    kind: TeleopEventKind
    source: str
    stamp: common_pb2.Stamp
