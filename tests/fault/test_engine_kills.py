"""The engine process is killed or cannot start, its front end is killed or ends, while robots are served. Real processes."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest

from deploy.local import Topology
from manyhands.clients.act_stream import Chunk, Refusal, Reply
from manyhands.clients.inference import InferenceClient
from manyhands.clients.weights import WeightsClient
from manyhands.errors import Refused, Unreachable
from policies import checkpoint
from policies.flow import FlowPolicy
from tests.support.fault_lab import NOT_SERVING, SERVING, HealthWatch, engine_of, kill_engine, new_engine
from tests.support.inference_lab import (
    ENVIRONMENT,
    ask,
    local_chunk,
    make_observation,
    make_policy,
    next_reply,
    open_session,
    serve,
)
from tests.support.waiting import wait_until
from tests.support.weights_lab import publish, start_weights

DEADLINE_S = 5.0


@pytest.fixture
def topology(tmp_path: Path) -> Iterator[Topology]:
    with Topology(tmp_path / "logs", environment=ENVIRONMENT) as topology:
        yield topology


@pytest.fixture
def policy() -> FlowPolicy:
    return make_policy(0)


@dataclass
class Robot:
    """Asks again when it was answered, after a refusal as late as it was told to. Keeps what it sent and got."""

    client: InferenceClient
    name: str
    sent: dict[int, int] = field(default_factory=dict)
    replies: list[Reply] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        first = sum(map(ord, self.name)) * 1000  # No two robots ask the same.
        try:
            with self.client.act_stream(open_session(self.client, self.name).session_id) as stream:
                for seed in itertools.count(first):
                    self.sent[ask(stream, seed, deadline_s=DEADLINE_S)] = seed
                    reply = next_reply(stream)
                    self.replies.append(reply)
                    pause_s = reply.result.retry_after_s if isinstance(reply.result, Refusal) else 0.005
                    if self._stop.wait(pause_s):
                        return
        except BaseException as error:
            self.failures.append(error)

    @property
    def refusals(self) -> list[Refusal]:
        return [reply.result for reply in self.replies if isinstance(reply.result, Refusal)]

    def chunks_since(self, index: int) -> int:
        return sum(isinstance(reply.result, Chunk) for reply in self.replies[index:])

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(20.0)
        assert not self._thread.is_alive()
        assert self.failures == [], f"the stream of {self.name} did not last"

    def check(self, policies: dict[int, FlowPolicy]) -> None:
        """Every request was answered once, and every chunk is its own request's, of the version that it names."""
        assert [reply.request_id for reply in self.replies] == list(self.sent)
        for reply in self.replies:
            if isinstance(reply.result, Chunk):
                seed = self.sent[reply.request_id]
                expected = local_chunk(policies[reply.version.number], make_observation(seed), seed)
                np.testing.assert_array_equal(reply.result.actions, expected)


def test_robots_of_a_killed_engine_go_on_in_their_sessions_with_the_version_they_had(
    topology: Topology, tmp_path: Path
) -> None:
    weights = start_weights(topology, tmp_path)
    policies = {number: make_policy(number) for number in range(2)}
    with WeightsClient(weights) as learner:
        publish(learner, policies[1], 1)
    service = serve(topology, tmp_path / "start", policies[0], "--weights", weights, "--follow")
    killed: list[int] = []
    with InferenceClient(service.address) as client:
        health = HealthWatch(service.address)
        robots = [Robot(client, f"robot{index}") for index in range(4)]
        try:
            for _ in range(2):
                wait_until(lambda: all(robot.chunks_since(0) > 20 for robot in robots))
                seen = [len(robot.replies) for robot in robots]
                killed.append(kill_engine(service))
                new_engine(service, *killed)
                wait_until(
                    lambda seen=seen: all(  # type: ignore[misc]
                        robot.failures or robot.chunks_since(before) > 10 for robot, before in zip(robots, seen, strict=True)
                    )
                )
        finally:
            for robot in robots:
                robot.stop()
            health.close()
        sessions = {status.robot_id: status for status in client.status().sessions}
    for robot in robots:
        robot.check(policies)
        assert {reply.version.number for reply in robot.replies} == {1}
        refusals = robot.refusals
        assert 1 <= len(refusals) <= 60, "robots are told, and wait"
        assert {refusal.reason for refusal in refusals} == {"unavailable"}
        assert all(0.0 < refusal.retry_after_s <= 1.0 for refusal in refusals)
        assert "started again" in refusals[0].message
    assert sorted(sessions) == sorted(robot.name for robot in robots), "a session was opened again"
    assert health.statuses == [SERVING, NOT_SERVING, SERVING, NOT_SERVING, SERVING]


