"""What every robot offers its agent. A new robot is one file with a subclass and one line in robots/registry.py.

All methods are called from one thread, the agent's robot thread, so a driver may hold a bus or a GL context without locks.
A method that raises takes the robot to FAULT: the agent holds if it still can, then follows SafetyRules.on_exit.

Shapes: N elements of the action, over all its features, in the order of the spec.
"""

from __future__ import annotations

import abc
import enum
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from manyhands.errors import InvalidInput, NotOffered
from manyhands.robot.types import CameraGeometry, EpisodeOutcome
from manyhands.spec import Spec

from .teleoperator import Teleoperator

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One value as a device gave it.

    Attributes:
        value: As the spec's feature says.
        captured_ns: time.monotonic_ns() when the device was read, not when somebody asked.
        valid: False when the device did not answer. A driver never substitutes zero or the last value.
        reason: Why it is not valid.
    """

    value: npt.NDArray[np.generic]
    captured_ns: int
    valid: bool = True
    reason: str = ""

    @classmethod
    def now(cls, value: npt.NDArray[np.generic]) -> Reading:
        return cls(value=value, captured_ns=time.monotonic_ns())


Readings = Mapping[str, Reading]


class CommandKind(enum.Enum):
    """POSITION elements are compared with where the robot is; VELOCITY (and effort) elements only with the last command."""

    POSITION = "position"
    VELOCITY = "velocity"


@dataclass(frozen=True, kw_only=True)
class ElementLimit:
    """Bounds of one element of the action, in its unit.

    Attributes:
        low, high: Of the commanded value.
        max_step: Largest change between two ticks.
        max_velocity: Units per second; for a POSITION element it bounds the step too.
        max_torque: N m, measured; at or over it a POSITION element stays where it is.
    """

    name: str
    kind: CommandKind
    low: float
    high: float
    max_step: float
    max_velocity: float = math.inf
    max_torque: float = math.inf

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise InvalidInput(f"low ({self.low}) and high ({self.high}) must be finite and in this order", field=self.name)
        if not (self.max_step > 0 and self.max_velocity > 0 and self.max_torque > 0):
            raise InvalidInput("max_step, max_velocity and max_torque must be > 0", field=self.name)


class Rest(enum.Enum):
    """What a robot does when nobody commands it: keep its position, drive to its park pose, or let go."""

    HOLD = "hold"
    PARK = "park"
    DROP = "drop"


@dataclass(frozen=True, kw_only=True)
class SafetyRules:
    """What the safety core enforces for one robot. There is no way to switch it off.

    Attributes:
        elements: N limits.
        required_states: Features without which no command is executed.
        max_state_age_s: Older readings are invalid.
        max_command_age_s: Largest age of the observation behind a command.
        watchdog_s: Without a valid command for this long the robot holds.
        park_after_s: It parks after holding for this long; None keeps holding.
        drop_after_s: It lets go of torque after resting this long (from the start of the hold); None never does.
        on_emergency_stop: HOLD or DROP.
        on_exit: What the robot is left with when the agent ends, also by an exception.
    """

    elements: tuple[ElementLimit, ...]
    required_states: tuple[str, ...]
    max_state_age_s: float = 0.2
    max_command_age_s: float = 2.0
    watchdog_s: float = 0.25
    park_after_s: float | None = None
    drop_after_s: float | None = None
    on_emergency_stop: Rest = Rest.HOLD
    on_exit: Rest = Rest.HOLD

    def __post_init__(self) -> None:
        for name in ("max_state_age_s", "max_command_age_s", "watchdog_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InvalidInput(f"{name} ({value}) must be > 0", field=name)
        if self.on_emergency_stop is Rest.PARK:
            raise InvalidInput("an emergency stop may hold or drop; parking is a motion", field="on_emergency_stop")


class RobotOptions(BaseModel):
    """Knobs of one robot; unknown ones are refused by name. Robots add their own fields in a subclass."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rate_hz: float = Field(20.0, gt=0, le=1000, description="control periods per second")
    watchdog_s: float = Field(0.5, gt=0, le=10, description="seconds without a command until the robot holds")


