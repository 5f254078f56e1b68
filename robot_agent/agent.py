"""The robot's thread: the only one that touches the devices, the safety core and the GL context.

Work comes in as functions from the RPC face and runs in order of arrival; in between, once a control period, the thread does
its own duty: hold, park or drop when nobody commands, poll pedals, publish a snapshot for viewers.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from manyhands import stamps
from manyhands.common.v1 import common_pb2
from manyhands.errors import InternalError, ManyhandsError, NotFound, Unreachable
from manyhands.metrics import timed_stage
from manyhands.robot.types import EpisodeOutcome, RobotStatus, TeleopEvent, TeleopEventKind

from .robot import Readings, Rest, Robot, Vector, action_features, action_vector
from .safety import Duty, Health, SafetyCore
from .state import StateDirectory

logger = logging.getLogger(__name__)
T = TypeVar("T")
KEPT_EVENTS = 1000
# An agent must end within 5 s of a signal.
PARK_TIMEOUT_S = 3.0
# In the elements' units: rad or m.
PARKED_WITHIN = 0.02
Arrays = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """The robot at one moment. version grows with every control period; tick counts those of the episode."""

    version: int
    tick: int
    readings: Readings
    health: Mapping[str, Health]
    status: RobotStatus
    outcome: EpisodeOutcome
    task: str
    executed: Arrays

    @property
    def captured_ns(self) -> int:
        return min(reading.captured_ns for reading in self.readings.values())


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What a teleoperator would do now."""

    action: Arrays
    intervening: bool


@dataclass(frozen=True, kw_only=True)
class Executed:
    action: Arrays
    clamped: tuple[str, ...]
    status: RobotStatus


