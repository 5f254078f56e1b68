"""What happens to robots when the inference service dies or is told to go. Real processes."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deploy.local import Service, Topology
from manyhands.clients.act_stream import Chunk, Drain, Refusal
from manyhands.clients.inference import InferenceClient
from manyhands.errors import AlreadyExists, Unreachable
from policies.flow import FlowPolicy
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


@pytest.fixture
def policy() -> FlowPolicy:
    return make_policy(0)


@pytest.fixture
def topology(tmp_path: Path) -> Iterator[Topology]:
    with Topology(tmp_path / "logs", environment=ENVIRONMENT) as topology:
        yield topology


@pytest.fixture
def service(topology: Topology, tmp_path: Path, policy: FlowPolicy) -> Service:
    return serve(topology, tmp_path / "tiny", policy)


def test_a_killed_server_is_noticed_and_robots_go_on_with_its_successor(
    topology: Topology, tmp_path: Path, service: Service, policy: FlowPolicy
) -> None:
    with InferenceClient(service.address) as client:
        ids = {f"robot{index}": uuid.uuid4().hex for index in range(3)}
        streams = {
            robot: client.act_stream(open_session(client, robot, client_id=client_id).session_id)
            for robot, client_id in ids.items()
        }
        for stream in streams.values():
            ask(stream, 1)
            next_chunk(stream)
        topology.kill("serve")
        for stream in streams.values():
            with pytest.raises(Unreachable):
                next_reply(stream)
            with pytest.raises(Unreachable):
                ask(stream, 2)
        serve(topology, tmp_path / "tiny", policy, address=service.address)

        # A stream with the old session is told that it is gone; a new session serves on.
        def told() -> bool:
            with client.act_stream(streams["robot0"].session_id) as old:
                try:
                    ask(old, 3)
                    reply = next_reply(old)
                except Unreachable:  # The channel has not reconnected yet.
                    return False
                assert isinstance(reply.result, Refusal)
                return reply.result.reason == "unknown_session"

        wait_until(told)
        for robot, client_id in ids.items():
            session = open_session(client, robot, client_id=client_id)
            with client.act_stream(session.session_id) as stream:
                ask(stream, 4)
                np.testing.assert_array_equal(next_chunk(stream).actions, local_chunk(policy, make_observation(4), 4))


def test_a_server_that_is_told_to_go_loses_no_chunk_that_was_asked(
    topology: Topology, service: Service, policy: FlowPolicy
) -> None:
    asked: dict[str, list[int]] = {}
    answered: dict[str, list[int]] = {}
    drained: set[str] = set()
    failures: list[BaseException] = []

    def drive(client: InferenceClient, robot: str) -> None:
        """Asks until it is told to leave; then it asks no more and waits for what is pending."""
        asked[robot], answered[robot] = [], []
        try:
            with client.act_stream(open_session(client, robot).session_id) as stream:
                for seed in itertools.count(1):
                    asked[robot].append(ask(stream, seed))
                    while len(answered[robot]) < len(asked[robot]):
                        reply = next_reply(stream)
                        if isinstance(reply.result, Drain):
                            drained.add(robot)
                        else:
                            assert isinstance(reply.result, Chunk), reply.result
                            answered[robot].append(reply.request_id)
                    if robot in drained:
                        return
        except BaseException as error:
            failures.append(error)

    with InferenceClient(service.address) as client:
        threads = [threading.Thread(target=drive, args=(client, f"robot{index}")) for index in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(answered) == 3 and all(len(ids) >= 5 for ids in answered.values()))
        # To its engine process as well, as whoever ends a group of processes does: the front end decides when that ends.
        os.killpg(service.process.pid, signal.SIGTERM)
        told_s = time.monotonic()
        for thread in threads:
            thread.join(20.0)
        assert service.process.wait(10.0) == 0
        assert time.monotonic() - told_s < 5.0
    assert failures == []
    assert drained == {"robot0", "robot1", "robot2"}
    assert answered == asked


def test_a_server_ends_in_time_though_its_robots_stay(service: Service) -> None:
    with InferenceClient(service.address) as client:
        stream = client.act_stream(open_session(client, "stubborn").session_id)
        ask(stream, 1)
        next_chunk(stream)
        service.process.send_signal(signal.SIGTERM)
        told_s = time.monotonic()
        assert isinstance(next_reply(stream).result, Drain)
        with pytest.raises(Unreachable):
            next_reply(stream)
        assert service.process.wait(10.0) == 0
        assert time.monotonic() - told_s < 5.0


def test_an_actor_that_was_killed_comes_back_under_a_new_client_id(topology: Topology, service: Service) -> None:
    with InferenceClient(service.address) as killed:
        stream = killed.act_stream(open_session(killed, "left", client_id="before").session_id)
        ask(stream, 1)
        next_chunk(stream)
    # Its socket is closed, as the kernel does for a killed process.
    with InferenceClient(service.address) as client:
        started_s = time.monotonic()

        def back() -> bool:
            try:
                open_session(client, "left", client_id="after")
            except AlreadyExists as error:
                refusals.append(error)
                return False
            return True

        refusals: list[AlreadyExists] = []
        wait_until(back, timeout_s=10.0)
        assert refusals
        assert all(error.retry_after_s is not None for error in refusals)
        assert time.monotonic() - started_s < 6.0
