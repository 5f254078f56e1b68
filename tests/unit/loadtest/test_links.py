"""What a simulated robot sends the service, as the service reads it."""

from __future__ import annotations

from types import SimpleNamespace

import grpc
import numpy as np

from manyhands import codec
from manyhands.common.v1 import common_pb2
from manyhands.inference.v1 import inference_pb2
from services.loadtest.links import ServiceLink
from tests.unit.loadtest.test_loadtest_report import make_plan

HORIZON = 6


class Call:
    """An Act call that answers every request with a chunk of its number."""

    def __init__(self) -> None:
        self.sent: list[inference_pb2.ActRequest] = []

    async def write(self, content: bytes) -> None:
        self.sent.append(inference_pb2.ActRequest.FromString(content))

    async def read(self) -> inference_pb2.ActResponse:
        actions = np.full((HORIZON, 2), len(self.sent), dtype=np.float32)
        chunk = inference_pb2.Chunk(actions=codec.encode_tensor(actions), model_actions=codec.encode_tensor(actions))
        return inference_pb2.ActResponse(request_id=self.sent[-1].request_id, chunk=chunk)


async def test_a_request_says_what_was_left_of_the_chunk_before_it() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as connection:
        link = ServiceLink(make_plan(with_prefix=True, replan_interval_steps=4), 0, connection, {})
        call = Call()
        link._call, link.session_id, link._bodies = (
            call,
            "session",
            [inference_pb2.ActRequest(task="go").SerializeToString()],
        )
        for tick in (5, 7):
            link.prepare()
            await link.ask(tick)
    first, second = call.sent
    assert [(sent.session_id, sent.task, sent.HasField("sent")) for sent in call.sent] == [("session", "go", True)] * 2
    assert [(sent.request_id, sent.noise_seed, sent.delay_steps) for sent in call.sent] == [(1, 5, 0), (2, 7, 1)]
    assert not first.HasField("committed_prefix")
    left = codec.decode_tensor(second.committed_prefix, field="committed_prefix")
    assert np.array_equal(left, np.ones((HORIZON - 4, 2), dtype=np.float32))


async def test_a_question_is_about_what_was_observed_last() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as connection:
        link = ServiceLink(make_plan(), 0, connection, {})
        asked: list[inference_pb2.GenerateRequest] = []
        link._call, link.session_id = Call(), "session"
        link._stub = SimpleNamespace(Generate=lambda request, timeout: asked.append(request))  # type: ignore[assignment]
        observed = [
            common_pb2.Observation(values=[common_pb2.NamedValue(name=name)]) for name in ("first", "second", "third")
        ]
        link._bodies = [inference_pb2.ActRequest(observation=one).SerializeToString() for one in observed]
        for tick in (4, 2):
            link.prepare()
            await link.ask(tick)
            link.generate(20, "pick")
    assert [(one.session_id, one.previous_text, one.max_new_tokens) for one in asked] == [("session", "pick", 20)] * 2
    assert [one.observation for one in asked] == [observed[1], observed[2]]
