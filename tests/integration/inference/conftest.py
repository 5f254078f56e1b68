"""A small policy behind a gate, served in this process on a real socket; a client of it, and the robot "left"'s stream."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from manyhands.clients.act_stream import ActStream
from manyhands.clients.inference import InferenceClient
from tests.support.inference_lab import GatedPolicy, InProcessService, make_policy, open_session


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
