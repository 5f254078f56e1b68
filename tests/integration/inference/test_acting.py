"""Observations become chunks: the bits of the local policy, whoever else is served, and the newest request first."""

from __future__ import annotations

import numpy as np
import pytest

from manyhands import channel, stamps
from manyhands.clients.act_stream import ActStream, Chunk, Refusal, Reply
from manyhands.clients.inference import InferenceClient
from manyhands.errors import NotFound
from manyhands.inference.v1 import inference_pb2_grpc
from services.inference.engine_port import Row
from tests.support.inference_lab import (
    ACTION_SIZE,
    HORIZON,
    GatedPolicy,
    InProcessService,
    ask,
    good_request,
    local_chunk,
    make_observation,
    next_chunk,
    next_reply,
    open_session,
    shut_gate,
)
from tests.support.waiting import wait_until


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


def test_a_committed_prefix_of_nothing_is_no_prefix(stream: ActStream, policy: GatedPolicy) -> None:
    ask(stream, 4, committed_prefix=np.zeros((0, ACTION_SIZE), dtype=np.float32))
    np.testing.assert_array_equal(next_chunk(stream).actions, local_chunk(policy, make_observation(4), 4))


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


def test_a_client_that_has_ended_its_side_still_gets_its_chunk(
    service: InProcessService, client: InferenceClient, policy: GatedPolicy
) -> None:
    session = open_session(client, "left")
    request = good_request()
    request.session_id, request.request_id = session.session_id, 1
    with channel.connect(service.address) as raw:
        responses = list(inference_pb2_grpc.InferenceServiceStub(raw).Act(iter([request]), timeout=20.0))
    assert [response.WhichOneof("result") for response in responses] == ["chunk"]


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


def test_the_engine_hears_of_a_row_while_its_pictures_are_decoded(
    service: InProcessService, stream: ActStream, policy: GatedPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, Row]] = []

    def expect(model: str, row: Row, *, with_gate: bool) -> int:
        told.append((model, row))
        return 0

    monkeypatch.setattr(service.engine, "expect", expect)
    ask(stream, 7, task="tidy up")
    np.testing.assert_array_equal(next_chunk(stream).actions, local_chunk(policy, make_observation(7), 7, task="tidy up"))
    ((model, row),) = told
    assert (model, row.seed, row.sample.task) == (service.servicer.sessions.get(stream.session_id).model, 7, "tidy up")
    assert {name: array.tolist() for name, array in row.sample.observation.items()} == {
        "observation.state": make_observation(7)["observation.state"].tolist()
    }
