"""Robots and the inference service over real sockets."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from manyhands import channel, codec, stamps
from manyhands.clients.inference import ActStream, Chunk, Drain, InferenceClient, Refusal, Reply
from manyhands.common.v1 import common_pb2
from manyhands.errors import AlreadyExists, Conflict, InvalidInput, NotFound, Overloaded, Refused, Unreachable
from manyhands.inference.v1 import inference_pb2, inference_pb2_grpc
from manyhands.spec import Spec
from services.inference.service import DRAIN_S
from tests.support.inference_lab import (
    ACTION_SIZE,
    CAMERA_SIZE,
    CAMERAS,
    HORIZON,
    SPEC,
    STATE_SIZE,
    GatedPolicy,
    InProcessService,
    TalkingPolicy,
    ask,
    local_chunk,
    make_observation,
    make_policy,
    next_chunk,
    next_refusal,
    next_reply,
    open_session,
)
from tests.support.waiting import wait_until


@pytest.fixture
def policy() -> GatedPolicy:
    made = make_policy(policy_class=GatedPolicy)
    assert isinstance(made, GatedPolicy)
    return made


@pytest.fixture
def service(policy: GatedPolicy) -> Iterator[InProcessService]:
    with InProcessService(policy, idle_timeout_s=0.5) as service:
        yield service


@pytest.fixture
def client(service: InProcessService) -> Iterator[InferenceClient]:
    with InferenceClient(service.address) as client:
        yield client


@pytest.fixture
def stream(client: InferenceClient) -> Iterator[ActStream]:
    with client.act_stream(open_session(client, "left").session_id) as stream:
        yield stream


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


def test_a_remote_chunk_is_the_local_one_bit_for_bit(stream: ActStream, policy: GatedPolicy) -> None:
    ask(stream, 7)
    first = next_chunk(stream)
    np.testing.assert_array_equal(first.actions, local_chunk(policy, make_observation(7), 7))
    assert first.actions.shape == (HORIZON, ACTION_SIZE)
    prefix = first.model_actions[2:]
    ask(stream, 8, committed_prefix=prefix, delay_steps=2, execution_horizon=5, current_index=2)
    guided = next_chunk(stream).actions
    expected = local_chunk(policy, make_observation(8), 8, prefix=prefix, delay_steps=2, execution_horizon=5)
    np.testing.assert_array_equal(guided, expected)
    assert not np.array_equal(guided, local_chunk(policy, make_observation(8), 8)), "the prefix did nothing"


def shut_gate(policy: GatedPolicy, stream: ActStream) -> None:
    """Has the model busy with a request of stream until the gate opens."""
    while policy.entered.acquire(blocking=False):
        pass
    policy.gate.clear()
    ask(stream, 0)
    assert policy.entered.acquire(timeout=20.0)


def test_rows_that_share_a_pass_get_the_bits_they_would_get_alone(
    service: InProcessService, client: InferenceClient, policy: GatedPolicy
) -> None:
    streams = [client.act_stream(open_session(client, f"robot{index}").session_id) for index in range(4)]
    shut_gate(policy, streams[0])
    for index in (1, 2, 3):
        ask(streams[index], 100 + index, task=f"task {index}")
    wait_until(lambda: service.engine.pending() == 3)
    policy.gate.set()
    next_chunk(streams[0])
    for index in (1, 2, 3):
        reply = next_reply(streams[index])
        assert reply.batch_size == 3
        assert isinstance(reply.result, Chunk)
        alone = local_chunk(policy, make_observation(100 + index), 100 + index, task=f"task {index}")
        np.testing.assert_array_equal(reply.result.actions, alone)
    for stream in streams:
        stream.close()


def test_many_robots_at_once_get_their_own_chunks(client: InferenceClient, policy: GatedPolicy) -> None:
    streams = {index: client.act_stream(open_session(client, f"robot{index}").session_id) for index in range(8)}
    for round_number in range(5):
        seeds = {index: 1000 * index + round_number for index in streams}
        ids = {index: ask(stream, seeds[index]) for index, stream in streams.items()}
        for index, stream in streams.items():
            reply = next_reply(stream)
            assert reply.request_id == ids[index]
            assert isinstance(reply.result, Chunk)
            expected = local_chunk(policy, make_observation(seeds[index]), seeds[index])
            np.testing.assert_array_equal(reply.result.actions, expected)
    for stream in streams.values():
        stream.close()


def test_the_newest_observation_of_a_robot_wins(
    service: InProcessService, client: InferenceClient, stream: ActStream, policy: GatedPolicy
) -> None:
    with client.act_stream(open_session(client, "other").session_id) as other:
        shut_gate(policy, other)
        ids = []
        for seed in (1, 2, 3):
            ids.append(ask(stream, seed))
            wait_until(lambda: service.engine.pending() == 1)
        refused = [next_reply(stream), next_reply(stream)]
        assert sorted(reply.request_id for reply in refused) == ids[:2]
        assert {reply.result.reason for reply in refused if isinstance(reply.result, Refusal)} == {"superseded"}
        policy.gate.set()
        reply = next_reply(stream)
        assert reply.request_id == ids[2]
        assert isinstance(reply.result, Chunk)
        np.testing.assert_array_equal(reply.result.actions, local_chunk(policy, make_observation(3), 3))


def test_what_cannot_be_in_time_is_refused(client: InferenceClient, stream: ActStream, policy: GatedPolicy) -> None:
    with client.act_stream(open_session(client, "other").session_id) as other:
        shut_gate(policy, other)
        ask(stream, 1, deadline_s=0.3)
        asked_s = time.monotonic()
        wait_until(lambda: time.monotonic() > asked_s + 0.4)
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


def good_request(seed: int = 1) -> inference_pb2.ActRequest:
    values = codec.encode_values(make_observation(seed), image_encoding=common_pb2.IMAGE_ENCODING_RAW_RGB8)
    return inference_pb2.ActRequest(
        observation=common_pb2.Observation(values=values),
        task="reach",
        deadline=stamps.to_duration(20.0),
        noise_seed=seed,
    )


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


def test_a_draining_server_answers_what_was_asked_and_refuses_new_robots(
    service: InProcessService, client: InferenceClient, stream: ActStream, policy: GatedPolicy
) -> None:
    session = open_session(client, "right")
    waiting = client.act_stream(session.session_id)
    shut_gate(policy, stream)
    ask(waiting, 2)
    wait_until(lambda: service.engine.pending() == 1)
    draining = service.start(service.servicer.drain())
    for each in (stream, waiting):
        result = next_reply(each).result
        assert isinstance(result, Drain)
        assert result.reconnect_after_s > 0
    with pytest.raises(Unreachable, match="goes away"):
        open_session(client, "new")
    policy.gate.set()
    next_chunk(stream)
    np.testing.assert_array_equal(next_chunk(waiting).actions, local_chunk(policy, make_observation(2), 2))
    stream.close()
    waiting.close()
    draining.result(10.0)


def test_a_draining_server_waits_for_a_slow_chunk_of_a_robot_that_stays(
    service: InProcessService, stream: ActStream, policy: GatedPolicy
) -> None:
    shut_gate(policy, stream)
    draining = service.start(service.servicer.drain())
    assert isinstance(next_reply(stream).result, Drain)
    until_s = time.monotonic() + DRAIN_S + 0.2
    wait_until(lambda: time.monotonic() > until_s)
    policy.gate.set()
    next_chunk(stream)
    with pytest.raises(Unreachable, match="ended the stream"):
        next_reply(stream)
    draining.result(10.0)


def test_a_client_that_has_ended_its_side_still_gets_its_chunk(
    service: InProcessService, client: InferenceClient, policy: GatedPolicy
) -> None:
    session = open_session(client, "left")
    request = good_request()
    request.session_id, request.request_id = session.session_id, 1
    with channel.connect(service.address) as raw:
        responses = list(inference_pb2_grpc.InferenceServiceStub(raw).Act(iter([request]), timeout=20.0))
    assert [response.WhichOneof("result") for response in responses] == ["chunk"]


def test_a_model_without_a_text_head_says_so(client: InferenceClient) -> None:
    session = open_session(client, "left")
    with pytest.raises(Refused, match="no text head"):
        list(
            client.generate(
                session.session_id,
                kind=inference_pb2.TEXT_KIND_SUBTASK,
                observation=make_observation(1),
                task="make coffee",
            )
        )


def test_text_comes_token_by_token() -> None:
    with (
        InProcessService(make_policy(policy_class=TalkingPolicy)) as service,
        InferenceClient(service.address) as client,
    ):
        session = open_session(client, "left")
        assert session.has_text_head
        answers = list(
            client.generate(
                session.session_id,
                kind=inference_pb2.TEXT_KIND_VISUAL_QUESTION,
                observation=make_observation(1),
                task="make coffee",
                user_text="what do you see",
                request_id="q1",
            )
        )
        assert [answer.text for answer in answers[:3]] == ["visual_question ", "make ", "coffee "]
        assert [answer.token_count for answer in answers] == [1, 2, 3, 4, 5, 6, 7, 7]
        assert answers[-1].finished
        assert answers[-1].full_text == "visual_question make coffee what do you see "
        assert {answer.request_id for answer in answers} == {"q1"}
        spoiled = make_observation(1)
        spoiled["observation.state"] = np.full(STATE_SIZE, np.inf, dtype=np.float32)
        with pytest.raises(InvalidInput) as refused:
            list(
                client.generate(
                    session.session_id, kind=inference_pb2.TEXT_KIND_SUBTASK, observation=spoiled, task="make coffee"
                )
            )
        assert refused.value.field == "observation.state"


def test_a_callback_stream_delivers_and_says_when_it_breaks(service: InProcessService, client: InferenceClient) -> None:
    replies: list[Reply] = []
    broken: list[Exception] = []
    session = open_session(client, "left")
    stream = client.act_stream(session.session_id, on_reply=replies.append, on_broken=broken.append)
    ids = [ask(stream, 1)]
    wait_until(lambda: len(replies) == 1)
    ids.append(ask(stream, 2))
    wait_until(lambda: len(replies) == 2)
    assert [reply.request_id for reply in replies] == ids
    client.close_session(session.session_id)
    wait_until(lambda: broken)
    assert isinstance(broken[0], NotFound)
    with pytest.raises(NotFound):
        ask(stream, 9)
    assert stream.broken is broken[0]


def test_status_names_stages_sessions_and_models(client: InferenceClient, stream: ActStream) -> None:
    for seed in range(5):
        ask(stream, seed)
        reply = next_reply(stream)
        assert reply.stage_s["total"] >= reply.stage_s["sample"] > 0
        assert reply.round_trip_s is not None
        assert reply.round_trip_s >= reply.stage_s["total"]
    status = client.status()
    assert status.chunk_count == 5
    assert [stage.stage for stage in status.stages] == ["decode", "queue", "prefix", "sample", "postprocess", "total"]
    (session,) = status.sessions
    assert (session.robot_id, session.chunk_count, session.connected) == ("left", 5, True)
    assert stamps.to_seconds(session.latency_p99) >= stamps.to_seconds(session.latency_p50) > 0
    assert status.models[0].name == "tiny"


def test_a_committed_prefix_of_nothing_is_no_prefix(stream: ActStream, policy: GatedPolicy) -> None:
    ask(stream, 4, committed_prefix=np.zeros((0, ACTION_SIZE), dtype=np.float32))
    np.testing.assert_array_equal(next_chunk(stream).actions, local_chunk(policy, make_observation(4), 4))
