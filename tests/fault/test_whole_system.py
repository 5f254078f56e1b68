"""The whole system on real processes, one of them killed or cut off: robots hold, work goes on, nothing recorded is lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local import Topology
from manyhands.actor.v1 import actor_pb2
from manyhands.clients.robot import RobotClient, RobotMode
from manyhands.dataset.v1 import dataset_pb2
from manyhands.errors import AlreadyExists, InvalidInput, ManyhandsError, Refused
from tests.support.fault_lab import kill_engine
from tests.support.proxy import CuttableLink
from tests.support.system import ArmSystem, policy_run, teleoperated_run
from tests.support.waiting import wait_until

POLICY = dataset_pb2.ACTION_SOURCE_POLICY


@pytest.fixture
def system(tmp_path: Path) -> Iterator[ArmSystem]:
    with Topology(tmp_path / "logs", environment={"OMP_NUM_THREADS": "1"}) as topology:
        yield ArmSystem(topology, tmp_path)


def finished_frames(system: ArmSystem, index: int) -> dict[str, int]:
    """{episode uuid: frames} as the actor counted them."""
    with system.actor(index) as actor:
        return {result.episode_uuid: result.frame_count for result in actor.results()}


def stored_frames(system: ArmSystem, index: int) -> dict[str, int]:
    """{episode uuid: frames} as the store published them; an episode that is there twice fails."""
    episodes = [episode for episode in system.published() if episode.robot_id == f"robot-{index}"]
    assert len({episode.episode_uuid for episode in episodes}) == len(episodes)
    return {episode.episode_uuid: episode.frame_count for episode in episodes}


def wait_until_flushed(system: ArmSystem, index: int) -> None:
    def flushed() -> bool:
        with system.actor(index) as actor:
            return actor.status().spooled_frame_count == 0

    wait_until(flushed, 20, f"actor {index} has handed over its spool")


def check_one_episode_each(system: ArmSystem, *, num_robots: int, num_frames: int) -> None:
    """Finished, handed over, and stored as the actor counted it."""
    for index in range(num_robots):
        frames = finished_frames(system, index)
        wait_until_flushed(system, index)
        assert list(frames.values()) == [num_frames]
        assert stored_frames(system, index) == frames
    system.verify_dataset()


def test_killed_inference_service_makes_three_robots_hold_and_go_on(system: ArmSystem) -> None:
    system.start(num_robots=3)
    run = policy_run(episode_count=1, max_episode_steps=600)
    for index in range(3):
        with system.actor(index) as actor:
            actor.start_run(run)
    for index in range(3):
        system.wait_for_source(index, POLICY)

    system.topology.kill("inference")
    for index in range(3):
        system.wait_for_mode(index, RobotMode.HOLDING)
    system.start_inference()
    for index in range(3):
        system.wait_for_source(index, POLICY)
        system.wait_for_mode(index, RobotMode.ACTIVE)

    check_one_episode_each(system, num_robots=3, num_frames=600)


def test_killed_engine_makes_robots_hold_and_go_on(system: ArmSystem) -> None:
    """The front end stays, and so do sessions; robots are held until a new engine process serves."""
    system.start(num_robots=2)
    for index in range(2):
        with system.actor(index) as actor:
            actor.start_run(policy_run(episode_count=1, max_episode_steps=600))
    for index in range(2):
        system.wait_for_source(index, POLICY)

    front_end = system.topology.services["inference"]
    kill_engine(front_end)
    for index in range(2):
        system.wait_for_mode(index, RobotMode.HOLDING)
    for index in range(2):
        system.wait_for_source(index, POLICY)
        system.wait_for_mode(index, RobotMode.ACTIVE)
    assert front_end.process.poll() is None

    check_one_episode_each(system, num_robots=2, num_frames=600)


def test_killed_store_loses_no_frame_while_three_robots_record(system: ArmSystem) -> None:
    system.start(num_robots=3)
    run = teleoperated_run(episode_count=4)
    for index in range(3):
        with system.actor(index) as actor:
            actor.start_run(run)
    with system.store() as store:
        wait_until(lambda: store.get_dataset("arm").recording_count == 3, 20, "three episodes are being recorded")

    system.topology.kill("store")
    system.start_store()

    for index in range(3):
        frames = finished_frames(system, index)
        wait_until_flushed(system, index)
        assert len(frames) == 4
        assert stored_frames(system, index) == frames
    system.verify_dataset()


def test_killed_actor_leaves_its_robot_holding_and_resumes_its_spool(system: ArmSystem) -> None:
    system.start(num_robots=1)
    with system.actor(0) as actor:
        actor.start_run(policy_run(episode_count=2, max_episode_steps=150))
    system.wait_for_source(0, POLICY)
    with system.store() as store:
        wait_until(lambda: store.get_dataset("arm").recording_count == 1, 20, "an episode is being recorded")

    system.topology.kill("actor-0")
    wait_until(lambda: system.robot_mode(0) in (RobotMode.HOLDING, RobotMode.IDLE), 10, "the robot holds")
    system.start_actor(0, "--resume-run")
    system.wait_for_source(0, POLICY)

    frames = finished_frames(system, 0)
    wait_until_flushed(system, 0)
    stored = stored_frames(system, 0)
    assert len(frames) == 2
    assert {uuid: stored[uuid] for uuid in frames} == frames
    interrupted = [episode for episode in system.published() if episode.reason == dataset_pb2.EPISODE_END_INTERRUPTED]
    assert len(interrupted) == 1
    assert interrupted[0].frame_count > 0
    system.verify_dataset()


def test_link_to_the_inference_service_cut_for_five_seconds(system: ArmSystem) -> None:
    system.start_robot(0)
    system.make_checkpoint(system.spec())
    system.start_store()
    with system.store() as store:
        store.create_dataset("arm", system.spec())
    with CuttableLink(system.start_inference()) as link:
        system.start_actor(0, inference=link.address)
        with system.actor(0) as actor:
            actor.start_run(policy_run(episode_count=1, max_episode_steps=500))
            system.wait_for_source(0, POLICY)
            link.cut()
            system.wait_for_mode(0, RobotMode.HOLDING)
            with pytest.raises(AssertionError):  # It stays so for as long as the link is down.
                system.wait_for_mode(0, RobotMode.ACTIVE, timeout_s=4)
            link.mend()
            system.wait_for_source(0, POLICY)
            system.wait_for_mode(0, RobotMode.ACTIVE)
        frames = finished_frames(system, 0)
        assert list(frames.values()) == [500]
        wait_until_flushed(system, 0)
        assert stored_frames(system, 0) == frames


def test_second_robot_of_the_same_name_is_refused_and_does_not_move(system: ArmSystem) -> None:
    system.start(num_robots=1)
    system.start_robot(1, robot_id="robot-0")
    system.start_actor(1)
    with system.actor(0) as first, system.actor(1) as second:
        first.start_run(policy_run())
        system.wait_for_source(0, POLICY)
        with pytest.raises(ManyhandsError, match="robot-0") as refusal:
            second.start_run(policy_run())
        assert isinstance(refusal.value, AlreadyExists | Refused)
        assert system.robot_mode(1) is RobotMode.IDLE
        system.wait_for_source(0, POLICY)
        assert first.status().state == actor_pb2.RUN_STATE_RUNNING


def test_model_with_another_order_of_cameras_is_refused_by_name_before_any_motion(system: ArmSystem) -> None:
    system.start_robot(0)
    spec = system.spec()
    state, front, wrist = spec.observation
    system.make_checkpoint(dataclasses.replace(spec, observation=(state, wrist, front)))
    system.start_inference()
    system.start_actor(0)
    with RobotClient(system.address("robot-0")) as robot, system.actor(0) as actor:
        before = robot.get_observation().values["observation.state"]
        with pytest.raises(InvalidInput, match=r"observation\.images\.(front|wrist)"):
            actor.start_run(policy_run(dataset=""))
        assert robot.describe().status.mode is RobotMode.IDLE
        assert (robot.get_observation().values["observation.state"] == before).all()
