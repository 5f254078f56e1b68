"""An actor process between a robot process and the services: runs, refusals and faults over real sockets."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from manyhands import codec, errors
from manyhands.actor.v1 import actor_pb2
from manyhands.clients.actor import ActorClient, roll_out, teleoperate
from manyhands.clients.robot import RobotClient, RobotMode
from manyhands.dataset.v1 import dataset_pb2
from manyhands.spec import Spec
from tests.support.actor_peers import (
    MemoryStore,
    Process,
    ScriptedPolicy,
    Server,
    serve_policy,
    serve_store,
    start_actor,
    start_robot,
)
from tests.support.waiting import wait_until

RATE_HZ = 60


@dataclass
class Site:
    """One robot with its services; actors and clients are closed with it."""

    folder: Path
    robot: Process
    spec: Spec
    store_server: Server
    store: MemoryStore
    policy_server: Server
    policy: ScriptedPolicy
    processes: list[Process] = field(default_factory=list)

    def start(self, *flags: str, name: str = "left", services: bool = True, robot: str = "") -> tuple[Process, ActorClient]:
        words = ["--store", self.store_server.address, "--inference", self.policy_server.address] if services else []
        process = start_actor(self.folder, robot or self.robot.address, *words, *flags, name=name)
        self.processes.append(process)
        return process, ActorClient(process.address)

    @property
    def robot_client(self) -> RobotClient:
        return RobotClient(self.robot.address)

    def states(self) -> list[list[float]]:
        """State of every sealed frame, by episode."""
        return [[float(_state(frame)[0]) for frame in episode.frames] for episode in self.store.sealed]


def _state(frame: dataset_pb2.Frame) -> np.ndarray:  # type: ignore[type-arg]
    return np.asarray(codec.decode_value(frame.observation[0]))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    robot = start_robot(tmp_path, rate_hz=RATE_HZ)
    with RobotClient(robot.address) as client:
        spec = client.describe().spec
    store_server, store = serve_store()
    policy_server, policy = serve_policy(spec)
    made = Site(tmp_path, robot, spec, store_server, store, policy_server, policy, [robot])
    yield made
    for process in reversed(made.processes):
        if process.popen.poll() is None:
            process.kill()
    store_server.stop()
    policy_server.stop()
    assert store.problems == []


def long_run(**changes: object) -> actor_pb2.RunDefinition:
    """Two seconds an episode with a policy at 0.01 rad a step."""
    arguments = {
        "episode_count": 1,
        "max_episode_steps": 120,
        "replan_interval_steps": 8,
        "dataset": "reach",
        **changes,
    }
    return roll_out("line", **arguments)  # type: ignore[arg-type]


def test_teleoperated_episodes_reach_the_store_frame_by_frame(site: Site) -> None:
    _, actor = site.start()
    actor.start_run(teleoperate("reach", teleoperator="expert", episode_count=3, max_episode_steps=60, first_seed=5))
    summary = actor.wait(timeout_s=30)
    assert (summary.state, summary.success_count) == (actor_pb2.RUN_STATE_FINISHED, 3), summary.detail
    wait_until(lambda: len(site.store.sealed) == 3)
    for result, episode in zip(summary.results, site.store.sealed, strict=True):
        assert episode.begin.episode_uuid == result.episode_uuid
        assert episode.begin.spec_digest == site.spec.digest
        assert episode.end is not None
        assert episode.end.reason == dataset_pb2.EPISODE_END_SUCCESS
        assert len(episode.frames) == result.frame_count > 3
        for frame in episode.frames:
            assert [value.name for value in frame.observation] == [f.name for f in site.spec.observation]
            assert frame.source == dataset_pb2.ACTION_SOURCE_TELEOPERATOR
            assert frame.observation[1].image.data[:2] == b"\xff\xd8", "JPEG"
        # The arm closes 0.7 of the way to its target in a period: frame i + 1 shows what frame i's action did.
        states = np.array([_state(frame)[:6] for frame in episode.frames])
        actions = np.array([codec.decode_value(frame.action[0]) for frame in episode.frames])
        np.testing.assert_allclose(states[1:], (states + 0.7 * (actions - states))[:-1], atol=1e-5)
    assert [result.seed for result in summary.results] == [5, 6, 7]
    wait_until(lambda: actor.status().spooled_frame_count == 0)


def test_the_served_policy_acts_and_every_chunk_is_told(site: Site) -> None:
    site.policy.version = 3
    _, actor = site.start()
    actor.start_run(roll_out("line", episode_count=2, max_episode_steps=200, replan_interval_steps=8))
    chunks, ticks, results = [], [], []
    for event in actor.watch(max_tick_rate_hz=200):
        kind = event.WhichOneof("event")
        if kind == "chunk":
            chunks.append(event.chunk)
        elif kind == "tick":
            ticks.append(event.tick)
        elif kind == "episode":
            results.append(event.episode)
        elif event.status.state == actor_pb2.RUN_STATE_FINISHED:
            break
    assert [result.success for result in results] == [True, True]
    assert [version.number for version in results[0].versions] == [3]
    assert results[0].episode_uuid == "", "nothing was recorded"
    arrived = [chunk for chunk in chunks if not chunk.refusal]
    assert len(arrived) >= 2
    for chunk in arrived:
        parts = [chunk.capture, chunk.network, chunk.server_queue, chunk.server_compute]
        total = chunk.latency.ToNanoseconds()
        assert 0 < sum(part.ToNanoseconds() for part in parts) <= total * 1.01
    assert {len(tick.state) for tick in ticks} == {12}
    moving = [tick for tick in ticks if tick.source == dataset_pb2.ACTION_SOURCE_POLICY]
    assert {len(tick.action) for tick in moving} == {6}
    with site.robot_client as robot:
        assert robot.describe().status.lease_holder == "", "given back at the end"
    assert site.policy.holders == {}, "the session too"


def test_a_run_that_cannot_be_is_refused_by_field_and_nothing_moves(site: Site) -> None:
    _, actor = site.start()
    wrong: list[tuple[dict[str, object], str]] = [
        ({"max_episode_steps": 0}, "run.max_episode_steps"),
        ({"episode_count": -1}, "run.episode_count"),
        ({"replan_interval_steps": 0}, "run.replan_interval_steps"),
        ({"replan_interval_steps": 17}, "run.replan_interval_steps"),
        ({"task": "fold the shirt"}, "run.task"),
        ({"teleoperator": "pedal"}, "run.teleoperator"),
        ({"dataset": "Not A Name"}, "run.dataset"),
    ]
    for change, name in wrong:
        with pytest.raises(errors.InvalidInput) as caught:
            actor.start_run(long_run(**change))
        assert caught.value.field == name
        assert actor.status().state == actor_pb2.RUN_STATE_FAILED
    with site.robot_client as robot:
        assert robot.describe().status.lease_epoch == 0, "nobody ever had control"


def test_a_model_that_does_not_fit_is_refused_before_any_motion(site: Site) -> None:
    _, actor = site.start()
    site.policy.refuse = "observation.images.wrist"
    with pytest.raises(errors.InvalidInput, match="does not fit") as caught:
        actor.start_run(long_run(dataset=""))
    assert caught.value.field == "observation.images.wrist"
    site.policy.refuse = ""
    site.policy.required = ["observation.state", "observation.images.ceiling"]
    with pytest.raises(errors.InvalidInput) as caught:
        actor.start_run(long_run(dataset=""))
    assert caught.value.field == "observation.images.ceiling"
    with site.robot_client as robot:
        assert robot.describe().status.lease_epoch == 0


def test_a_dataset_of_another_robot_is_refused_and_names_the_feature(site: Site) -> None:
    other = Spec(
        observation=(site.spec.observation[0], *reversed(site.spec.observation[1:])),
        action=site.spec.action,
        control_rate_hz=site.spec.control_rate_hz,
    )
    site.store.datasets["reach"] = dataset_pb2.DatasetDefinition(name="reach", spec=other.to_proto())
    _, actor = site.start()
    with pytest.raises(errors.InvalidInput, match="order") as caught:
        actor.start_run(teleoperate("reach", teleoperator="expert", episode_count=1, max_episode_steps=10))
    assert caught.value.field == "observation.images.front"
    with site.robot_client as robot:
        assert robot.describe().status.lease_epoch == 0


def test_services_that_are_not_there_are_named(site: Site) -> None:
    _, actor = site.start(services=False)
    with pytest.raises(errors.Refused, match="--inference"):
        actor.start_run(long_run(dataset=""))
    with pytest.raises(errors.Refused, match="--store"):
        actor.start_run(teleoperate("reach", teleoperator="expert", episode_count=1, max_episode_steps=10))
    site.robot.kill()
    with pytest.raises(errors.Refused):
        actor.start_run(teleoperate("", teleoperator="expert", episode_count=1, max_episode_steps=10))


def test_two_robots_with_one_name_the_second_is_refused(site: Site) -> None:
    (site.folder / "twin").mkdir()
    twin = start_robot(site.folder / "twin", name="left", rate_hz=RATE_HZ)
    site.processes.append(twin)
    site.policy.speed = 0.001
    _, first = site.start()
    _, second = site.start(name="twin", robot=twin.address)
    first.start_run(long_run(dataset="", max_episode_steps=1000))
    with pytest.raises(errors.Refused, match="live session"):
        second.start_run(long_run(dataset=""))
    status = second.status()
    assert status.state == actor_pb2.RUN_STATE_FAILED
    assert "live session" in status.detail
    with RobotClient(twin.address) as robot:
        assert robot.describe().status.lease_epoch == 0
    assert first.status().state == actor_pb2.RUN_STATE_RUNNING
    first.stop_run()


def test_one_run_at_a_time_and_starting_the_same_one_again_is_fine(site: Site) -> None:
    site.policy.speed = 0.005
    _, actor = site.start()
    run = long_run(dataset="", max_episode_steps=1000)
    assert actor.start_run(run) == actor.start_run(run) == run.run_id
    with pytest.raises(errors.Refused, match=run.run_id):
        actor.start_run(long_run(dataset=""))
    actor.stop_run(run.run_id)
    assert actor.status().state == actor_pb2.RUN_STATE_FINISHED
    actor.stop_run()
    actor.start_run(teleoperate("", teleoperator="expert", episode_count=1, max_episode_steps=60))
    assert actor.wait(timeout_s=20).success_count == 1


@pytest.mark.parametrize("discard", [False, True])
def test_a_stopped_episode_is_kept_as_interrupted_or_discarded(site: Site, discard: bool) -> None:
    site.policy.speed = 0.005
    _, actor = site.start()
    actor.start_run(long_run(max_episode_steps=1000))
    wait_until(lambda: any(len(episode.frames) > 10 for episode in site.store.episodes.values()))
    actor.stop_run(discard_episode=discard)
    wait_until(lambda: actor.status().spooled_frame_count == 0)
    if discard:
        wait_until(lambda: not site.store.episodes)
    else:
        wait_until(lambda: len(site.store.sealed) == 1)
        end = site.store.sealed[0].end
        assert end is not None
        assert end.reason == dataset_pb2.EPISODE_END_INTERRUPTED
    assert actor.status().finished_episode_count == 0


def test_episodes_without_success_are_neither_kept_nor_counted(site: Site) -> None:
    _, actor = site.start()
    # Most goals are 8 to 12 steps away; those that need more are failures.
    run = teleoperate("reach", teleoperator="expert", episode_count=3, max_episode_steps=11, discard_failures=True)
    actor.start_run(run)
    summary = actor.wait(timeout_s=30)
    assert [result.success for result in summary.results] == [True] * 3, summary.detail
    assert [result.episode_number for result in summary.results] == [0, 1, 2]
    seeds = [result.seed for result in summary.results]
    assert seeds == sorted(seeds)
    assert seeds[-1] > 2, "some seed in between was a failure"
    wait_until(lambda: len(site.store.sealed) == 3)
    wait_until(lambda: len(site.store.episodes) == 3)


def test_while_the_inference_service_is_away_the_robot_holds_and_then_goes_on(site: Site) -> None:
    site.policy.speed = 0.01
    _, actor = site.start()
    actor.start_run(long_run())
    wait_until(lambda: len(site.policy.requests) >= 3)
    site.policy_server.stop()
    status = wait_until(lambda: (s := actor.status()).state == actor_pb2.RUN_STATE_HOLDING and s)
    assert "the last chunk is used up" in status.detail
    with site.robot_client as robot:
        assert wait_until(lambda: robot.describe().status.mode is not RobotMode.ACTIVE)
        before = robot.get_observation().values["observation.state"][:6]
        time.sleep(0.3)
        np.testing.assert_allclose(robot.get_observation().values["observation.state"][:6], before, atol=1e-3)
    site.policy.restarted()
    site.policy_server.start()
    summary = actor.wait(timeout_s=30)
    assert summary.results[0].frame_count > 20
    assert summary.results[0].held_tick_count > 10
    wait_until(lambda: len(site.store.sealed) == 1)


def test_a_drain_and_a_forgotten_session_cost_a_moment_and_no_episode(site: Site) -> None:
    site.policy.speed = 0.01
    _, actor = site.start()
    actor.start_run(long_run(dataset=""))
    wait_until(lambda: len(site.policy.requests) >= 2)
    site.policy.drain.set()
    wait_until(lambda: len(site.policy.sessions) == 2, what="a new session after the drain")
    asked = len(site.policy.requests)
    wait_until(lambda: len(site.policy.requests) >= asked + 2)
    site.policy.restarted()
    summary = actor.wait(timeout_s=30)
    assert summary.state == actor_pb2.RUN_STATE_FINISHED
    assert summary.results[0].frame_count > 60


def test_an_answer_that_never_comes_is_given_up_and_asked_again(site: Site) -> None:
    site.policy.speed = 0.005
    _, actor = site.start("--chunk-deadline-s", "0.3")
    actor.start_run(long_run(dataset=""))
    wait_until(lambda: len(site.policy.requests) >= 2)
    site.policy.delay_s = 3.0
    wait_until(lambda: actor.status().state == actor_pb2.RUN_STATE_HOLDING)
    site.policy.delay_s = 0.0
    assert actor.wait(timeout_s=30).results[0].frame_count > 10


def test_while_the_store_is_away_recording_goes_on_and_nothing_is_lost(site: Site) -> None:
    site.policy.speed = 0.01
    _, actor = site.start()
    actor.start_run(long_run(episode_count=2, max_episode_steps=60))
    wait_until(lambda: any(len(episode.frames) > 5 for episode in site.store.episodes.values()))
    site.store_server.stop()
    summary = actor.wait(timeout_s=30)
    assert [result.frame_count for result in summary.results] == [60, 60]
    assert all(result.held_tick_count < 20 for result in summary.results), "the robot did not wait for the store"
    assert actor.status().spooled_frame_count > 60
    assert "the store takes no frames" in actor.status().detail
    site.store_server.start()
    wait_until(lambda: actor.status().spooled_frame_count == 0)
    assert [len(episode.frames) for episode in site.store.sealed] == [60, 60]
    assert len(set(site.store.seals)) == len(site.store.seals) == 2
    wait_until(lambda: actor.status().detail == "")


def test_a_full_spool_stops_the_run_with_the_remedy_and_keeps_what_it_has(site: Site) -> None:
    site.policy.speed = 0.001
    _, actor = site.start("--spool-limit-gb", "0.0001")
    actor.start_run(long_run(max_episode_steps=1000))
    wait_until(lambda: any(episode.frames for episode in site.store.episodes.values()))
    site.store_server.stop()
    summary = actor.wait(timeout_s=30)
    assert summary.state == actor_pb2.RUN_STATE_FAILED
    assert "--spool-limit-gb" in summary.detail
    with site.robot_client as robot:
        assert wait_until(lambda: robot.describe().status.mode is not RobotMode.ACTIVE)
    spooled = actor.status().spooled_frame_count
    assert spooled > 0
    site.store_server.start()
    wait_until(lambda: len(site.store.sealed) == 1)
    end = site.store.sealed[0].end
    assert end is not None
    assert end.reason == dataset_pb2.EPISODE_END_INTERRUPTED


def test_a_killed_actor_leaves_a_holding_robot_and_a_spool_that_is_resumed(site: Site) -> None:
    site.policy.speed = 0.001
    process, actor = site.start()
    actor.start_run(long_run(max_episode_steps=1000))
    wait_until(lambda: any(len(episode.frames) > 20 for episode in site.store.episodes.values()))
    process.kill()
    acked = dict(site.store.acked)
    with site.robot_client as robot:
        wait_until(lambda: robot.describe().status.mode is not RobotMode.ACTIVE)
    _, again = site.start()
    wait_until(lambda: len(site.store.sealed) == 1)
    episode = site.store.sealed[0]
    assert episode.end is not None
    assert episode.end.reason == dataset_pb2.EPISODE_END_INTERRUPTED
    assert len(episode.frames) > acked[episode.begin.episode_uuid] > 10
    wait_until(lambda: again.status().spooled_frame_count == 0)
    # The name and the lease of the one that was killed free themselves.
    site.policy.restarted()
    again.start_run(teleoperate("reach", teleoperator="expert", episode_count=1, max_episode_steps=60))
    assert again.wait(timeout_s=30).success_count == 1
    assert len(set(site.store.seals)) == len(site.store.seals)


def test_a_run_goes_on_through_kills_and_counts_every_episode_once(site: Site) -> None:
    process, actor = site.start("--resume-run")
    run = teleoperate("reach", teleoperator="expert", episode_count=12, max_episode_steps=60, first_seed=0)
    actor.start_run(run)
    generator = np.random.default_rng(7)
    for _ in range(4):
        time.sleep(generator.uniform(0.2, 0.5))
        process.kill()
        process, actor = site.start("--resume-run")
    summary = actor.wait(timeout_s=40)
    assert summary.state == actor_pb2.RUN_STATE_FINISHED, summary.detail
    assert [result.seed for result in summary.results] == list(range(12)), "each seed counts once, in order"
    wait_until(lambda: actor.status().spooled_frame_count == 0)
    successes = [e for e in site.store.sealed if e.end and e.end.reason == dataset_pb2.EPISODE_END_SUCCESS]
    assert [e.begin.episode_uuid for e in successes] == [result.episode_uuid for result in summary.results]
    assert [len(e.frames) for e in successes] == [result.frame_count for result in summary.results]
    assert len(set(site.store.seals)) == len(site.store.seals)


def test_sigterm_seals_the_episode_flushes_and_ends_in_time(site: Site) -> None:
    site.policy.speed = 0.001
    process, actor = site.start()
    actor.start_run(long_run(max_episode_steps=1000))
    wait_until(lambda: any(len(episode.frames) > 10 for episode in site.store.episodes.values()))
    began_s = time.monotonic()
    assert process.terminate() == 0
    assert time.monotonic() - began_s < 5.0
    assert len(site.store.sealed) == 1
    end = site.store.sealed[0].end
    assert end is not None
    assert end.reason == dataset_pb2.EPISODE_END_INTERRUPTED
    assert not list((site.folder / "spool-left").glob("*.log"))
    with site.robot_client as robot:
        assert robot.describe().status.lease_holder == ""


def test_a_robot_agent_that_restarts_costs_one_episode_and_not_the_run(site: Site) -> None:
    site.policy.speed = 0.005
    _, actor = site.start()
    actor.start_run(long_run(episode_count=1, max_episode_steps=80))
    wait_until(lambda: any(len(episode.frames) > 10 for episode in site.store.episodes.values()))
    site.robot.kill()
    wait_until(lambda: actor.status().state == actor_pb2.RUN_STATE_HOLDING)
    site.processes.append(start_robot(site.folder, rate_hz=RATE_HZ, address=site.robot.address))
    summary = actor.wait(timeout_s=30)
    assert [result.frame_count for result in summary.results] == [80], summary.detail
    wait_until(lambda: len(site.store.sealed) == 2)
    reasons = [episode.end.reason for episode in site.store.sealed if episode.end is not None]
    assert reasons == [dataset_pb2.EPISODE_END_INTERRUPTED, dataset_pb2.EPISODE_END_TIME_LIMIT]


def test_an_emergency_stop_ends_the_run_and_nothing_starts_by_itself(site: Site) -> None:
    site.policy.speed = 0.001
    _, actor = site.start()
    actor.start_run(long_run(max_episode_steps=1000))
    wait_until(lambda: any(len(episode.frames) > 5 for episode in site.store.episodes.values()))
    with site.robot_client as robot:
        robot.emergency_stop("test")
    summary = actor.wait(timeout_s=10)
    assert summary.state == actor_pb2.RUN_STATE_FAILED
    assert "emergency stop" in summary.detail
    with pytest.raises(errors.Refused):
        actor.start_run(long_run())


def test_a_reader_that_comes_late_sees_all_results_and_then_the_end(site: Site) -> None:
    _, actor = site.start()
    actor.start_run(teleoperate("", teleoperator="expert", episode_count=4, max_episode_steps=60))
    assert len(actor.wait(timeout_s=30).results) == 4
    kinds = []
    for event in actor.watch():
        kinds.append(event.WhichOneof("event"))
        if len(kinds) > 1 and kinds[-1] == "status":
            break
    assert kinds == ["status", *["episode"] * 4, "status"]


def test_a_spool_that_cannot_be_used_is_named(site: Site) -> None:
    blocked = site.folder / "file"
    blocked.write_text("")
    with pytest.raises(AssertionError, match="spool"):
        start_actor(site.folder, site.robot.address, "--spool", os.fspath(blocked / "x"), name="blocked")
