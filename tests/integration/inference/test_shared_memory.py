"""A robot on the server's machine leaves its pictures in memory; chunks are those of pictures that were sent."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from deploy.local import Service, Topology
from manyhands import codec
from manyhands.clients.act_stream import ActStream
from manyhands.clients.inference import InferenceClient
from manyhands.common.v1 import common_pb2
from manyhands.inference.v1 import inference_pb2
from manyhands.shared_memory import NAME, SharedMemory
from policies import checkpoint
from services.inference import service as service_module
from services.inference.shared_pictures import NUM_AREAS, SharedPictures
from tests.support.inference_lab import (
    CAMERAS,
    ENVIRONMENT,
    InProcessService,
    ask,
    good_request,
    local_chunk,
    make_observation,
    make_policy,
    next_chunk,
    next_refusal,
    open_session,
)
from tests.support.waiting import wait_until

RAW = common_pb2.IMAGE_ENCODING_RAW_RGB8
POLICY = make_policy()
KILLED = """
import sys
from manyhands.clients.inference import InferenceClient
from tests.support.inference_lab import ask, next_chunk, open_session
client = InferenceClient(sys.argv[1])
stream = client.act_stream(open_session(client, "killed").session_id)
assert stream._shared is not None
ask(stream, 1)
next_chunk(stream)
print("asked", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("shared-memory")
    checkpoint.save(POLICY, folder / "tiny")
    with Topology(folder / "logs", environment=ENVIRONMENT) as topology:
        flags = ["--idle-timeout-s", "0.5", "--address", "127.0.0.1:0"]
        yield topology.start("serve", ["serve", f"--model=tiny={folder / 'tiny'}", *flags])


@pytest.fixture
def client(service: Service) -> Iterator[InferenceClient]:
    with InferenceClient(service.address) as client:
        yield client


def memories(service: Service) -> int:
    """Of sessions, that the server has open."""
    count = 0
    for link in Path(f"/proc/{service.process.pid}/fd").iterdir():
        try:
            count += NAME in str(link.readlink())
        except OSError:  # Closed meanwhile.
            continue
    return count


def shared(stream: ActStream) -> list[inference_pb2.ActRequest]:
    """What the stream sends from now on."""
    sent: list[inference_pb2.ActRequest] = []
    memory = stream._shared
    assert isinstance(memory, SharedMemory)
    place = memory.place

    def noted(request: inference_pb2.ActRequest) -> inference_pb2.ActRequest:
        sent.append(place(request))
        return sent[-1]

    memory.place = noted  # type: ignore[method-assign]
    return sent


def in_message(number: int) -> inference_pb2.ActRequest:
    """A request whose pictures are in it, uncompressed."""
    values = codec.encode_values(make_observation(number), image_encoding=RAW)
    return inference_pb2.ActRequest(request_id=number, observation=common_pb2.Observation(values=values))


def test_chunks_are_those_of_pictures_that_were_sent(service: Service, client: InferenceClient) -> None:
    session = open_session(client, "left")
    with client.act_stream(session.session_id) as stream:
        sent = shared(stream)
        for seed in range(1, 9):
            ask(stream, seed)
            np.testing.assert_array_equal(next_chunk(stream).actions, local_chunk(POLICY, make_observation(seed), seed))
        assert all(len(one.shared_pictures) == len(CAMERAS) for one in sent)
        assert max(one.ByteSize() for one in sent) < 2000
        memory = stream._shared
        assert memory is not None
        for number in range(100, 100 + NUM_AREAS):  # It breaks before these are answered.
            memory.place(in_message(number))
    # Over another stream of the session, and with pictures in messages all the same.
    with client.act_stream(session.session_id) as stream:
        sent = shared(stream)
        ask(stream, 9)
        np.testing.assert_array_equal(next_chunk(stream).actions, local_chunk(POLICY, make_observation(9), 9))
        assert sent[0].shared_pictures
        stream._shared = None
        ask(stream, 10)
        np.testing.assert_array_equal(next_chunk(stream).actions, local_chunk(POLICY, make_observation(10), 10))
    assert memories(service) > 0
    client.close_session(session.session_id)
    wait_until(lambda: memories(service) == 0, 5, "the memory's end")


@pytest.mark.parametrize("offset", [0, -1, 1 << 50])
def test_a_place_outside_is_refused_and_the_next_request_answered(client: InferenceClient, offset: int) -> None:
    session = open_session(client, f"hostile{offset}")
    with client.act_stream(session.session_id) as stream:
        request = good_request()
        for value in request.observation.values:
            if value.HasField("image"):
                value.image.encoding, value.image.data = RAW, b""
                request.shared_pictures.add(name=value.name, offset=offset)
        stream.send_message(request)
        refusal = next_refusal(stream)
        assert refusal.reason == "invalid"
        assert "shared memory" in refusal.message
        ask(stream, 3)
        np.testing.assert_array_equal(next_chunk(stream).actions, local_chunk(POLICY, make_observation(3), 3))
    client.close_session(session.session_id)


def test_names_that_are_none_and_sessions_without_memory_are_refused(client: InferenceClient) -> None:
    session = open_session(client, "other")
    with client.act_stream(session.session_id) as stream:
        stream._shared = None  # What is sent is what is written here.
        request = good_request()
        request.shared_pictures.add(name="observation.images.back", offset=4096)
        stream.send_message(request)
        refusal = next_refusal(stream)
        assert (refusal.reason, refusal.field) == ("invalid", "observation.images.back")
        for names, field in (([CAMERAS[0]] * 2, CAMERAS[0]), ([""] * 100, "shared_pictures")):
            request = good_request()
            for value in request.observation.values:
                if value.name == CAMERAS[0]:
                    value.image.data = b""
            for name in names:
                request.shared_pictures.add(name=name, offset=4096)
            stream.send_message(request)
            refusal = next_refusal(stream)
            assert (refusal.reason, refusal.field) == ("invalid", field), refusal.message
    client.close_session(session.session_id)
    client._may_share = False
    session = open_session(client, "far")
    with client.act_stream(session.session_id) as stream:
        request = good_request()
        request.shared_pictures.add(name=request.observation.values[0].name, offset=4096)
        stream.send_message(request)
        refusal = next_refusal(stream)
        assert (refusal.reason, refusal.field) == ("invalid", "shared_pictures")
        assert "wants_shared_memory" in refusal.message
    client.close_session(session.session_id)


def test_a_robot_that_comes_back_again_and_again_has_one_piece_of_memory(client: InferenceClient) -> None:
    def mapped() -> int:
        gc.collect()
        return Path("/proc/self/maps").read_text().count(NAME)

    open_session(client, "returning", client_id="one")
    before = mapped()
    for _ in range(5):
        session = open_session(client, "returning", client_id="one")
    assert mapped() == before
    with client.act_stream(session.session_id) as first:
        memory = first._shared
        assert memory is not None
        with client.act_stream(session.session_id) as second:
            assert second._shared is None, "the other stream may still have requests there"
    del memory
    client.close_session(session.session_id)
    assert mapped() == before - 1
    open_session(client, "returning", client_id="one")
    client._may_share = False
    open_session(client, "returning", client_id="one")
    assert mapped() == before - 1


def test_when_all_memory_is_given_robots_send_their_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    one = SharedPictures.of(POLICY.spec.images)
    assert one is not None
    one.close()
    monkeypatch.setattr(service_module, "MAX_BYTES_IN_ALL", 2 * one.num_bytes)
    with InProcessService(POLICY) as service, InferenceClient(service.address) as client:
        sessions = [open_session(client, name) for name in ("left", "middle", "right")]
        client.close_session(sessions[0].session_id)
        sessions.append(open_session(client, "again"))
        for session, has_memory in zip(sessions[1:], (True, False, True), strict=True):
            with client.act_stream(session.session_id) as stream:
                assert (stream._shared is not None) is has_memory
                ask(stream, 5)
                np.testing.assert_array_equal(next_chunk(stream).actions, local_chunk(POLICY, make_observation(5), 5))


def test_memory_of_a_client_that_is_killed_is_given_back(service: Service) -> None:
    wait_until(lambda: memories(service) == 0, 5, "the end of others")
    killed = subprocess.Popen(
        [sys.executable, "-c", KILLED, service.address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    with killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == b"asked\n"
        assert memories(service) > 0
        killed.kill()
    wait_until(lambda: memories(service) == 0, 10, "the session's end")
    assert psutil.Process(service.process.pid).is_running()
