"""The client's side of a stream where the link is slow or the server speaks nonsense."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest

from manyhands import codec
from manyhands.clients.act_stream import ActStream, Chunk, Refusal, decode_reply
from manyhands.errors import InvalidInput, Unreachable
from manyhands.inference.v1 import inference_pb2


class SlowCall:
    """A call that takes no request until it is told to, and answers none."""

    def __init__(self, requests: Iterator[inference_pb2.ActRequest]) -> None:
        self.requests = requests
        self._over = threading.Event()

    def __iter__(self) -> Iterator[inference_pb2.ActResponse]:
        self._over.wait(10.0)
        return iter(())

    def cancel(self) -> None:
        self._over.set()


class SlowStub:
    call: SlowCall

    def Act(self, requests: Iterator[inference_pb2.ActRequest], metadata: Any) -> SlowCall:  # noqa: N802
        self.call = SlowCall(requests)
        return self.call


@pytest.fixture
def stub() -> SlowStub:
    return SlowStub()


@pytest.fixture
def stream(stub: SlowStub) -> Iterator[ActStream]:
    with ActStream(cast(Any, stub), "session", itertools.count(1), number=1) as stream:
        yield stream


def test_an_observation_that_was_not_sent_yet_is_replaced_and_answered(stub: SlowStub, stream: ActStream) -> None:
    for tick in range(3):
        request_id = stream.send(
            observation={"observation.state": np.zeros(2, dtype=np.float32)},
            task="reach",
            noise_seed=0,
            deadline_s=1.0,
            tick=tick,
        )
        assert request_id == tick + 1
    sent = next(stub.call.requests)
    assert (sent.request_id, sent.observation.tick, sent.session_id) == (3, 2, "session")
    for request_id in (1, 2):
        reply = stream.receive(1.0)
        assert reply is not None
        assert reply.request_id == request_id
        assert isinstance(reply.result, Refusal)
        assert reply.result.reason == "superseded"
    assert stream.receive(0.0) is None


def test_a_stream_that_the_server_ends_is_broken(stub: SlowStub, stream: ActStream) -> None:
    stub.call.cancel()
    with pytest.raises(Unreachable, match="ended the stream"):
        stream.receive(5.0)
    with pytest.raises(Unreachable):
        stream.send_message(inference_pb2.ActRequest())
    assert isinstance(stream.broken, Unreachable)


def chunk_response(actions: np.ndarray[Any, Any]) -> inference_pb2.ActResponse:
    tensor = codec.encode_tensor(actions)
    return inference_pb2.ActResponse(
        request_id=1, chunk=inference_pb2.Chunk(actions=tensor, model_actions=tensor, replan_interval_steps=4)
    )


def test_only_finite_float32_chunks_are_accepted() -> None:
    good = decode_reply(chunk_response(np.ones((4, 2), dtype=np.float32)))
    assert isinstance(good.result, Chunk)
    assert good.result.actions.shape == (4, 2)
    for bad in (
        np.full((4, 2), np.nan, dtype=np.float32),
        np.ones((4, 2), dtype=np.float64),
        np.ones(8, dtype=np.float32),
    ):
        with pytest.raises(InvalidInput) as refused:
            decode_reply(chunk_response(bad))
        assert refused.value.field == "chunk.actions"
    with pytest.raises(InvalidInput, match="neither"):
        decode_reply(inference_pb2.ActResponse(request_id=1))


def test_a_reason_of_a_newer_server_is_kept_as_its_number() -> None:
    response = inference_pb2.ActResponse(refusal=inference_pb2.Refusal(reason=cast(Any, 99), message="new"))
    reply = decode_reply(response)
    assert isinstance(reply.result, Refusal)
    assert reply.result.reason == "99"
