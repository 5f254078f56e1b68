"""A robot agent as a process of its own, spoken to over real sockets."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from manyhands import codec, stamps
from manyhands.channel import connect, translated_errors
from manyhands.clients.robot import Authority, EpisodeOutcome, RobotClient, RobotMode, TeleopEventKind
from manyhands.common.v1 import common_pb2
from manyhands.errors import AlreadyExists, InvalidInput, ManyhandsError, NotFound, Refused
from manyhands.robot.v1 import robot_pb2, robot_pb2_grpc

ANY_PORT = ("--address", "127.0.0.1:0")
HOME = np.array([0.0, -0.6, 0.9, 0.3, 0.0, 0.4], dtype=np.float32)


@contextlib.contextmanager
def agent(state_dir: Path, *arguments: str, robot: str = "arm") -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "manyhands", "robot", "--robot", robot, "--robot-id", "left", *ANY_PORT]
    process = subprocess.Popen(
        [*command, "--state-dir", str(state_dir), *arguments], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout is not None
    try:
        ready = process.stdout.readline().split()
        assert ready[:1] == ["READY"], f"the agent ended with {process.wait(10)}"
        yield ready[1], process
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One agent for the tests that leave it as they found it."""
    with agent(tmp_path_factory.mktemp("left")) as (address, _):
        yield address


@pytest.fixture
def robot(shared: str) -> Iterator[RobotClient]:
    with RobotClient(shared) as client:
        yield client


