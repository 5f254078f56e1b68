"""What gets no chunk is told why, by name, while its stream and the other robots go on."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from manyhands import codec, stamps
from manyhands.clients.act_stream import ActStream, Chunk, Refusal
from manyhands.clients.inference import InferenceClient
from manyhands.inference.v1 import inference_pb2
from tests.support.inference_lab import (
    ACTION_SIZE,
    CAMERA_SIZE,
    CAMERAS,
    HORIZON,
    STATE_SIZE,
    GatedPolicy,
    InProcessService,
    ask,
    good_request,
    local_chunk,
    make_observation,
    next_chunk,
    next_refusal,
    next_reply,
    open_session,
    shut_gate,
)
from tests.support.waiting import wait_until


def nan_in_state(request: inference_pb2.ActRequest) -> None:
    state = np.zeros(STATE_SIZE, dtype=np.float32)
    state[3] = np.nan
    request.observation.values[0].tensor.CopyFrom(codec.encode_tensor(state))


def cameras_swapped(request: inference_pb2.ActRequest) -> None:
    first, second = request.observation.values[1], request.observation.values[2]
    first.name, second.name = second.name, first.name


def camera_missing(request: inference_pb2.ActRequest) -> None:
    del request.observation.values[2]


def wrong_picture_size(request: inference_pb2.ActRequest) -> None:
    pixels = np.zeros((CAMERA_SIZE, CAMERA_SIZE + 2, 3), dtype=np.uint8)
    request.observation.values[1].image.CopyFrom(codec.encode_image(pixels))


def lying_picture(request: inference_pb2.ActRequest) -> None:
    """A declared size that is right, over bytes of another picture."""
    pixels = np.zeros((CAMERA_SIZE * 2, CAMERA_SIZE, 3), dtype=np.uint8)
    image = codec.encode_image(pixels)
    image.height = CAMERA_SIZE
    request.observation.values[1].image.CopyFrom(image)


def wrong_state_type(request: inference_pb2.ActRequest) -> None:
    state = np.zeros(STATE_SIZE, dtype=np.float64)
    request.observation.values[0].tensor.CopyFrom(codec.encode_tensor(state))


def huge_declared_shape(request: inference_pb2.ActRequest) -> None:
    request.observation.values[0].tensor.shape[:] = [1 << 62, 1 << 62]


def huge(request: inference_pb2.ActRequest) -> None:
    request.observation.values.add(name="padding", tensor=codec.encode_tensor(np.zeros(1 << 20, dtype=np.float32)))


def no_deadline(request: inference_pb2.ActRequest) -> None:
    request.ClearField("deadline")


def endless_deadline(request: inference_pb2.ActRequest) -> None:
    request.deadline.CopyFrom(stamps.to_duration(61.0))


def nan_in_prefix(request: inference_pb2.ActRequest) -> None:
    request.committed_prefix.CopyFrom(codec.encode_tensor(np.full((3, ACTION_SIZE), np.nan, dtype=np.float32)))


def wide_prefix(request: inference_pb2.ActRequest) -> None:
    request.committed_prefix.CopyFrom(codec.encode_tensor(np.zeros((3, ACTION_SIZE + 1), dtype=np.float32)))


def long_prefix(request: inference_pb2.ActRequest) -> None:
    request.committed_prefix.CopyFrom(codec.encode_tensor(np.zeros((HORIZON + 1, ACTION_SIZE), dtype=np.float32)))


def negative_delay(request: inference_pb2.ActRequest) -> None:
    request.delay_steps = -1


def long_delay(request: inference_pb2.ActRequest) -> None:
    request.delay_steps = HORIZON + 1


def endless_task(request: inference_pb2.ActRequest) -> None:
    request.task = "reach " * 1000


@pytest.mark.parametrize(
    ("spoil", "field", "words"),
    [
        (nan_in_state, "observation.state", "element joint3.pos is nan"),
        (cameras_swapped, CAMERAS[1], "out of order"),
        (camera_missing, CAMERAS[1], "is missing"),
        (wrong_picture_size, CAMERAS[0], "48x50"),
        (lying_picture, CAMERAS[0], "declared 48x48"),
        (wrong_state_type, "observation.state", "float64"),
        (huge_declared_shape, "observation.state", "has shape"),
        (huge, "observation", "limit"),
        (no_deadline, "deadline", "must be > 0"),
        (endless_deadline, "deadline", "at most 60"),
        (nan_in_prefix, "committed_prefix", "not finite"),
        (wide_prefix, "committed_prefix", "(1 to 8, 4) float32"),
        (long_prefix, "committed_prefix", "(1 to 8, 4) float32"),
        (negative_delay, "delay_steps", "is -1"),
        (long_delay, "delay_steps", "0 to 8"),
        (endless_task, "task", "at most 4096"),
    ],
)
def test_a_bad_request_is_refused_by_name_and_harms_nobody(
    client: InferenceClient,
    stream: ActStream,
    policy: GatedPolicy,
    spoil: Callable[[inference_pb2.ActRequest], None],
    field: str,
    words: str,
) -> None:
    with client.act_stream(open_session(client, "neighbour").session_id) as neighbour:
        ask(neighbour, 5)
        request = good_request()
        spoil(request)
        stream.send_message(request)
        refusal = next_refusal(stream)
        assert (refusal.reason, refusal.field) == ("invalid", field)
        assert words in refusal.message
        np.testing.assert_array_equal(next_chunk(neighbour).actions, local_chunk(policy, make_observation(5), 5))
        stream.send_message(good_request())
        np.testing.assert_array_equal(next_chunk(stream).actions, local_chunk(policy, make_observation(1), 1))


def test_what_cannot_be_in_time_is_refused(
    service: InProcessService, client: InferenceClient, stream: ActStream, policy: GatedPolicy
) -> None:
    with client.act_stream(open_session(client, "other").session_id) as other:
        shut_gate(policy, other)
        ask(stream, 1, deadline_s=0.3)
        wait_until(lambda: service.engine.pending() == 1)
        came_s = time.monotonic()
        wait_until(lambda: time.monotonic() > came_s + 0.4)
        policy.gate.set()
        refusal = next_refusal(stream)
        assert (refusal.reason, refusal.field) == ("deadline", "deadline")
        # Waiting for the gate was no pass: what the model needs is known again after a few.
        next_chunk(other)
        ask(stream, 2)
        assert isinstance(next_reply(stream).result, Chunk)
    (status,) = [s for s in client.status().sessions if s.robot_id == "left"]
    assert (status.chunk_count, status.refused_count, status.missed_deadline_count) == (1, 1, 1)
    assert "deadline" in status.last_refusal


def test_a_replayed_id_is_refused_and_the_stream_goes_on(stream: ActStream) -> None:
    ask(stream, 1)
    assert next_reply(stream).request_id == 1
    request = inference_pb2.ActRequest(request_id=1, deadline=stamps.to_duration(1.0))
    stream.send_message(request)
    reply = next_reply(stream)
    assert isinstance(reply.result, Refusal)
    assert (reply.request_id, reply.result.reason, reply.result.field) == (1, "replayed", "request_id")
    ask(stream, 2)
    next_chunk(stream)


def test_an_unknown_session_is_told_so(client: InferenceClient) -> None:
    with client.act_stream("no such session") as stream:
        ask(stream, 1)
        assert next_refusal(stream).reason == "unknown_session"


def test_a_stream_of_one_robot_cannot_ask_for_another(client: InferenceClient, stream: ActStream) -> None:
    other = open_session(client, "right")
    ask(stream, 1)
    next_chunk(stream)
    stolen = client.act_stream(stream.session_id)
    stolen.session_id = other.session_id
    ask(stolen, 2)
    refusal = next_refusal(stolen)
    assert (refusal.reason, refusal.field) == ("invalid", "session_id")
    stolen.close()


def test_a_chunk_that_is_not_finite_never_leaves(client: InferenceClient, stream: ActStream, policy: GatedPolicy) -> None:
    with torch.no_grad():
        policy.chunk_in.bias[0] = torch.nan
    ask(stream, 1)
    refusal = next_refusal(stream)
    assert refusal.reason == "internal"
    assert "not finite" in refusal.message
    with torch.no_grad():
        policy.chunk_in.bias[0] = 0.0
    ask(stream, 2)
    next_chunk(stream)


def test_a_policy_that_fails_on_one_row_answers_the_others(
    service: InProcessService, client: InferenceClient, policy: GatedPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def preprocess(samples: object, device: torch.device) -> object:
        if any(sample.task == "poison" for sample in samples):  # type: ignore[attr-defined]
            raise ZeroDivisionError
        return GatedPolicy.preprocess(policy, samples, device)  # type: ignore[arg-type]

    monkeypatch.setattr(policy, "preprocess", preprocess)
    streams = [client.act_stream(open_session(client, f"robot{index}").session_id) for index in range(3)]
    shut_gate(policy, streams[0])
    ask(streams[1], 1, task="poison")
    ask(streams[2], 2)
    wait_until(lambda: service.engine.pending() == 2)
    policy.gate.set()
    assert next_refusal(streams[1]).reason == "internal"
    np.testing.assert_array_equal(next_chunk(streams[2]).actions, local_chunk(policy, make_observation(2), 2))
    for stream in streams:
        stream.close()