def test_an_older_version_that_an_operator_chose_stays_through_a_kill(topology: Topology, tmp_path: Path) -> None:
    weights = start_weights(topology, tmp_path)
    service = serve(topology, tmp_path / "start", make_policy(0), "--weights", weights, "--follow")
    with WeightsClient(weights) as learner, InferenceClient(service.address) as client:
        for number in (1, 2):
            publish(learner, make_policy(number), number)
            wait_until(lambda number=number: client.list_models()[0].version.number == number)  # type: ignore[misc]
        client.swap_weights("tiny", 1)
        robot = Robot(client, "left")
        wait_until(lambda: robot.chunks_since(0) > 3)
        killed = kill_engine(service)
        before = len(robot.replies)
        new_engine(service, killed)
        wait_until(lambda: robot.failures or robot.chunks_since(before) > 3)
        publish(learner, make_policy(3), 3)
        until_s = time.monotonic() + 1.0
        wait_until(lambda: time.monotonic() > until_s or client.list_models()[0].version.number != 1)
        assert client.list_models()[0].version.number == 1
        assert client.swap_weights("tiny").current.number == 3
        robot.stop()
        robot.check({number: make_policy(number) for number in (1, 3)})
        accepted = [swap.version.number for swap in client.status().swaps if swap.accepted]
        assert accepted == [1, 2, 1, 1, 3], "the history of swaps does not outlive the engine"


def test_without_its_weights_service_a_restarted_engine_serves_its_checkpoint_and_says_so_until_it_is_back(
    topology: Topology, tmp_path: Path
) -> None:
    weights = start_weights(topology, tmp_path)
    service = serve(topology, tmp_path / "start", make_policy(0), "--weights", weights, "--follow")
    with InferenceClient(service.address) as client:
        with WeightsClient(weights) as learner:
            for number in (1, 2):
                publish(learner, make_policy(number), number)
        wait_until(lambda: client.list_models()[0].version.number == 2)
        client.swap_weights("tiny", 1)
        topology.kill("weights")
        killed = kill_engine(service)
        new_engine(service, killed)
        robot = Robot(client, "left")
        wait_until(lambda: robot.failures or robot.chunks_since(0) > 3, timeout_s=30.0)
        assert client.list_models()[0].version.number == 0
        assert "tiny starts with its checkpoint" in service.log_path.read_text()
        start_weights(topology, tmp_path, weights)
        wait_until(lambda: client.list_models()[0].version.number != 0)
        robot.stop()
        # What it had before, not the newest: an operator had turned away from that.
        robot.check({number: make_policy(number) for number in (0, 1)})
        assert client.list_models()[0].version.number == 1


def test_a_checkpoint_that_cannot_be_is_told_by_the_front_end_without_a_traceback(
    topology: Topology, tmp_path: Path
) -> None:
    checkpoint.save(make_policy(0), tmp_path / "broken")
    (weights,) = (tmp_path / "broken").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    for folder, named in ((tmp_path / "nothing", "is not a checkpoint"), (tmp_path / "broken", weights.name)):
        name = folder.name
        with pytest.raises(Refused, match=r"ended with exit code [12]"):
            topology.start(name, ["serve", "--model", f"tiny={folder}", "--address", "127.0.0.1:0"])
        log = topology.services[name].log_path.read_text()
        last = log.splitlines()[-1]
        assert last.startswith("manyhands serve: ")
        assert named in last
        assert "Traceback" not in log
        assert "READY" not in log


def test_an_engine_that_is_killed_again_and_again_ends_the_server(
    topology: Topology, tmp_path: Path, policy: FlowPolicy
) -> None:
    service = serve(topology, tmp_path / "tiny", policy, "--engine-restarts", "1")
    first = kill_engine(service)
    kill_engine_pid = new_engine(service, first)
    with InferenceClient(service.address) as client:
        robot = Robot(client, "left")
        wait_until(lambda: robot.chunks_since(0) > 3)  # It serves: what is killed now counts.
        os.kill(kill_engine_pid, signal.SIGKILL)
        assert service.process.wait(10.0) == 1
        robot._thread.join(20.0)
        assert robot.refusals
        assert isinstance(robot.failures[0], Unreachable)
    last = service.log_path.read_text().splitlines()[-1]
    assert last.startswith("manyhands serve: ")
    assert "again and again" in last
    assert "Traceback" not in service.log_path.read_text()


@pytest.mark.parametrize("moment", ["serving", "hanging", "loading"])
def test_no_engine_outlives_its_front_end(topology: Topology, tmp_path: Path, policy: FlowPolicy, moment: str) -> None:
    if moment != "loading":
        service = serve(topology, tmp_path / "tiny", policy)
    else:
        checkpoint.save(policy, tmp_path / "tiny")
        service = topology.launch("serve", ["serve", "--model", f"tiny={tmp_path / 'tiny'}", "--address", "127.0.0.1:0"])
    engine = wait_until(lambda: engine_of(service))
    assert engine is not None
    if moment != "loading":
        shown = service.log_path.read_text()
        places = [shown.index(text) for text in ("the engine's libraries", "loading tiny", "preparing tiny", "READY")]
        assert places == sorted(places)
    if moment == "loading":  # Python by now, and not yet its own code.
        wait_until(lambda: "--pdeathsig" not in engine.cmdline())
    if moment != "serving":  # It cannot notice by itself.
        engine.suspend()
    service.process.kill()
    killed_s = time.monotonic()
    service.process.wait()
    wait_until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, timeout_s=2.0)
    assert time.monotonic() - killed_s < 2.0
