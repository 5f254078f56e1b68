"""The way of a request through the front end while its robot is alone: nobody is woken who need not be."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import pytest

from manyhands import codec, stamps
from manyhands.common.v1 import common_pb2
from manyhands.inference.v1 import inference_pb2
from services.inference.engine_port import Answer, Job, Rehearsal
from services.inference.operator_notes import OperatorNotes
from services.inference.sessions import Sessions, fit
from services.inference.stats import ServiceStats
from services.inference.stream import RobotStream
from tests.support.fake_engine import FakeEngine

CAMERA_SIZE = 16


class InlineExecutor(Executor):
    """Its threads are as quick as can be; ahead: rows that the engine knew of when each piece of work came."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self.ahead: list[int] = []

    def submit(self, run: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        self.ahead.append(self._engine.num_expected)
        run(*arguments, **named)
        return Future()


class Desk:
    """Of a front end with one session; num_in_flight is for tests to say."""

    max_requests_hz = 200.0

    def __init__(self) -> None:
        self.engine = FakeEngine(CAMERA_SIZE)
        self.models = self.engine.models
        self.sessions = Sessions(max_sessions=4, idle_timeout_s=4.0)
        self.notes = OperatorNotes(ServiceStats())
        self.decoders = InlineExecutor(self.engine)
        self.num_in_flight = self.num_streams = 1
        self.num_intervals_asked = 0
        spec = self.models["fake"].used_spec
        self.session, _ = self.sessions.open(
            robot_id="left",
            client_id="one",
            model="fake",
            robot_fit=fit(spec, spec, masks_cameras=False),
            asked_interval_steps=10,
            control_rate_hz=50.0,
            now_s=time.monotonic(),
        )
        self.stream = RobotStream(self, self.session.session_id)

    def max_request_bytes(self, session: object) -> int:
        return 1 << 20

    def replan_interval_steps(self, session: object) -> int:
        self.num_intervals_asked += 1
        return 10

    def ask(
        self, encoding: common_pb2.ImageEncoding.ValueType = common_pb2.IMAGE_ENCODING_JPEG, *, request_id: int = 1
    ) -> None:
        self.stream._prepare(self.stream._take(self.request(encoding, request_id), time.monotonic()))

    def request(
        self, encoding: common_pb2.ImageEncoding.ValueType = common_pb2.IMAGE_ENCODING_JPEG, request_id: int = 1
    ) -> inference_pb2.ActRequest:
        arrays: dict[str, Any] = {
            feature.name: np.zeros(feature.shape, dtype=feature.dtype)
            for feature in self.models["fake"].used_spec.observation
        }
        return inference_pb2.ActRequest(
            session_id=self.session.session_id,
            request_id=request_id,
            observation=common_pb2.Observation(values=codec.encode_values(arrays, image_encoding=encoding)),
            deadline=stamps.to_duration(5.0),
        )


@pytest.fixture
async def desk() -> Desk:
    return Desk()


async def test_the_loop_decodes_a_picture_itself_and_answers_in_the_same_turn(desk: Desk) -> None:
    desk.ask()
    assert len(desk.decoders.ahead) == 2
    response = desk.stream._outbox.get_nowait()
    assert response is not None
    assert response.WhichOneof("result") == "chunk"


async def test_the_engine_is_told_ahead_before_pictures_are_begun(desk: Desk) -> None:
    desk.ask()
    assert desk.decoders.ahead == [1, 1]


async def test_where_others_are_served_the_loop_decodes_nothing(desk: Desk) -> None:
    desk.num_in_flight = 2
    desk.ask()
    assert len(desk.decoders.ahead) == 3


async def test_the_loop_decodes_nothing_that_may_take_long(desk: Desk) -> None:
    desk.ask(common_pb2.IMAGE_ENCODING_PNG)
    assert len(desk.decoders.ahead) == 3


async def test_a_rehearsal_makes_an_answer_that_nobody_gets(desk: Desk) -> None:
    jobs: list[Job] = []
    desk.engine.submit = lambda *, job, **_: jobs.append(job)  # type: ignore[method-assign]
    desk.ask()
    [job] = jobs
    assert job.rehearse is not None
    zeros = np.zeros((2, 14), dtype=np.float32)
    answer = Answer(
        actions=zeros,
        model_actions=zeros,
        version=desk.models["fake"].version,
        queue_s=0.0,
        prefix_s=0.0,
        sample_s=0.0,
        postprocess_s=0.0,
        batch_size=1,
    )
    job.rehearse(Rehearsal(answer=answer))
    assert desk.num_intervals_asked == 1
    assert desk.stream._outbox.empty()
    job.done(answer)
    assert desk.stream._outbox.qsize() == 1
    job.rehearse(Rehearsal(answer=answer))
    assert desk.num_intervals_asked == 2, "it is answered already"


@pytest.mark.parametrize(
    ("num_streams", "num_in_flight", "num_expected"), [(1, 0, 1), (2, 0, 0), (1, 1, 0)], ids=["alone", "not alone", "busy"]
)
async def test_the_next_request_is_rehearsed_with_the_last_one_by_a_robot_that_is_alone(
    desk: Desk, num_streams: int, num_in_flight: int, num_expected: int
) -> None:
    desk.stream._rehearse_next()
    assert desk.engine.num_rehearsed == 0, "nothing was asked yet"
    desk.ask()
    desk.num_streams, desk.num_in_flight = num_streams, num_in_flight
    desk.decoders.ahead.clear()
    desk.stream._rehearse_next()
    assert bool(desk.decoders.ahead) == bool(num_expected)
    assert desk.engine.num_rehearsed == num_expected
    assert desk.stream._outbox.qsize() == 1
    assert desk.stream.num_in_flight == 0


async def test_no_request_is_kept_where_others_are_served(desk: Desk) -> None:
    desk.num_streams = 2
    desk.ask()
    assert desk.stream._last_answered is None


async def test_a_request_that_fails_behind_its_pictures_is_answered_and_the_next_one_goes_on(desk: Desk) -> None:
    real = desk.engine.submit
    desk.engine.submit = lambda **row: 1 / 0  # type: ignore[method-assign, assignment]
    desk.num_in_flight = 2  # Pictures are decoded on threads, and the loop is told.
    desk.ask()
    await asyncio.sleep(0.01)
    response = desk.stream._outbox.get_nowait()
    assert response is not None
    assert response.WhichOneof("result") == "refusal"
    desk.engine.submit = real  # type: ignore[method-assign]
    desk.ask(request_id=2)
    await asyncio.sleep(0.01)
    response = desk.stream._outbox.get_nowait()
    assert response is not None
    assert response.WhichOneof("result") == "chunk"


async def test_a_stream_whose_reader_does_not_end_lets_go_of_its_name(desk: Desk) -> None:
    released = asyncio.Event()

    async def requests() -> AsyncIterator[inference_pb2.ActRequest]:
        yield desk.request()
        try:
            await asyncio.sleep(60.0)
        finally:
            await released.wait()

    async def read() -> None:
        responses = desk.stream.responses(requests())
        try:
            async for _ in responses:
                pass
        finally:
            await responses.aclose()  # type: ignore[attr-defined]

    reading = asyncio.create_task(read())
    await asyncio.sleep(0.01)
    assert desk.session.stream is desk.stream
    reading.cancel()
    await asyncio.sleep(0.01)
    assert not reading.done()
    assert desk.session.stream is None
    released.set()
    await asyncio.gather(reading, return_exceptions=True)


async def test_pictures_of_a_stream_that_is_over_are_dropped(desk: Desk) -> None:
    submitted: list[object] = []
    desk.engine.submit = lambda **row: submitted.append(row)  # type: ignore[method-assign]
    desk.stream._is_over = True
    desk.ask()
    assert submitted == []


async def test_the_row_of_a_gate_goes_to_it(desk: Desk) -> None:
    desk.ask()
    jobs: list[Job] = []
    desk.engine.submit = lambda *, job, **_: jobs.append(job)  # type: ignore[method-assign]
    desk.engine.next_gate = 7
    desk.ask(request_id=2)
    assert [job.gate for job in jobs] == [7]
    assert 7 not in desk.engine.given_up


@pytest.mark.parametrize("why", ["first request", "refused before", "slow pictures", "lacks a camera"])
async def test_no_device_waits_for_what_may_not_be_there_in_a_moment(desk: Desk, why: str) -> None:
    jobs: list[Job] = []
    if why != "first request":
        desk.ask()
    if why == "refused before":
        bad = desk.request(request_id=2)
        bad.observation.values[1].image.data = b"none"
        desk.stream._prepare(desk.stream._take(bad, time.monotonic()))
    if why == "lacks a camera":
        spec = desk.models["fake"].used_spec
        features = [feature for feature in spec.observation if "right" not in feature.name]
        desk.session.fit = dataclasses.replace(desk.session.fit, required=tuple(features))
    await asyncio.sleep(0.01)
    desk.engine.submit = lambda *, job, **_: jobs.append(job)  # type: ignore[method-assign]
    desk.engine.next_gate = 7
    encoding = common_pb2.IMAGE_ENCODING_PNG if why == "slow pictures" else common_pb2.IMAGE_ENCODING_JPEG
    request = desk.request(encoding, request_id=3)
    if why == "lacks a camera":
        del request.observation.values[3]
    desk.stream._prepare(desk.stream._take(request, time.monotonic()))
    await asyncio.sleep(0.01)
    assert [job.gate for job in jobs] == [0]


@pytest.mark.parametrize("why", ["bad picture", "over", "newer", "engine fails", "stream ends"])
async def test_no_gate_stays_closed_when_its_row_does_not_come(desk: Desk, why: str) -> None:
    desk.ask()
    desk.engine.next_gate = 7
    request = desk.request(request_id=3)
    if why == "bad picture":
        data = request.observation.values[1].image.data
        request.observation.values[1].image.data = data[: len(data) // 2]  # Its head is in order.
    elif why == "over":
        desk.stream._is_over = True
    elif why == "newer":
        desk.stream._next = desk.stream._take(desk.request(request_id=2), time.monotonic())
    elif why == "engine fails":
        desk.engine.submit = lambda **row: 1 / 0  # type: ignore[method-assign, assignment]
    else:
        desk.num_in_flight = 2
        desk.decoders.submit = lambda *_, **__: Future()  # type: ignore[method-assign]
    desk.stream._prepare(desk.stream._take(request, time.monotonic()))
    if why == "stream ends":
        assert 7 not in desk.engine.given_up

        async def requests() -> AsyncIterator[inference_pb2.ActRequest]:
            await asyncio.sleep(60.0)
            yield request

        responses = desk.stream.responses(requests())
        await anext(responses)  # type: ignore[arg-type]
        await responses.aclose()  # type: ignore[attr-defined]
    await asyncio.sleep(0.01)
    assert 7 in desk.engine.given_up