def eventually(check: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def position_of(client: RobotClient) -> np.ndarray:
    return client.get_observation().values["observation.state"][:6]


def test_it_describes_itself(robot):
    description = robot.describe()
    assert (description.robot_id, description.simulated, description.watchdog_s) == ("left", True, 0.25)
    assert [limit.element_name for limit in description.limits] == list(description.spec.action[0].element_names)
    assert description.limits[0].max_step == pytest.approx(4.0 / 30)  # 4 rad/s at 30 Hz, under its step of 0.2.
    assert [camera.name for camera in description.cameras] == [feature.name for feature in description.spec.images]
    assert description.teleoperators == ("expert",)
    assert description.tasks == ("move the arm to the goal",)


def test_the_expert_brings_it_to_the_goal(robot):
    robot.acquire("actor/left")
    start = robot.reset(11)
    assert (start.tick, start.task) == (0, "move the arm to the goal")
    for _ in range(60):
        seen = robot.get_observation(teleoperator="expert")
        assert seen.valid
        if seen.outcome is EpisodeOutcome.SUCCESS:
            break
        result = robot.command(seen.teleop_action, age_s=0.01)
        np.testing.assert_allclose(result.executed_action["action"], seen.teleop_action["action"], atol=1e-6)
    assert seen.outcome is EpisodeOutcome.SUCCESS
    assert seen.tick > 5
    assert seen.status.mode is RobotMode.ACTIVE


def test_only_an_existing_teleoperator_is_asked(robot):
    with pytest.raises(NotFound, match="expert"):
        robot.get_observation(teleoperator="joystick")


def test_raw_pictures_are_exact_and_jpeg_ones_close(robot):
    robot.acquire("actor/left")
    robot.reset(1)
    raw = robot.get_observation(include_images=True, image_encoding=common_pb2.IMAGE_ENCODING_RAW_RGB8)
    jpeg = robot.get_observation(include_images=True)
    assert list(raw.values) == ["observation.state", "observation.images.front", "observation.images.wrist"]
    assert raw.tick == jpeg.tick, "both of the same control period, which makes them comparable"
    for name in ("observation.images.front", "observation.images.wrist"):
        assert raw.values[name].shape == (64, 64, 3)
        difference = np.abs(raw.values[name].astype(int) - jpeg.values[name].astype(int))
        assert difference.mean() < 3


def test_a_jump_is_cut_into_steps_that_are_named(robot):
    robot.acquire("actor/left")
    robot.reset(1)
    before = position_of(robot)
    result = robot.command({"action": before + np.array([1.0, 0, 0, 0, 0, 0], dtype=np.float32)})
    assert result.clamped_elements == ("shoulder_pan.pos",)
    assert result.executed_action["action"][0] - before[0] == pytest.approx(4.0 / 30, abs=1e-5)
    assert result.status.clamped_count >= 1


@pytest.mark.parametrize(
    ("action", "field"),
    [
        ({"action": np.array([0, np.nan, 0, 0, 0, 0], dtype=np.float32)}, "action"),
        ({"action": np.zeros(7, dtype=np.float32)}, "action"),
        ({"action": np.zeros(6, dtype=np.float64)}, "action"),
        ({"joints": np.zeros(6, dtype=np.float32)}, "action"),
        ({"action": np.zeros(6, dtype=np.float32), "gripper": np.zeros(1, dtype=np.float32)}, "gripper"),
        ({}, "action"),
    ],
    ids=["nan", "shape", "dtype", "name", "extra", "nothing"],
)
def test_an_action_that_is_not_the_specs_is_refused_by_name_before_any_motion(robot, action, field):
    robot.acquire("actor/left")
    robot.reset(1)
    before = robot.get_observation()
    with pytest.raises(InvalidInput) as caught:
        robot.command(action)
    assert caught.value.field == field
    after = robot.get_observation()
    assert after.status.refused_count == before.status.refused_count + 1
    np.testing.assert_array_equal(before.values["observation.state"], after.values["observation.state"])


def test_a_nan_is_named_by_its_joint(robot):
    robot.acquire("actor/left")
    robot.reset(1)
    with pytest.raises(InvalidInput, match=r"shoulder_lift\.pos"):
        robot.command({"action": np.array([0, np.nan, 0, 0, 0, 0], dtype=np.float32)})


def test_a_replayed_sequence_moves_nothing(robot):
    robot.acquire("actor/left")
    robot.reset(1)
    target = {"action": position_of(robot) + np.float32(0.1)}
    robot.command(target, sequence=7)
    before = robot.get_observation()
    for sequence in (7, 6):
        with pytest.raises(AlreadyExists):
            robot.command(target, sequence=sequence)
    after = robot.get_observation()
    assert after.tick == before.tick
    np.testing.assert_array_equal(before.values["observation.state"], after.values["observation.state"])


def test_a_command_on_an_old_observation_is_refused(robot):
    robot.acquire("actor/left")
    robot.reset(1)
    with pytest.raises(Refused) as caught:
        robot.command({"action": HOME}, age_s=60.0)
    assert caught.value.field == "age"


def test_two_holders_contend_and_one_gets_it(shared):
    grants, refusals = [], []
    clients = [RobotClient(shared) for _ in range(4)]
    barrier = threading.Barrier(len(clients))

    def contend(number: int) -> None:
        barrier.wait()
        try:
            grants.append((number, clients[number].acquire(f"actor/{number}")))
        except Refused as error:
            refusals.append(error)

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(len(clients))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(grants) == 1
    winner, epoch = grants[0]
    assert all(f"actor/{winner}" in str(error) and error.retry_after_s for error in refusals)
    loser = clients[(winner + 1) % len(clients)]
    clients[winner].release()
    assert loser.acquire("actor/next", Authority.HUMAN) > epoch
    assert loser.describe().status.authority is Authority.HUMAN
    # The former holder's epoch no longer moves the robot.
    stale = robot_pb2.CommandRequest(epoch=epoch, sequence=1, action=codec.encode_values({"action": HOME}))
    with connect(shared) as channel, pytest.raises(Refused, match="actor/next"), translated_errors():
        robot_pb2_grpc.RobotServiceStub(channel).Command(stale, timeout=5)
    for client in clients:
        client.close()


def test_a_repeated_request_for_control_gets_the_same_lease(shared):
    with RobotClient(shared) as first, RobotClient(shared) as second:
        epoch = first.acquire("actor/left", request_id="once")
        assert second.acquire("actor/left", request_id="once") == epoch


def test_silence_holds_and_the_next_command_goes_on(robot):
    robot.acquire("actor/left", ttl_s=5.0)
    robot.reset(2)
    target = {"action": position_of(robot) + np.float32(0.5)}
    robot.command(target)
    holds = robot.describe().status.hold_count
    eventually(lambda: robot.describe().status.mode is RobotMode.HOLDING)
    assert robot.describe().status.hold_count == holds + 1
    held = robot.get_observation()
    # The world goes on while it holds, at the control rate, and it stays where it was.
    eventually(lambda: robot.get_observation().tick > held.tick + 5)
    np.testing.assert_allclose(position_of(robot), held.values["observation.state"][:6], atol=1e-4)
    assert robot.command(target).status.mode is RobotMode.ACTIVE


def test_hold_is_for_everybody(shared, robot):
    robot.acquire("actor/left", ttl_s=5.0)
    robot.reset(2)
    robot.command({"action": position_of(robot)})
    with RobotClient(shared) as operator:
        assert operator.hold("somebody is in the cell").mode is RobotMode.HOLDING


DRIVER = """
import sys, time
from manyhands.clients.robot import RobotClient
robot = RobotClient(sys.argv[1])
robot.acquire("actor/doomed", ttl_s=0.6)
robot.reset(4)
print("driving", flush=True)
while True:
    robot.command(robot.get_observation(teleoperator="expert").teleop_action)
    time.sleep(1 / 30)
"""


def test_killing_the_actor_holds_the_robot_and_frees_it(shared, robot):
    actor = subprocess.Popen([sys.executable, "-c", DRIVER, shared], stdout=subprocess.PIPE, text=True)
    try:
        assert actor.stdout is not None
        assert actor.stdout.readline() == "driving\n"
        eventually(lambda: robot.describe().status.mode is RobotMode.ACTIVE)
        with pytest.raises(Refused, match="actor/doomed"):
            robot.acquire("actor/left")
        epoch = robot.describe().status.lease_epoch
        actor.send_signal(signal.SIGKILL)
        actor.wait(10)
        eventually(lambda: robot.describe().status.mode is RobotMode.HOLDING)
        still = position_of(robot)
        eventually(lambda: robot.describe().status.mode is RobotMode.IDLE)
        np.testing.assert_allclose(position_of(robot), still, atol=1e-4)
        assert robot.acquire("actor/left") > epoch
    finally:
        actor.kill()
        actor.wait()
        assert actor.stdout is not None
        actor.stdout.close()


def test_viewers_see_newer_and_newer_pictures_at_their_own_rate(shared, robot):
    seen: list[list[tuple[int, int]]] = [[], []]

    def view(number: int) -> None:
        with RobotClient(shared) as viewer:
            for observation in viewer.observe(10.0):
                assert observation.task == "move the arm to the goal"
                seen[number].append((observation.captured.monotonic_ns, len(observation.values)))
                if len(seen[number]) == 6:
                    return

    began = time.monotonic()
    threads = [threading.Thread(target=view, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert time.monotonic() - began > 0.4, "six pictures at 10 Hz take half a second"
    for stamps_seen in seen:
        assert [count for _, count in stamps_seen] == [3] * 6
        assert sorted(set(stamps_seen)) == stamps_seen
    # Both look at the same instants and share what was rendered for one of them.
    assert len({stamp for stamp, _ in seen[0]} & {stamp for stamp, _ in seen[1]}) >= 3


@pytest.mark.parametrize("rate_hz", [0.0, -1.0, 31.0, float("nan")])
def test_viewers_may_not_ask_for_more_than_the_control_rate(robot, rate_hz):
    with pytest.raises(InvalidInput) as caught:
        next(robot.observe(rate_hz))
    assert caught.value.field == "max_rate_hz"


def test_events_are_numbered_and_replayed(robot):
    robot.acquire("actor/left")
    robot.reset(21)
    live = robot.watch_teleop_events()
    received: list[int] = []

    def wait_for_success() -> None:
        received.append(next(event.number for event in live if event.kind is TeleopEventKind.SUCCESS))

    waiting = threading.Thread(target=wait_for_success)
    waiting.start()
    time.sleep(0.1)  # The stream counts from when it opened; a lost race shows as a time-out below, never as a pass.
    while robot.get_observation().outcome is EpisodeOutcome.RUNNING:
        robot.command(robot.get_observation(teleoperator="expert").teleop_action)
    waiting.join(10)
    assert len(received) == 1
    replayed = next(iter(robot.watch_teleop_events(from_number=received[0])))
    assert (replayed.number, replayed.source) == (received[0], "scene")


def test_a_reset_without_the_lease_or_for_another_task_is_refused(shared, robot):
    robot.acquire("actor/left")
    with pytest.raises(InvalidInput, match="move the arm"):
        robot.reset(1, "make coffee")
    with RobotClient(shared) as other, pytest.raises(Refused):
        other.reset(1)


def test_an_emergency_stop_latches_over_a_restart_until_cleared_at_the_robot(tmp_path):
    with agent(tmp_path) as (address, process), RobotClient(address) as robot:
        epoch = robot.acquire("actor/left", ttl_s=30.0)
        robot.reset(1)
        robot.command({"action": position_of(robot)})
        with RobotClient(address) as operator:
            assert operator.emergency_stop("smoke").mode is RobotMode.EMERGENCY_STOP
            operator.emergency_stop("again")  # Idempotent.
        with pytest.raises(Refused, match="smoke"):
            robot.command({"action": HOME})
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    with agent(tmp_path) as (address, _), RobotClient(address) as robot:
        description = robot.describe()  # Answered also in a stop.
        assert description.status.mode is RobotMode.EMERGENCY_STOP
        assert "smoke" in description.status.fault
        assert robot.get_observation(include_images=True).valid
        with pytest.raises(Refused, match="clear-stop"):
            robot.acquire("actor/left")
        clear = [sys.executable, "-m", "manyhands", "robot", "--state-dir", str(tmp_path), "--clear-stop"]
        assert subprocess.run(clear, check=True, capture_output=True, text=True).stdout == "emergency stop cleared\n"
        eventually(lambda: robot.describe().status.mode is RobotMode.IDLE)
        assert robot.acquire("actor/left") > epoch


def test_it_refuses_to_start_without_a_configured_stop_and_faults_when_it_goes(tmp_path):
    pedal = tmp_path / "pedal"
    arguments = ["--required-devices", str(pedal)]
    command = [
        sys.executable,
        "-m",
        "manyhands",
        "robot",
        "--robot",
        "arm",
        "--state-dir",
        str(tmp_path / "state"),
        *ANY_PORT,
        *arguments,
    ]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert refused.returncode != 0
    assert f"{pedal} is missing" in refused.stderr
    assert "Traceback" not in refused.stderr
    pedal.touch()
    with agent(tmp_path / "state", *arguments) as (address, _), RobotClient(address) as robot:
        robot.acquire("actor/left", ttl_s=10.0)
        robot.reset(1)
        robot.command({"action": position_of(robot)})
        pedal.unlink()
        eventually(lambda: robot.describe().status.mode is RobotMode.FAULT)
        with pytest.raises(Refused, match="pedal"):
            robot.command({"action": position_of(robot)})


def test_a_second_agent_for_the_same_robot_is_refused(tmp_path):
    with agent(tmp_path):
        command = [sys.executable, "-m", "manyhands", "robot", "--robot", "arm", "--state-dir", str(tmp_path), *ANY_PORT]
        second = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert second.returncode != 0
        assert "another robot agent" in second.stderr


def test_a_signal_ends_it_in_time_with_streams_open_and_a_lease_held(tmp_path):
    with agent(tmp_path) as (address, process), RobotClient(address) as robot:
        robot.acquire("actor/left", ttl_s=30.0)
        view = robot.observe(10.0)
        next(view)
        began = time.monotonic()
        process.terminate()
        with contextlib.suppress(ManyhandsError):
            for _ in view:
                pass
        assert process.wait(10) == 0
        assert time.monotonic() - began < 5.0


def test_the_meta_world_robot_opens_a_drawer_over_the_wire(tmp_path):
    arguments = ("--task", "drawer-open", "--watchdog-s", "2")
    with agent(tmp_path, *arguments, robot="metaworld") as (address, _), RobotClient(address) as robot:
        robot.acquire("actor/left", ttl_s=10.0)
        assert robot.reset(3).task == "open the drawer"
        pictures = robot.get_observation(include_images=True)
        assert [value.shape for value in pictures.values.values()] == [(39,), (128, 128, 3), (128, 128, 3)]
        for _ in range(150):
            seen = robot.get_observation(teleoperator="expert")
            if seen.outcome is EpisodeOutcome.SUCCESS:
                break
            robot.command(seen.teleop_action, age_s=0.0)
        assert seen.outcome is EpisodeOutcome.SUCCESS
        assert stamps.age_s(seen.captured) is None  # The agent's own clock; not ours to compare.
