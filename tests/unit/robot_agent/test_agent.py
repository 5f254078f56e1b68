"""The robot's thread with drivers that misbehave: it holds, says so, and leaves the robot safe."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manyhands import codec, stamps
from manyhands.errors import InternalError, Refused, Unreachable
from manyhands.robot.types import Authority, EpisodeOutcome, RobotMode, TeleopEventKind
from manyhands.robot.v1 import robot_pb2
from robot_agent.agent import Agent
from robot_agent.robot import Readings, Rest, Vector
from robot_agent.robots.arm import FALLEN, HOME, PARKED, STATE, ArmOptions, GoalSeeker, SimulatedArm
from robot_agent.service import RobotService
from robot_agent.state import StateDirectory


class Driver(SimulatedArm):
    """The arm, writing down what it is told, and failing where a test asks for it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(ArmOptions(rate_hz=100, **options))
        self.calls: list[str] = []
        self.threads: set[str] = set()
        self.broken: dict[str, Exception] = {}
        self.home: Vector | None = None
        self.silent = False

    def _note(self, call: str) -> None:
        self.calls.append(call)
        self.threads.add(threading.current_thread().name)
        if call in self.broken:
            raise self.broken[call]

    def connect(self) -> None:
        self._note("connect")
        super().connect()

    def observe(self, *, include_images: bool):
        self._note("render" if include_images else "observe")
        readings = super().observe(include_images=include_images)
        if self.silent:
            readings[STATE] = type(readings[STATE])(
                value=readings[STATE].value, captured_ns=readings[STATE].captured_ns, valid=False, reason="no reply"
            )
        return readings

    def apply(self, action: Vector) -> None:
        self._note("apply")
        super().apply(action)

    def drop(self) -> None:
        self._note("drop")
        super().drop()

    def home_action(self, readings: Readings) -> Vector | None:
        return None if self.home is None or np.abs(self.position - self.home).max() < 0.02 else self.home

    def disconnect(self) -> None:
        self._note("disconnect")
        super().disconnect()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    agents: list[Agent] = []

    def begin(driver: Driver, **arguments: Any) -> Agent:
        agent = Agent(driver, StateDirectory(tmp_path, lock=False), **arguments)
        agents.append(agent)
        agent.start()
        return agent

    yield begin
    for agent in agents:
        agent.close()


def ask(agent: Agent, job: Callable[[], Any]) -> Any:
    return agent.submit(job).result(5)


def take(agent: Agent) -> int:
    epoch = ask(agent, lambda: agent.core.acquire("actor/left", Authority.POLICY, 5.0, ""))
    ask(agent, lambda: agent.begin_reset(epoch, 1, ""))
    ask(agent, lambda: agent.end_reset(epoch))
    return int(epoch)


def command(agent: Agent, epoch: int, sequence: int, target: Vector) -> Any:
    return ask(agent, lambda: agent.command(epoch, sequence, {"action": target.astype(np.float32)}, 0.0))


def eventually(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not check():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)


def test_only_one_thread_touches_the_robot(start):
    driver = Driver()
    agent = start(driver)
    epoch = take(agent)
    command(agent, epoch, 1, HOME)
    ask(agent, lambda: agent.look(include_images=True))
    agent.close()
    assert driver.threads == {"robot"}


def test_a_driver_that_raises_takes_the_robot_to_fault_and_nothing_moves_any_more(start):
    driver = Driver()
    agent = start(driver)
    epoch = take(agent)
    driver.broken["apply"] = OSError("bus unplugged")
    with pytest.raises(InternalError, match="bus unplugged"):
        command(agent, epoch, 1, HOME)
    with pytest.raises(Refused, match="bus unplugged"):
        command(agent, epoch, 2, HOME)
    status = ask(agent, agent.core.status)
    assert (status.mode, status.fault) == (RobotMode.FAULT, "OSError: bus unplugged")
    # The loop lives on and goes on trying to hold.
    tried = driver.calls.count("apply")
    eventually(lambda: driver.calls.count("apply") > tried + 3)
    assert ask(agent, lambda: agent.look(include_images=False)).status.mode is RobotMode.FAULT


def test_a_device_that_is_silent_is_invalid_and_commands_are_refused(start):
    driver = Driver()
    agent = start(driver)
    epoch = take(agent)
    driver.silent = True
    with pytest.raises(Refused, match="no reply"):
        command(agent, epoch, 1, HOME)
    snapshot = ask(agent, lambda: agent.look(include_images=False))
    assert (snapshot.health[STATE].valid, snapshot.health[STATE].reason) == (False, "no reply")
    driver.silent = False
    command(agent, epoch, 2, HOME)


