"""What happens to robots when the inference service dies, is told to go, or is fed junk. Real processes."""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest

from deploy.local import Service, Topology
from manyhands import channel, stamps
from manyhands.clients.inference import Chunk, Drain, InferenceClient, Refusal
from manyhands.errors import AlreadyExists, Unreachable
from manyhands.inference.v1 import inference_pb2
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

METHODS = ("OpenSession", "CloseSession", "ListModels", "SwapWeights", "GetStatus")


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


def test_hostile_bytes_leave_the_server_alive_and_its_memory_flat(service: Service, policy: FlowPolicy) -> None:
    random_numbers = random.Random(11)
    process = psutil.Process(service.process.pid)
    with InferenceClient(service.address) as client, channel.connect(service.address) as raw:
        robot = client.act_stream(open_session(client, "honest").session_id)
        ask(robot, 1)
        next_chunk(robot)

        def method(name: str) -> str:
            return f"/manyhands.inference.v1.InferenceService/{name}"

        def throw(number: int) -> None:
            payloads = [random_numbers.randbytes(random_numbers.randrange(0, 3000)) for _ in range(number)]
            for payload in payloads:
                call = raw.unary_unary(method(random_numbers.choice(METHODS)))
                with pytest.raises(grpc.RpcError):
                    call(b"\x0a\xff" + payload, timeout=10.0)
            stream = raw.stream_stream(method("Act"))
            for payload in payloads[:: max(1, number // 20)]:
                with pytest.raises(grpc.RpcError):
                    list(stream(iter([b"\x0a\xff" + payload]), timeout=10.0))

        def bend(number: int) -> int:
            """Well-formed messages with absurd content; all are answered."""
            session = open_session(client, f"hostile{number}-{uuid.uuid4().hex[:4]}")
            act = raw.stream_stream(
                method("Act"),
                request_serializer=inference_pb2.ActRequest.SerializeToString,
                response_deserializer=inference_pb2.ActResponse.FromString,
            )
            answers = 0
            for response in act(iter(bent_requests(random_numbers, session.session_id, number)), timeout=60.0):
                assert response.WhichOneof("result") == "refusal"
                answers += 1
            client.close_session(session.session_id)
            return answers

        throw(200)
        assert bend(500) == 500
        before = process.memory_info().rss
        throw(1000)
        assert bend(5000) == 5000
        junk_on_the_socket(service.address, random_numbers)
        grown = process.memory_info().rss - before
        assert grown < 40 * 1024 * 1024, f"grew by {grown / 1e6:.0f} MB"
        ask(robot, 2)
        np.testing.assert_array_equal(next_chunk(robot).actions, local_chunk(policy, make_observation(2), 2))
        robot.close()
    assert service.process.poll() is None


def bent_requests(random_numbers: random.Random, session_id: str, number: int) -> Iterator[inference_pb2.ActRequest]:
    for request_id in range(1, number + 1):
        request = inference_pb2.ActRequest(session_id=session_id, request_id=request_id, task="reach")
        request.deadline.CopyFrom(stamps.to_duration(30.0))
        kind = random_numbers.randrange(8)
        if kind == 0:
            request.session_id = "somebody else's"
        elif kind == 1:
            request.request_id = -request_id
        elif kind == 2:
            request.deadline.seconds = random_numbers.choice([-(1 << 60), 1 << 60, 0])
            request.deadline.nanos = random_numbers.choice([-(1 << 31), (1 << 31) - 1, 0])
        elif kind == 3:
            value = request.observation.values.add(name="observation.state")
            value.tensor.dtype = random_numbers.randrange(0, 40)  # type: ignore[assignment]
            value.tensor.shape.extend([random_numbers.choice([-1, 0, 1 << 40, 1 << 62]) for _ in range(3)])
        elif kind == 4:
            for name in ("observation.state", "observation.images.front", "observation.images.wrist"):
                value = request.observation.values.add(name=name)
                value.image.encoding = random_numbers.randrange(0, 6)  # type: ignore[assignment]
                value.image.height = value.image.width = random_numbers.choice([48, 1 << 30, -5])
                value.image.data = random_numbers.randbytes(500)
        elif kind == 5:
            request.committed_prefix.shape.extend([1 << 62, 4])
            request.committed_prefix.data = random_numbers.randbytes(64)
        elif kind == 6:
            request.task = "x" * 10_000
        else:
            request.execution_horizon = random_numbers.choice([-1, 1 << 30])
        yield request


def junk_on_the_socket(address: str, random_numbers: random.Random) -> None:
    host, _, port = address.rpartition(":")
    for _ in range(20):
        with socket.create_connection((host, int(port)), timeout=5.0) as connection:
            connection.sendall(random_numbers.randbytes(4096))


def test_a_reader_that_does_not_read_holds_up_nobody(service: Service) -> None:
    with InferenceClient(service.address) as client, channel.connect(service.address) as raw:
        session = open_session(client, "deaf")
        sent = 0

        def endless() -> Iterator[bytes]:
            nonlocal sent
            while True:
                sent += 1
                request = inference_pb2.ActRequest(session_id=session.session_id, request_id=sent, task="x" * 4000)
                yield request.SerializeToString()

        deaf = raw.stream_stream("/manyhands.inference.v1.InferenceService/Act")(endless(), timeout=60.0)
        memory = psutil.Process(service.process.pid).memory_info
        wait_until(lambda: sent > 50)
        before = memory().rss

        def held_back() -> bool:
            """Nothing more is taken from a client that reads nothing."""
            already, until_s = sent, time.monotonic() + 0.5
            wait_until(lambda: time.monotonic() > until_s or sent > already)
            return sent == already

        wait_until(held_back)
        with client.act_stream(open_session(client, "quick").session_id) as stream:
            for seed in range(1, 100):
                ask(stream, seed)
                next_chunk(stream)
        assert memory().rss - before < 40 * 1024 * 1024
        deaf.cancel()