class Agent:
    """Runs one robot. start() connects it and returns when it is still; submit() runs a function in its thread."""

    def __init__(
        self,
        robot: Robot,
        state: StateDirectory,
        *,
        required_devices: tuple[Path, ...] = (),
        on_failure: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.robot = robot
        self.core = SafetyCore(
            robot.rules,
            control_rate_hz=robot.spec.control_rate_hz,
            memory=state,
            clock=clock,
            constrain=robot.constrain,
        )
        self._required_devices = required_devices
        self._on_failure = on_failure
        self._clock = clock
        self._period_s = 1.0 / robot.spec.control_rate_hz
        self._jobs: queue.SimpleQueue[tuple[Callable[[], object], Future[object]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="robot", daemon=True)
        self._started: Future[None] = Future()
        self._closing = False
        self._version = 0
        self._tick = 0
        self._dropped = False
        self._executed: Arrays = {}
        self._pictured: Snapshot | None = None
        self._events: deque[TeleopEvent] = deque(maxlen=KEPT_EVENTS)
        self._next_event = 1
        self._success_told = False
        self._next_duty_s = 0.0

    # For the RPC face, any thread.

    def start(self) -> None:
        """Raises what connect() raised; then nothing runs."""
        self._thread.start()
        self._started.result()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Runs job in the robot's thread, after what was submitted before."""
        future: Future[T] = Future()
        if self._closing:
            future.set_exception(Unreachable("the robot agent is stopping"))
        else:
            self._jobs.put((job, future))  # type: ignore[arg-type]
        return future

    def close(self, timeout_s: float = 5.0) -> None:
        """Leaves the robot as its rules say, closes the devices and ends the thread."""
        self._closing = True
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def events_since(self, number: int) -> list[TeleopEvent]:
        """Kept events with this number or a higher one, oldest first."""
        return [event for event in tuple(self._events) if event.number >= number]

    @property
    def next_event(self) -> int:
        """The number that the next event will have."""
        return self._next_event

    # Jobs: only in the robot's thread, through submit().

    def look(self, *, include_images: bool, max_picture_age_s: float = 0.0, newer_than: int = -1) -> Snapshot:
        """The newest snapshot. Pictures of this control period are taken once, whoever asks; a viewer also takes older ones,
        up to max_picture_age_s, as long as their version is above newer_than."""
        if include_images:
            kept = self._pictured
            if kept is not None and (
                kept.version == self._version
                or (kept.version > newer_than and self._clock() - kept.captured_ns / 1e9 <= max_picture_age_s)
            ):
                return kept
        if not include_images:
            return self._snapshot(self._observe(include_images=False))
        with timed_stage("robot", "pictures"):
            self._pictured = self._snapshot(self._observe(include_images=True))
        return self._pictured

    def propose(self, name: str, readings: Readings) -> Proposal:
        """What the named teleoperator would do with these readings."""
        teleoperator = self.robot.teleoperators.get(name)
        if teleoperator is None:
            raise NotFound(
                f"no teleoperator {name!r}; this robot has {', '.join(self.robot.teleoperators) or 'none'}",
                field="teleoperator",
            )
        action = teleoperator.action(readings)
        for feature in self.robot.spec.action:
            feature.check(np.asarray(action[feature.name]))
        return Proposal(action=action, intervening=teleoperator.intervening)

    def command(self, epoch: int, sequence: int, action: Arrays, age_s: float) -> Executed:
        with timed_stage("robot", "command"):
            readings = self._observe(include_images=False)
            judgement = self.core.judge(
                epoch=epoch,
                sequence=sequence,
                wanted=action_vector(action, self.robot.spec),
                age_s=age_s,
                readings=readings,
                measured=lambda: self.robot.hold_action(readings),
                torques=lambda: self.robot.torques(readings),
            )
            self._apply(judgement.executed)
        return Executed(action=self._executed, clamped=judgement.clamped, status=self.core.status())

    def begin_reset(self, epoch: int, seed: int, task: str) -> None:
        self.core.begin_episode(epoch)
        self._guard(lambda: self.robot.reset(seed, task))
        self.core.begin_episode(epoch)

    def home_step(self, epoch: int) -> bool:
        """One control period of the way home; True when it is there. Refused once a stop or a hold came in between."""
        self.core.renew(epoch)
        readings = self._observe(include_images=False)
        home = self._guard(lambda: self.robot.home_action(readings))
        if home is None:
            return True
        here = self._guard(lambda: self.robot.hold_action(readings))
        self._apply(self.core.approach(home, here, self.robot.torques(readings), readings))
        return False

    def end_reset(self, epoch: int) -> Snapshot:
        """The first snapshot of the episode."""
        self.core.begin_episode(epoch)
        self._version += 1
        self._tick = 0
        self._success_told = False
        self._executed = {}
        return self.look(include_images=False)

    def hold(self) -> RobotStatus:
        self.core.hold()
        self._rest(Duty.HOLD)
        return self.core.status()

    def stop(self, reason: str) -> RobotStatus:
        """Still first, remembered second: a disk may be slow. Each is done whatever happens to the other."""
        logger.warning("emergency stop: %s", reason)
        self.core.stop(reason)
        self._tell(TeleopEventKind.STOP, "emergency stop")
        try:
            self._rest(self.core.duty())
        finally:
            self.core.remember_stop()
        return self.core.status()

    # The thread.

    def _run(self) -> None:
        try:
            for teleoperator in self.robot.teleoperators.values():
                teleoperator.connect()
            self.robot.connect()
        except BaseException as error:
            self._leave(connected=False)
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        try:
            self._serve()
        except BaseException:
            logger.exception("the robot's thread failed; leaving the robot safe")
            self._on_failure()
        finally:
            self._closing = True
            self._leave()
            self._refuse_waiting()

    def _serve(self) -> None:
        self._next_duty_s = self._clock() + self._period_s
        while True:
            try:
                item = self._jobs.get(timeout=max(0.0, self._next_duty_s - self._clock()))
            except queue.Empty:
                self._do_duty()
                continue
            if item is None:
                return
            job, future = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:
                    future.set_exception(error)
            # A busy queue must not starve the watchdog.
            if self._clock() >= self._next_duty_s:
                self._do_duty()

    def _do_duty(self) -> None:
        now = self._clock()
        # Keeps the grid; after a stall the missed periods are dropped, not caught up.
        self._next_duty_s += self._period_s
        if self._next_duty_s <= now:
            self._next_duty_s = now + self._period_s
        missing = next((path for path in self._required_devices if not path.exists()), None)
        if missing is not None and not self.core.fault:
            logger.error("required device %s is gone", missing)
            self.core.fail(f"the required device {missing} is gone")
        duty = self.core.duty()
        if duty is not Duty.NOTHING:
            try:
                self._rest(duty)
            except Exception:
                # _guard told the core; the loop lives on, so that the status can be asked for.
                logger.debug("resting failed", exc_info=True)
        for name, teleoperator in self.robot.teleoperators.items():
            for kind in teleoperator.events():
                self._tell(kind, name)

    def _rest(self, duty: Duty) -> None:
        if duty is Duty.DROP:
            if not self._dropped:
                self._guard(self.robot.drop)
                self._dropped = True
            return
        readings = self._observe(include_images=False)
        here = self._guard(lambda: self.robot.hold_action(readings))
        target = here
        if duty is Duty.PARK:
            park = self._guard(lambda: self.robot.park_action(readings))
            if park is not None:
                target = self.core.approach(park, here, self.robot.torques(readings), readings)
        self._apply(target)

    def _apply(self, action: Vector) -> None:
        self._guard(lambda: self.robot.apply(action))
        self._dropped = False
        self._version += 1
        self._tick += 1
        self._executed = action_features(action, self.robot.spec)
        if not self._success_told and self.robot.outcome() is EpisodeOutcome.SUCCESS:
            self._success_told = True
            self._tell(TeleopEventKind.SUCCESS, "scene")

    def _observe(self, *, include_images: bool) -> Readings:
        return self._guard(lambda: self.robot.observe(include_images=include_images))

    def _guard(self, act: Callable[[], T]) -> T:
        """Whatever a driver raises takes the robot to FAULT, and the caller hears of it; its own refusals do not."""
        try:
            return act()
        except ManyhandsError:
            raise
        except Exception as error:
            if not self.core.fault:  # Said once, not at the control rate.
                logger.exception("the robot failed")
            self.core.fail(f"{type(error).__name__}: {error}")
            raise InternalError(f"the robot failed: {error}; it is in fault until the agent is restarted") from error

    def _snapshot(self, readings: Readings) -> Snapshot:
        return Snapshot(
            version=self._version,
            tick=self._tick,
            readings=readings,
            health=self.core.health(readings),
            status=self.core.status(),
            outcome=self.robot.outcome(),
            task=self.robot.task,
            executed=self._executed,
        )

    def _tell(self, kind: TeleopEventKind, source: str) -> None:
        stamp = common_pb2.Stamp(clock_id=stamps.CLOCK_ID, monotonic_ns=time.monotonic_ns())
        self._events.append(TeleopEvent(number=self._next_event, kind=kind, source=source, stamp=stamp))
        self._next_event += 1

    def _leave(self, *, connected: bool = True) -> None:
        """Safe exit: each step is tried whatever the one before did."""
        exits = {Rest.HOLD: [self._still], Rest.PARK: [self._park], Rest.DROP: [self._still, self.robot.drop]}
        steps = exits[self.robot.rules.on_exit] if connected else []
        steps += [teleoperator.disconnect for teleoperator in self.robot.teleoperators.values()]
        for step in [*steps, self.robot.disconnect]:
            try:
                step()
            except Exception:
                logger.exception("leaving the robot: %s failed", getattr(step, "__qualname__", step))

    def _still(self) -> None:
        self.robot.apply(self.robot.hold_action(self.robot.observe(include_images=False)))

    def _park(self) -> None:
        """Within the step limits and PARK_TIMEOUT_S; a fault or an emergency stop keeps it where it is."""
        self._still()
        self.core.hold()
        deadline_s = self._clock() + PARK_TIMEOUT_S
        while not (self.core.fault or self.core.stopped) and self._clock() < deadline_s:
            readings = self.robot.observe(include_images=False)
            here, park = self.robot.hold_action(readings), self.robot.park_action(readings)
            if park is None or np.abs(park - here).max() < PARKED_WITHIN:
                return
            self.robot.apply(self.core.approach(park, here, self.robot.torques(readings), readings))
            time.sleep(self._period_s)

    def _refuse_waiting(self) -> None:
        while True:
            try:
                item = self._jobs.get_nowait()
            except queue.Empty:
                return
            if item is not None:
                item[1].set_exception(Unreachable("the robot agent is stopping"))
