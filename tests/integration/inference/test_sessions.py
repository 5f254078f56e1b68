"""A robot's session: the handshake that says what fits, who has the robot's name, and how long it lasts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import numpy as np
import pytest

from manyhands import channel
from manyhands.clients.act_stream import NUMBER_KEY, SESSION_KEY, ActStream, Refusal, decode_reply
from manyhands.clients.inference import InferenceClient
from manyhands.errors import AlreadyExists, Conflict, InvalidInput, NotFound, Overloaded
from manyhands.inference.v1 import inference_pb2, inference_pb2_grpc
from manyhands.spec import Spec
from services.inference.service import MAX_REQUESTS_HZ
from services.inference.stream import MAX_BURST
from tests.support.inference_lab import (
    CAMERAS,
    HORIZON,
    SPEC,
    GatedPolicy,
    InProcessService,
    ask,
    local_chunk,
    make_observation,
    make_policy,
    next_chunk,
    next_refusal,
    next_reply,
    open_session,
    shut_gate,
)
from tests.support.waiting import wait_until


def test_the_handshake_says_what_is_served_and_adapted(client: InferenceClient) -> None:
    session = open_session(client, "left")
    assert session.model_spec.digest == SPEC.digest
    assert session.required_observations == ("observation.state", *CAMERAS)
    assert session.chunk_horizon == HORIZON
    assert session.adaptations == ()
    assert not session.has_text_head
    assert (session.version.model, session.version.number, len(session.version.digest)) == ("tiny", 0, 32)
    (model,) = client.list_models()
    assert (model.name, model.policy_type, model.version) == ("tiny", "flow", session.version)


def with_observation(*features: object) -> Spec:
    return dataclasses.replace(SPEC, observation=tuple(features))  # type: ignore[arg-type]


def test_a_robot_that_does_not_fit_is_refused_at_the_handshake_by_name(client: InferenceClient) -> None:
    state, front, wrist = SPEC.observation
    with pytest.raises(InvalidInput, match="out of order") as swapped:
        open_session(client, "left", spec=with_observation(state, wrist, front))
    assert swapped.value.field == CAMERAS[1]
    renamed = dataclasses.replace(state, element_names=tuple(reversed(state.element_names)))
    with pytest.raises(InvalidInput, match=r"element 0 is 'joint5\.pos' on the robot") as joints:
        open_session(client, "left", spec=with_observation(renamed, front, wrist))
    assert joints.value.field == "observation.state"
    with pytest.raises(InvalidInput) as rate:
        open_session(client, "left", spec=dataclasses.replace(SPEC, control_rate_hz=30.0))
    assert rate.value.field == "spec.control_rate_hz"
    with pytest.raises(NotFound, match="there are tiny"):
        client.open_session(robot_id="left", client_id="c", model="big", spec=SPEC, replan_interval_steps=4)
    assert len(client.status().sessions) == 0


def test_a_bigger_or_missing_camera_is_adapted_and_still_answered(client: InferenceClient) -> None:
    state, front, wrist = SPEC.observation
    big = dataclasses.replace(front, shape=(96, 64, 3))
    session = open_session(client, "left", spec=with_observation(state, big))
    assert {a.feature: a.kind for a in session.adaptations} == {front.name: "resized", wrist.name: "masked"}
    assert session.required_observations == (state.name, front.name)
    observation = make_observation(3)
    del observation[wrist.name]
    with client.act_stream(session.session_id) as stream:
        # The robot may resize by itself: the model's size is taken too.
        ask(stream, 3, observation=observation)
        at_model_size = next_chunk(stream).actions
        observation[front.name] = np.zeros((96, 64, 3), dtype=np.uint8)
        ask(stream, 3, observation=observation)
        assert not np.array_equal(next_chunk(stream).actions, at_model_size)


def test_a_robot_name_belongs_to_one_client_until_its_session_expires(client: InferenceClient) -> None:
    first = open_session(client, "left", client_id="first")
    stream = client.act_stream(first.session_id)
    ask(stream, 1)
    next_chunk(stream)
    with pytest.raises(AlreadyExists, match="stream is open") as refused:
        open_session(client, "left", client_id="second")
    assert refused.value.retry_after_s == pytest.approx(0.5)
    stream.close()

    def taken_over() -> bool:
        try:
            open_session(client, "left", client_id="second")
        except AlreadyExists:
            return False
        return True

    wait_until(taken_over, timeout_s=5.0)
    with client.act_stream(first.session_id) as late:
        ask(late, 2)
        assert next_refusal(late).reason == "unknown_session"


def test_a_waiting_robot_keeps_its_session_by_its_open_stream(client: InferenceClient, stream: ActStream) -> None:
    opened_s = time.monotonic()
    wait_until(lambda: time.monotonic() > opened_s + 1.2)  # Twice the idle timeout, no request sent.
    ask(stream, 1)
    next_chunk(stream)


def test_the_same_client_opens_again_and_its_old_stream_ends(client: InferenceClient) -> None:
    first = open_session(client, "left", client_id="actor")
    old = client.act_stream(first.session_id)
    ask(old, 1)
    next_chunk(old)
    second = open_session(client, "left", client_id="actor")
    assert second.session_id != first.session_id
    with pytest.raises(NotFound, match="opened a new session"):
        next_reply(old)
    with client.act_stream(second.session_id) as stream:
        ask(stream, 2)
        next_chunk(stream)


def test_a_second_stream_takes_over_from_the_first(client: InferenceClient) -> None:
    session = open_session(client, "left")
    old = client.act_stream(session.session_id)
    ask(old, 1)
    next_chunk(old)
    with client.act_stream(session.session_id) as new:
        ask(new, 2)
        next_chunk(new)
        with pytest.raises(Conflict, match="took over"):
            next_reply(old)
        ask(new, 3)
        next_chunk(new)


def test_a_stream_that_was_left_and_is_heard_of_late_does_not_take_over(
    service: InProcessService, client: InferenceClient
) -> None:
    session = open_session(client, "left")
    client.act_stream(session.session_id).close()
    with client.act_stream(session.session_id) as new, channel.connect(service.address) as raw:
        ask(new, 1)
        next_chunk(new)
        requests = [inference_pb2.ActRequest(session_id=session.session_id, request_id=100, task="reach")]
        left = inference_pb2_grpc.InferenceServiceStub(raw).Act(
            iter(requests), metadata=((SESSION_KEY, session.session_id), (NUMBER_KEY, "1")), timeout=60.0
        )
        (refusal,) = (decode_reply(answer).result for answer in left)
        assert isinstance(refusal, Refusal)
        assert "took over" in refusal.message
        ask(new, 3)
        next_chunk(new)


def test_a_stream_that_was_replaced_and_ends_late_takes_nothing_of_its_successor_with_it(
    service: InProcessService, client: InferenceClient, stream: ActStream, policy: GatedPolicy
) -> None:
    """It hangs on a dead link for long after the robot came back."""
    service.servicer.max_requests_hz = 1e6  # What it does not read of its answers fills the link in a moment.
    session = open_session(client, "back")
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield inference_pb2.ActRequest(session_id=session.session_id, task="x" * 4000).SerializeToString()

    def held_back() -> bool:
        already, until_s = sent, time.monotonic() + 0.3
        wait_until(lambda: time.monotonic() > until_s or sent > already)
        return sent == already

    with channel.connect(service.address) as raw:
        dead = raw.stream_stream("/manyhands.inference.v1.InferenceService/Act")(endless(), timeout=60.0)
        wait_until(held_back)
        with client.act_stream(session.session_id) as successor:
            shut_gate(policy, stream)
            ask(successor, 1)
            wait_until(lambda: service.engine.pending() == 1)
            dead.cancel()
            wait_until(lambda: len(service.servicer._streams) == 2)
            policy.gate.set()
            np.testing.assert_array_equal(next_chunk(successor).actions, local_chunk(policy, make_observation(1), 1))


def test_status_shows_nobody_what_speaks_for_a_session(client: InferenceClient, stream: ActStream) -> None:
    ask(stream, 1)
    next_chunk(stream)
    [seen] = client.status().sessions
    assert seen.session_id == stream.session_id[:8]
    client.close_session(seen.session_id)
    with client.act_stream(seen.session_id) as other:
        ask(other, 1)
        assert next_refusal(other).reason == "unknown_session"
    ask(stream, 2)
    next_chunk(stream)


def test_a_closed_session_frees_its_robot(client: InferenceClient) -> None:
    session = open_session(client, "left", client_id="first")
    client.close_session(session.session_id)
    client.close_session(session.session_id)
    open_session(client, "left", client_id="second")


def test_there_is_a_limit_to_sessions() -> None:
    with InProcessService(make_policy(), max_sessions=2) as service, InferenceClient(service.address) as client:
        open_session(client, "a")
        open_session(client, "b")
        with pytest.raises(Overloaded, match="the limit is 2") as refused:
            open_session(client, "c")
        assert refused.value.retry_after_s == pytest.approx(4.0)


def test_a_robot_that_sends_without_a_pause_is_read_no_faster_than_a_robot_observes(
    client: InferenceClient, service: InProcessService, caplog: pytest.LogCaptureFixture
) -> None:
    """Each of its requests takes time of the loop that all robots share."""
    session = open_session(client, "hasty")
    num = MAX_BURST + int(MAX_REQUESTS_HZ)
    requests = [inference_pb2.ActRequest(session_id=session.session_id, request_id=number + 1) for number in range(num)]
    with channel.connect(service.address) as raw:
        began_s = time.monotonic()
        answers = list(inference_pb2_grpc.InferenceServiceStub(raw).Act(iter(requests), timeout=30.0))
        took_s = time.monotonic() - began_s
    assert [answer.request_id for answer in answers] == list(range(1, num + 1))
    assert took_s >= 0.99
    assert caplog.text.count("hasty sends more than 200 requests a second (--max-requests-hz): they wait to be read") == 1