def test_it_starts_with_everything_or_not_at_all(start):
    driver = Driver()
    driver.broken["connect"] = Refused("motor 3 does not answer; check its cable")
    with pytest.raises(Refused, match="motor 3"):
        start(driver)
    assert driver.calls[-1] == "disconnect"


def test_a_missing_teleoperator_stops_the_start(start):
    class Unplugged(GoalSeeker):
        def connect(self) -> None:
            raise Refused("the pedal is not plugged in")

    driver = Driver()
    driver.teleoperators = {"pedal": Unplugged()}
    with pytest.raises(Refused, match="pedal"):
        start(driver)
    assert "connect" not in driver.calls, "the arm must not be powered before its pedal is there"


@pytest.mark.parametrize(
    ("rest", "last_calls", "position"),
    [
        (Rest.HOLD, ["apply", "disconnect"], None),
        (Rest.DROP, ["apply", "drop", "disconnect"], FALLEN),
        (Rest.PARK, ["apply", "observe", "disconnect"], PARKED),
    ],
)
def test_it_leaves_the_robot_as_its_rules_say(start, rest, last_calls, position):
    driver = Driver(on_exit=rest)
    agent = start(driver)
    epoch = take(agent)
    before = driver.position.copy()
    command(agent, epoch, 1, before)
    agent.close()
    assert driver.calls[-len(last_calls) :] == last_calls
    np.testing.assert_allclose(driver.position, before if position is None else position, atol=0.03)


def test_each_step_of_leaving_is_tried_whatever_failed_before(start):
    driver = Driver(on_exit=Rest.DROP)
    agent = start(driver)
    driver.broken["observe"] = driver.broken["apply"] = OSError("bus unplugged")
    agent.close()
    assert driver.calls[-2:] == ["drop", "disconnect"]


def test_a_failure_of_the_loop_itself_leaves_the_robot_safe_and_says_so(start):
    driver = Driver(on_exit=Rest.DROP)
    failed = threading.Event()
    agent = start(driver, on_failure=failed.set)

    def explode() -> None:
        raise RuntimeError("a bug")

    agent.core.duty = explode
    assert failed.wait(5)
    eventually(lambda: driver.calls[-1] == "disconnect")
    assert "drop" in driver.calls
    with pytest.raises(Unreachable):
        ask(agent, agent.core.status)


def test_going_home_is_limited_and_a_stop_comes_in_between(start):
    driver = Driver()
    agent = start(driver)
    epoch = take(agent)
    driver.home = HOME + 1.0
    before = driver.position.copy()
    assert not ask(agent, lambda: agent.home_step(epoch))
    assert np.abs(driver.position - before).max() <= 4.0 / 100
    status = ask(agent, lambda: agent.stop("smoke"))
    assert status.mode is RobotMode.EMERGENCY_STOP
    with pytest.raises(Refused, match="smoke"):
        ask(agent, lambda: agent.home_step(epoch))


def test_going_home_arrives_and_a_hold_ends_it(start):
    driver = Driver()
    agent = start(driver)
    epoch = take(agent)
    driver.home = HOME + 0.3
    for _ in range(100):
        if ask(agent, lambda: agent.home_step(epoch)):
            break
    np.testing.assert_allclose(driver.position, driver.home, atol=0.02)
    driver.home = HOME
    ask(agent, agent.hold)
    with pytest.raises(Refused, match="Hold"):
        ask(agent, lambda: agent.home_step(epoch))


def test_unattended_it_parks_and_then_lets_go_once(start):
    driver = Driver(watchdog_s=0.05, park_after_s=0.1, drop_after_s=2.0)
    start(driver)
    eventually(lambda: np.abs(driver.position - PARKED).max() < 0.05)
    assert "drop" not in driver.calls
    eventually(lambda: "drop" in driver.calls)
    applied = driver.calls.count("apply")
    time.sleep(0.1)
    assert driver.calls.count("drop") == 1
    assert driver.calls.count("apply") == applied, "a robot that was let go is not held again"


def test_pictures_of_one_control_period_are_taken_once(start):
    driver = Driver(watchdog_s=5.0)
    agent = start(driver)
    take(agent)
    for _ in range(5):
        ask(agent, lambda: agent.look(include_images=True))
    assert driver.calls.count("render") == 1