class Robot(abc.ABC):
    """One robot with its cameras and teleoperators.

    Attributes:
        type_name: Name in the registry.
        Options: Its knobs; the constructor takes an instance.
        spec: Ordered features and the control rate.
        rules: What the safety core enforces.
        cameras: Where pictures come from; one per image feature, same names.
        teleoperators: By name; sources of human or scripted actions.
        simulated: The world advances by apply() only.
        tasks: Instructions that the scene offers; empty for a real robot.
        task: The present instruction.
    """

    type_name: ClassVar[str]
    Options: ClassVar[type[RobotOptions]] = RobotOptions
    spec: Spec
    rules: SafetyRules
    cameras: tuple[CameraGeometry, ...] = ()
    teleoperators: Mapping[str, Teleoperator] = {}
    simulated: bool = False
    tasks: tuple[str, ...] = ()
    task: str = ""

    @abc.abstractmethod
    def connect(self) -> None:
        """Opens devices and leaves the robot still. Raises Refused, saying what is missing, rather than start half."""

    @abc.abstractmethod
    def observe(self, *, include_images: bool) -> dict[str, Reading]:
        """The newest readings in the order of the spec; without pictures, only the states. Never blocks for a device that is
        gone: that reading comes back with valid=False."""

    @abc.abstractmethod
    def apply(self, action: Vector) -> None:
        """Executes action (N,), already judged by the safety core, for one control period. A simulation advances by one."""

    @abc.abstractmethod
    def hold_action(self, readings: Readings) -> Vector:
        """The action (N,) that keeps the robot where it is: the measured position, or zero velocity. Commands are compared
        with it after every change of authority, so hand-overs have no jump."""

    @abc.abstractmethod
    def reset(self, seed: int, task: str) -> None:
        """Start of an episode: puts up the scene that seed decides, where there is one to put up. It must not take long, a
        stop waits for it. Empty task keeps the task; InvalidInput for one that the scene does not offer."""

    def home_action(self, readings: Readings) -> Vector | None:
        """Where to drive at the start of an episode, (N,); None when it is there. The agent approaches it within the step
        limits, a control period at a time, so that a stop or a hold comes in between."""
        return None

    def outcome(self) -> EpisodeOutcome:
        """What the scene says of the running episode; RUNNING where it cannot tell."""
        return EpisodeOutcome.RUNNING

    def constrain(self, action: Vector, readings: Readings) -> Vector:
        """The action (N,) bent so that the robot stays in its workspace; the last judge, only towards hold_action()."""
        return action

    def torques(self, readings: Readings) -> Vector | None:
        """Measured torques (N,) in N m; None where the robot has no such sensor."""
        return None

    def park_action(self, readings: Readings) -> Vector | None:
        """Where to drive for parking, (N,); the agent approaches it within the step limits. None: it holds instead."""
        return None

    def drop(self) -> None:
        """Lets go of torque. Only called where the rules say DROP."""
        raise NotOffered(f"{self.type_name} cannot let go of torque; its rules must not say DROP", field="rules")

    @abc.abstractmethod
    def disconnect(self) -> None:
        """Closes devices; safe to call twice and after a failed connect()."""


def action_vector(action: Mapping[str, npt.NDArray[np.generic]], spec: Spec) -> Vector:
    """Features in the spec's order to one (N,) float64 vector."""
    return np.concatenate([np.asarray(action[feature.name], dtype=np.float64) for feature in spec.action])


def action_features(vector: Vector, spec: Spec) -> dict[str, npt.NDArray[np.generic]]:
    """The inverse of action_vector(), in the spec's dtypes."""
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    start = 0
    for feature in spec.action:
        arrays[feature.name] = vector[start : start + feature.shape[0]].astype(feature.dtype)
        start += feature.shape[0]
    return arrays
