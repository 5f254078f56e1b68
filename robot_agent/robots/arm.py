"""A simulated six-joint arm in plain numpy: position-commanded in rad, two synthetic cameras, no simulator to install.

It stands in for a servo arm wherever the task does not matter: tests, benchmarks, trying out the stack. A control period
costs under 0.1 ms, a picture of 64 pixels about as much. Success is to bring every joint within 0.03 rad of a goal that the
state shows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from pydantic import Field

from manyhands.errors import InvalidInput, Refused
from manyhands.robot.types import CameraGeometry, EpisodeOutcome
from manyhands.spec import Feature, FeatureKind, Spec

from ..camera import Camera, picture
from ..robot import CommandKind, ElementLimit, Reading, Readings, Rest, Robot, RobotOptions, SafetyRules, Vector
from ..teleoperator import Teleoperator

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
LOW = np.array([-1.9, -1.7, -1.7, -1.6, -2.7, 0.0])
HIGH = np.array([1.9, 1.7, 1.7, 1.6, 2.7, 1.7])
HOME = np.array([0.0, -0.6, 0.9, 0.3, 0.0, 0.4])
PARKED = np.array([0.0, -1.5, 1.5, 0.6, 0.0, 0.1])
# Where the links end up without torque.
FALLEN = np.array([0.0, 1.6, 1.6, 1.5, 0.0, 0.4])

TASK = "move the arm to the goal"
AT_GOAL_RAD = 0.03
# A servo closes this part of the way to its target in one control period.
SERVO_GAIN = 0.7
STIFFNESS_NM_PER_RAD = 12.0

STATE = "observation.state"
FRONT = "observation.images.front"
WRIST = "observation.images.wrist"
ACTION = "action"


class ArmOptions(RobotOptions):
    rate_hz: float = Field(30.0, gt=0, le=1000, description="control periods per second")
    watchdog_s: float = Field(0.25, gt=0, le=10, description="seconds without a command until the robot holds")
    image_size: int = Field(64, ge=16, le=1024, description="pixels, height and width of both cameras")
    park_after_s: float | None = Field(None, ge=0, description="seconds of holding until it parks; default: keeps holding")
    drop_after_s: float | None = Field(None, ge=0, description="seconds of rest until it lets go of torque; default: never")
    on_exit: Rest = Field(Rest.HOLD, description="what it is left with when the agent ends: hold, park or drop")
    task: str = Field(TASK, description="the instruction; this scene has one")


class SimulatedArm(Robot):
    type_name = "arm"
    Options = ArmOptions
    simulated = True

    def __init__(self, options: ArmOptions) -> None:
        if options.task != TASK:
            raise InvalidInput(f"this scene offers {TASK!r} only, not {options.task!r}", field="options.task")
        size = options.image_size
        positions = tuple(f"{joint}.pos" for joint in JOINTS)
        self.spec = Spec(
            observation=(
                Feature(
                    name=STATE,
                    kind=FeatureKind.STATE,
                    dtype="float32",
                    shape=(12,),
                    element_names=(*positions, *(f"goal.{name}" for name in positions)),
                    element_units=("rad",) * 12,
                ),
                Feature(name=FRONT, kind=FeatureKind.IMAGE, dtype="uint8", shape=(size, size, 3)),
                Feature(name=WRIST, kind=FeatureKind.IMAGE, dtype="uint8", shape=(size, size, 3)),
            ),
            action=(
                Feature(
                    name=ACTION,
                    kind=FeatureKind.ACTION,
                    dtype="float32",
                    shape=(6,),
                    element_names=positions,
                    element_units=("rad",) * 6,
                ),
            ),
            control_rate_hz=options.rate_hz,
            robot_type="simulated-arm",
        )
        self.rules = SafetyRules(
            elements=tuple(
                ElementLimit(
                    name=name,
                    kind=CommandKind.POSITION,
                    low=float(low),
                    high=float(high),
                    max_step=0.2,
                    max_velocity=4.0,
                    max_torque=8.0,
                )
                for name, low, high in zip(positions, LOW, HIGH, strict=True)
            ),
            required_states=(STATE,),
            watchdog_s=options.watchdog_s,
            park_after_s=options.park_after_s,
            drop_after_s=options.drop_after_s,
            on_exit=options.on_exit,
        )
        self.cameras = tuple(
            CameraGeometry(name=name, source_height=size, source_width=size, resize="none") for name in (FRONT, WRIST)
        )
        self.teleoperators = {"expert": GoalSeeker()}
        self.tasks = (TASK,)
        self.task = TASK
        self._drawn = {camera.name: DrawnCamera(camera, self) for camera in self.cameras}
        self._connected = False
        self.position: Vector = HOME.copy()
        self.goal: Vector = HOME.copy()
        self._target: Vector = HOME.copy()
        self._limp = False

    def connect(self) -> None:
        self._connected = True
        self.reset(0, "")

    def observe(self, *, include_images: bool) -> dict[str, Reading]:
        if not self._connected:
            raise Refused("the arm is not connected", field="robot")
        readings = {STATE: Reading.now(np.concatenate([self.position, self.goal]).astype(np.float32))}
        if include_images:
            readings.update((name, camera.read()) for name, camera in self._drawn.items())
        return readings

    def apply(self, action: Vector) -> None:
        self._limp = False
        self._target = np.clip(action, LOW, HIGH)
        self.position = self.position + SERVO_GAIN * (self._target - self.position)

    def hold_action(self, readings: Readings) -> Vector:
        return readings[STATE].value[:6].astype(np.float64)

    def torques(self, readings: Readings) -> Vector | None:
        return np.zeros(6) if self._limp else STIFFNESS_NM_PER_RAD * (self._target - self.position)

    def park_action(self, readings: Readings) -> Vector | None:
        return PARKED

    def drop(self) -> None:
        self._limp = True
        self.position = FALLEN.copy()

    def reset(self, seed: int, task: str) -> None:
        if task not in ("", TASK):
            raise InvalidInput(f"this scene offers {TASK!r} only, not {task!r}", field="task")
        if seed < 0:
            raise InvalidInput(f"seed ({seed}) must be >= 0", field="seed")
        random = np.random.default_rng(seed)
        self.position = np.clip(HOME + random.uniform(-0.05, 0.05, 6), LOW, HIGH)
        self.goal = np.clip(HOME + random.uniform(-0.8, 0.8, 6), LOW, HIGH)
        self._target = self.position.copy()
        self._limp = False

    def outcome(self) -> EpisodeOutcome:
        there = np.abs(self.position - self.goal).max() < AT_GOAL_RAD
        return EpisodeOutcome.SUCCESS if there else EpisodeOutcome.RUNNING

    def disconnect(self) -> None:
        self._connected = False


class DrawnCamera(Camera):
    """Draws the arm's tip and the goal's as squares: the front camera in the plane of the links, the wrist's from above."""

    def __init__(self, geometry: CameraGeometry, arm: SimulatedArm) -> None:
        self.geometry = geometry
        self._arm = arm
        shade = np.linspace(60, 200, geometry.source_height).astype(np.uint8)
        self._background = np.repeat(shade[:, None, None], geometry.source_width, axis=1).repeat(3, axis=2)

    def connect(self) -> None:
        """Nothing to open."""

    def read(self) -> Reading:
        pixels = self._background.copy()
        for joints, colour in ((self._arm.goal, (40, 200, 40)), (self._arm.position, (220, 40, 40))):
            row, column = self._pixel(joints)
            half = max(1, self.geometry.source_height // 16)
            pixels[max(0, row - half) : row + half, max(0, column - half) : column + half] = colour
        return picture(pixels, time.monotonic_ns())

    def disconnect(self) -> None:
        """Nothing to close."""

    def _pixel(self, joints: Vector) -> tuple[int, int]:
        pan, lift, elbow = joints[:3]
        reach = np.cos(lift) + np.cos(lift + elbow)
        height = -np.sin(lift) - np.sin(lift + elbow)
        across = reach * np.sin(pan)
        vertical = reach * np.cos(pan) if self.geometry.name == WRIST else height
        horizontal = across if self.geometry.name == WRIST else reach
        row = int((0.5 - 0.24 * vertical) * self.geometry.source_height)
        column = int((0.5 + 0.24 * horizontal) * self.geometry.source_width)
        return row, column


class GoalSeeker(Teleoperator):
    """Goes straight to the goal that the state shows, at most 0.1 rad a control period."""

    def action(self, readings: Readings) -> Mapping[str, npt.NDArray[np.generic]]:
        state = readings[STATE].value.astype(np.float64)
        position, goal = state[:6], state[6:]
        return {ACTION: (position + np.clip(goal - position, -0.1, 0.1)).astype(np.float32)}