def test_events_of_pedals_are_numbered_once_and_only_a_thousand_are_kept(start):
    class Pedal(GoalSeeker):
        pressed = 0

        def events(self) -> list[TeleopEventKind]:
            count, self.pressed = self.pressed, 0
            return [TeleopEventKind.INTERVENTION_START] * count

    driver = Driver()
    pedal = Pedal()
    driver.teleoperators = {"pedal": pedal}
    agent = start(driver)
    pedal.pressed = 1200
    eventually(lambda: agent.next_event == 1201)
    kept = agent.events_since(0)
    assert [event.number for event in kept] == list(range(201, 1201))
    assert {event.source for event in kept} == {"pedal"}
    assert [event.number for event in agent.events_since(1199)] == [1199, 1200]


def test_success_of_the_scene_is_told_once_an_episode(start):
    driver = Driver(watchdog_s=5.0)
    agent = start(driver)
    epoch = take(agent)
    for sequence in range(1, 200):
        snapshot = ask(agent, lambda: agent.look(include_images=False))
        proposal = ask(agent, lambda readings=snapshot.readings: agent.propose("expert", readings))
        ask(agent, lambda s=sequence, a=proposal.action: agent.command(epoch, s, a, 0.0))
    assert snapshot.outcome is EpisodeOutcome.SUCCESS
    assert [event.kind for event in agent.events_since(0)] == [TeleopEventKind.SUCCESS]


def test_a_busy_queue_does_not_starve_the_watchdog(start):
    driver = Driver(watchdog_s=0.1)
    agent = start(driver)
    epoch = take(agent)
    command(agent, epoch, 1, HOME)
    stop = threading.Event()

    def again() -> None:
        if not stop.is_set():
            agent.submit(again)  # The queue is never empty.

    again()
    again()
    try:
        held = driver.calls.count("apply")
        eventually(lambda: driver.calls.count("apply") > held + 3)
        assert ask(agent, agent.core.status).hold_count == 1
    finally:
        stop.set()


@pytest.mark.parametrize("breaking", [None, "apply"])
def test_an_emergency_stop_stills_first_and_is_remembered_whatever_the_driver_does(start, breaking):
    driver = Driver(watchdog_s=5.0)
    agent = start(driver)
    epoch = take(agent)
    command(agent, epoch, 1, HOME)
    memory = agent.core._memory
    latch = memory.latch_stop

    def latching(reason: str) -> None:
        driver.calls.append("latch")
        latch(reason)

    memory.latch_stop = latching
    driver.calls.clear()
    if breaking:
        driver.broken[breaking] = OSError("bus unplugged")
        with pytest.raises(InternalError):
            ask(agent, lambda: agent.stop("smoke"))
    else:
        ask(agent, lambda: agent.stop("smoke"))
    latched = driver.calls.index("latch")
    assert "apply" in driver.calls[:latched]
    assert memory.stop_reason() == "smoke"
    assert [event.kind for event in agent.events_since(0)] == [TeleopEventKind.STOP]


@pytest.mark.parametrize(
    ("method", "done"),
    [("EmergencyStop", True), ("Hold", True), ("ReleaseControl", True), ("Command", False), ("AcquireControl", False)],
)
async def test_what_stops_a_robot_is_done_also_for_a_caller_that_hung_up_and_what_moves_it_is_not(start, method, done):
    driver = Driver(watchdog_s=5.0)
    agent = start(driver)
    epoch = await asyncio.to_thread(take, agent)
    if method == "AcquireControl":
        await asyncio.to_thread(ask, agent, lambda: agent.core.release(epoch))
    before = await asyncio.to_thread(ask, agent, agent.core.status)
    applied = driver.calls.count("apply")
    requests = {
        "EmergencyStop": robot_pb2.EmergencyStopRequest(reason="smoke"),
        "Hold": robot_pb2.HoldRequest(),
        "ReleaseControl": robot_pb2.ReleaseControlRequest(epoch=epoch),
        "Command": robot_pb2.CommandRequest(
            epoch=epoch, sequence=1, action=codec.encode_values({"action": HOME.astype(np.float32)})
        ),
        "AcquireControl": robot_pb2.AcquireControlRequest(
            holder="actor/right", authority=robot_pb2.AUTHORITY_POLICY, ttl=stamps.to_duration(5)
        ),
    }
    busy = threading.Event()
    agent.submit(busy.wait)
    call = asyncio.ensure_future(getattr(RobotService(agent, "left"), method)(requests[method], None))
    await asyncio.sleep(0.05)  # The call is in the queue, behind what keeps the thread busy.
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    busy.set()
    after = await asyncio.to_thread(ask, agent, agent.core.status)
    moved = method == "Command" and driver.calls.count("apply") > applied
    changed = (before.mode, before.lease_epoch, before.lease_holder) != (after.mode, after.lease_epoch, after.lease_holder)
    if method == "Hold":
        assert agent.core._held
    else:
        assert (changed or moved) is done
