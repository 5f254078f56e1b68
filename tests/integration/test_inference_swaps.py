"""New weights under live robots: the weights service, the inference service and robots, each over real sockets."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from deploy.local import Topology
from manyhands import stamps
from manyhands.clients.act_stream import Chunk, Reply
from manyhands.clients.inference import InferenceClient
from manyhands.clients.weights import WeightsClient
from manyhands.errors import NotFound, Refused
from tests.support.inference_lab import (
    ENVIRONMENT,
    ask,
    local_chunk,
    make_observation,
    make_policy,
    next_chunk,
    next_reply,
    open_session,
    serve,
)
from tests.support.waiting import wait_until
from tests.support.weights_lab import publish, start_weights


@pytest.fixture
def topology(tmp_path: Path) -> Iterator[Topology]:
    with Topology(tmp_path / "logs", environment=ENVIRONMENT) as topology:
        yield topology


@pytest.fixture
def weights_address(topology: Topology, tmp_path: Path) -> str:
    return start_weights(topology, tmp_path)


@pytest.fixture
def learner(weights_address: str) -> Iterator[WeightsClient]:
    with WeightsClient(weights_address) as client:
        yield client


@dataclass
class LiveRobot:
    """Asks again 30 ms after each answer, on a thread of its own and keeps every reply."""

    client: InferenceClient
    name: str
    replies: list[Reply] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._session = open_session(self.client, self.name)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with self.client.act_stream(self._session.session_id) as stream:
            for seed in itertools.count(1):
                if self._stop.wait(0.03):
                    return
                ask(stream, seed, deadline_s=5.0)
                self.replies.append(next_reply(stream))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(20.0)
        assert not self._thread.is_alive()


def chunk_now(client: InferenceClient, robot: str = "probe") -> tuple[int, npt.NDArray[np.float32]]:
    """(version number, actions) of a chunk with observation and seed 1."""
    session = open_session(client, robot)
    with client.act_stream(session.session_id) as stream:
        ask(stream, 1)
        reply = next_reply(stream)
    client.close_session(session.session_id)
    assert isinstance(reply.result, Chunk), reply.result
    return reply.version.number, reply.result.actions


def serving(client: InferenceClient) -> int:
    return client.list_models()[0].version.number


def test_versions_are_followed_under_live_robots_and_no_request_fails(
    topology: Topology, tmp_path: Path, weights_address: str, learner: WeightsClient
) -> None:
    service = serve(topology, tmp_path / "start", make_policy(0), "--weights", weights_address, "--follow")
    with InferenceClient(service.address) as client:
        robots = [LiveRobot(client, f"robot{index}") for index in range(3)]
        try:
            for step in range(1, 6):
                version = publish(learner, make_policy(step), step)
                wait_until(lambda number=version.number: serving(client) == number)  # type: ignore[misc]
        finally:
            for robot in robots:
                robot.stop()
        for robot in robots:
            assert all(isinstance(reply.result, Chunk) for reply in robot.replies)
            numbers = [reply.version.number for reply in robot.replies]
            assert numbers == sorted(numbers), "a robot was sent back to older weights"
            assert len(set(numbers)) >= 3, "the swaps did not happen while this robot asked"
        # Each chunk is its version's, whole: no row ever saw half of a swap.
        policies = {number: make_policy(number) for number in range(6)}
        for robot in robots:
            for seed, reply in enumerate(robot.replies, start=1):
                assert isinstance(reply.result, Chunk)
                expected = local_chunk(policies[reply.version.number], make_observation(seed), seed)
                np.testing.assert_array_equal(reply.result.actions, expected)
        swaps = client.status().swaps
        assert [swap.version.number for swap in swaps if swap.accepted] == sorted({swap.version.number for swap in swaps})
        assert max(stamps.to_seconds(swap.pause) for swap in swaps) < 0.05


def test_a_bad_version_is_refused_with_the_reason_and_the_old_one_keeps_serving(
    topology: Topology, tmp_path: Path, weights_address: str, learner: WeightsClient
) -> None:
    service = serve(topology, tmp_path / "start", make_policy(0), "--weights", weights_address, "--follow")
    with InferenceClient(service.address) as client:
        good = publish(learner, make_policy(1), 1)
        wait_until(lambda: serving(client) == good.number)
        policy = make_policy(2)
        nan = torch.full_like(policy.chunk_in.bias, torch.nan)
        publish(learner, policy, 2, **{"chunk_in.bias": nan})
        wait_until(lambda: len(client.status().swaps) == 2)
        publish(learner, policy, 3, **{"chunk_in.bias": torch.zeros(3)})
        wait_until(lambda: len(client.status().swaps) == 3)
        # Finite weights whose chunk is not.
        huge = torch.full_like(policy.chunk_in.weight, 3e38)
        publish(learner, policy, 4, **{"chunk_in.weight": huge})
        wait_until(lambda: len(client.status().swaps) == 4)
        swaps = client.status().swaps
        assert [(swap.version.number, swap.accepted) for swap in swaps] == [(1, True), (2, False), (3, False), (4, False)]
        assert "chunk_in.bias" in swaps[1].reason
        assert "not finite" in swaps[1].reason
        assert "chunk_in.bias" in swaps[2].reason
        assert "canary" in swaps[3].reason
        with pytest.raises(Refused, match=r"chunk_in\.bias"):
            client.swap_weights("tiny", 2)
        number, actions = chunk_now(client)
        assert number == good.number
        np.testing.assert_array_equal(actions, local_chunk(make_policy(1), make_observation(1), 1))
        # What a refused version left in the spare copy does no harm to the next good one.
        fine = publish(learner, make_policy(5), 5)
        wait_until(lambda: serving(client) == fine.number)
        np.testing.assert_array_equal(chunk_now(client)[1], local_chunk(make_policy(5), make_observation(1), 1))


def test_a_version_that_shares_tensors_with_earlier_ones_is_served_whole(
    topology: Topology, tmp_path: Path, weights_address: str, learner: WeightsClient
) -> None:
    service = serve(topology, tmp_path / "start", make_policy(0), "--weights", weights_address, "--follow")
    with InferenceClient(service.address) as client:
        policy = make_policy(1)
        for step, shift in enumerate((0.0, 0.5, -0.5, 0.0, 0.25), start=1):
            bias = make_policy(1).chunk_in.bias.detach() + shift
            version = publish(learner, policy, step, **{"chunk_in.bias": bias})
            wait_until(lambda number=version.number: serving(client) == number)  # type: ignore[misc]
            expected = make_policy(1)
            with torch.no_grad():
                expected.chunk_in.bias.copy_(bias)
            np.testing.assert_array_equal(chunk_now(client)[1], local_chunk(expected, make_observation(1), 1))


def test_an_operator_swaps_rolls_back_and_goes_forward_again(
    topology: Topology, tmp_path: Path, weights_address: str, learner: WeightsClient
) -> None:
    service = serve(topology, tmp_path / "start", make_policy(0), "--weights", weights_address, "--follow")
    with InferenceClient(service.address) as client:
        for step in (1, 2):
            publish(learner, make_policy(step), step)
        wait_until(lambda: serving(client) == 2)
        back = client.swap_weights("tiny", 1)
        assert (back.previous.number, back.current.number) == (2, 1)
        np.testing.assert_array_equal(chunk_now(client)[1], local_chunk(make_policy(1), make_observation(1), 1))
        again = client.swap_weights("tiny", 1)
        assert (again.previous.number, again.current.number) == (1, 1)
        # Rolled back: a new version does not undo it, the operator does.
        publish(learner, make_policy(3), 3)
        versions = learner.list_versions("tiny")
        assert versions[-1].version.number == 3
        until_s = time.monotonic() + 1.5
        wait_until(lambda: time.monotonic() > until_s or serving(client) != 1)
        assert serving(client) == 1
        assert client.swap_weights("tiny").current.number == 3
        publish(learner, make_policy(4), 4)
        wait_until(lambda: serving(client) == 4)
        with pytest.raises(NotFound):
            client.swap_weights("tiny", 99)
        with pytest.raises(NotFound, match="there are tiny"):
            client.swap_weights("big", 1)


def test_a_restarted_server_begins_with_the_newest_good_version(
    topology: Topology, tmp_path: Path, weights_address: str, learner: WeightsClient
) -> None:
    publish(learner, make_policy(1), 1)
    policy = make_policy(2)
    publish(learner, policy, 2, **{"chunk_in.bias": torch.full_like(policy.chunk_in.bias, torch.nan)})
    service = serve(topology, tmp_path / "start", make_policy(0), "--weights", weights_address, "--follow")
    with InferenceClient(service.address) as client:
        assert serving(client) == 1
        assert [(swap.version.number, swap.accepted) for swap in client.status().swaps] == [(2, False), (1, True)]
        publish(learner, make_policy(3), 3)
        wait_until(lambda: serving(client) == 3)


def test_the_weights_service_may_go_and_come_back(
    topology: Topology, tmp_path: Path, weights_address: str, learner: WeightsClient
) -> None:
    service = serve(topology, tmp_path / "start", make_policy(0), "--weights", weights_address, "--follow")
    with InferenceClient(service.address) as client:
        publish(learner, make_policy(1), 1)
        wait_until(lambda: serving(client) == 1)
        topology.kill("weights")
        session = open_session(client, "left")
        with client.act_stream(session.session_id) as stream:
            for seed in range(1, 20):
                ask(stream, seed)
                next_chunk(stream)
            start_weights(topology, tmp_path, weights_address)
            publish(learner, make_policy(2), 2)
            wait_until(lambda: serving(client) == 2)
            ask(stream, 1)
            np.testing.assert_array_equal(next_chunk(stream).actions, local_chunk(make_policy(2), make_observation(1), 1))


def test_without_a_weights_service_swapping_says_what_to_do(topology: Topology, tmp_path: Path) -> None:
    service = serve(topology, tmp_path / "start", make_policy(0))
    with InferenceClient(service.address) as client, pytest.raises(Refused, match="--weights HOST:PORT"):
        client.swap_weights("tiny", 1)
