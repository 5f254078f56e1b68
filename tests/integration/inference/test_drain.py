"""A server that goes away answers what it was asked, says so to its robots and takes no new ones."""

from __future__ import annotations

import time

import numpy as np
import pytest

from manyhands.clients.act_stream import ActStream, Drain
from manyhands.clients.inference import InferenceClient
from manyhands.errors import Unreachable
from services.inference.service import DRAIN_S
from tests.support.inference_lab import (
    GatedPolicy,
    InProcessService,
    ask,
    local_chunk,
    make_observation,
    next_chunk,
    next_reply,
    open_session,
    shut_gate,
)
from tests.support.waiting import wait_until


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
