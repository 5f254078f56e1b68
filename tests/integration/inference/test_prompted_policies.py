"""Small siblings of the large policies, with tokenizers, served by the real command: actions and text of one checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy.local import Topology
from manyhands.clients.inference import InferenceClient
from manyhands.errors import Refused
from manyhands.inference.v1 import inference_pb2
from policies import checkpoint
from policies.policy import TextKind, TextRequest
from tests.support import prompted_lab
from tests.support.inference_lab import ENVIRONMENT, RAW, next_chunk
from tests.support.prompted_lab import CPU, SPEC, sample

TYPES = ("pi052", "smolvla2", "pi05", "smolvla")
# The fused path adds in another order than the plain module.
FUSED_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("served")
    for policy_type in TYPES:
        checkpoint.save(prompted_lab.policy(policy_type, max_new_tokens=8), folder / policy_type)
    return folder


@pytest.fixture(scope="module")
def addresses(checkpoints: Path):
    """One process that serves all of them by name."""
    flags = [flag for policy_type in TYPES for flag in ("--model", f"{policy_type}={checkpoints / policy_type}")]
    with Topology(checkpoints / "logs", environment=ENVIRONMENT) as topology:
        yield topology.start("serve", ["serve", *flags, "--address", "127.0.0.1:0"]).address


@pytest.fixture(scope="module")
def fused_address(checkpoints: Path):
    """One that serves prepared units."""
    flags = [flag for policy_type in ("pi05", "pi052") for flag in ("--model", f"{policy_type}={checkpoints / policy_type}")]
    with Topology(checkpoints / "fused-logs", environment=ENVIRONMENT) as topology:
        yield topology.start("serve", ["serve", *flags, "--path", "fused", "--address", "127.0.0.1:0"]).address


@pytest.mark.parametrize("policy_type", TYPES)
def test_a_served_chunk_is_the_local_one(addresses, policy_type):
    policy = prompted_lab.policy(policy_type, max_new_tokens=8).eval()
    given = sample(subtask="")
    with InferenceClient(addresses) as client:
        session = client.open_session(
            robot_id=f"arm-{policy_type}", client_id="test", model=policy_type, spec=SPEC, replan_interval_steps=2
        )
        with client.act_stream(session.session_id) as stream:
            stream.send(observation=given.observation, task=given.task, noise_seed=5, image_encoding=RAW, deadline_s=20.0)
            chunk = next_chunk(stream)
    inputs = policy.preprocess([given], CPU)
    with torch.inference_mode():
        expected = policy.postprocess(policy.act(inputs, policy.draw_noise([5])), inputs)[0]
    assert np.array_equal(chunk.actions, expected)


@pytest.mark.parametrize("policy_type", ["pi052", "pi05"])
def test_robots_share_prepared_units_and_each_gets_its_own_chunk(fused_address, policy_type):
    policy = prompted_lab.policy(policy_type, max_new_tokens=8).eval()
    given = sample(subtask="")
    with InferenceClient(fused_address) as client, contextlib.ExitStack() as stack:
        streams = []
        for index in range(5):
            session = client.open_session(
                robot_id=f"{policy_type}-{index}", client_id="test", model=policy_type, spec=SPEC, replan_interval_steps=2
            )
            streams.append(stack.enter_context(client.act_stream(session.session_id)))
        for index, stream in enumerate(streams):
            stream.send(
                observation=given.observation, task=f"task {index}", noise_seed=index, image_encoding=RAW, deadline_s=20.0
            )
        chunks = [next_chunk(stream).actions for stream in streams]
    for index, chunk in enumerate(chunks):
        inputs = policy.preprocess([dataclasses.replace(given, task=f"task {index}")], CPU)
        with torch.inference_mode():
            expected = policy.postprocess(policy.act(inputs, policy.draw_noise([index])), inputs)[0]
        assert np.linalg.norm(chunk - expected) <= FUSED_TOLERANCE * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        (inference_pb2.TEXT_KIND_SUBTASK, TextRequest(kind=TextKind.SUBTASK, previous_text="grasp the cup")),
        (inference_pb2.TEXT_KIND_MEMORY, TextRequest(kind=TextKind.MEMORY, previous_text="grasped the cup")),
        (inference_pb2.TEXT_KIND_INTERJECTION, TextRequest(kind=TextKind.INTERJECTION, user_text="not that one")),
        (inference_pb2.TEXT_KIND_VISUAL_QUESTION, TextRequest(kind=TextKind.VISUAL_QUESTION, user_text="what is there")),
    ],
)
def test_text_of_the_fused_path_is_the_local_one(fused_address, kind, asked):
    policy = prompted_lab.policy("pi052", max_new_tokens=8).eval()
    given = sample(subtask="")
    with InferenceClient(fused_address) as client:
        session = client.open_session(
            robot_id=f"asks-{kind}", client_id="test", model="pi052", spec=SPEC, replan_interval_steps=2
        )
        answers = list(
            client.generate(
                session.session_id,
                kind=kind,
                observation=given.observation,
                task=given.task,
                user_text=asked.user_text,
                previous_text=asked.previous_text,
            )
        )
    assert answers[-1].full_text == "".join(policy.generate([given], asked, CPU))
    assert answers[-1].version.model == "pi052"


def test_a_model_without_a_fused_path_is_refused_at_the_start(checkpoints, tmp_path):
    with Topology(tmp_path, environment=ENVIRONMENT) as topology, pytest.raises(Refused):
        topology.start("serve", ["serve", "--model", f"small={checkpoints / 'smolvla2'}", "--path", "fused"])
    assert "serve it with --path plain" in (tmp_path / "serve.log").read_text()


@pytest.mark.parametrize("policy_type", ["pi052", "smolvla2"])
@pytest.mark.parametrize(
    ("kind", "local"),
    [
        (inference_pb2.TEXT_KIND_SUBTASK, TextKind.SUBTASK),
        (inference_pb2.TEXT_KIND_MEMORY, TextKind.MEMORY),
        (inference_pb2.TEXT_KIND_INTERJECTION, TextKind.INTERJECTION),
        (inference_pb2.TEXT_KIND_VISUAL_QUESTION, TextKind.VISUAL_QUESTION),
    ],
)
def test_served_text_is_the_local_one(addresses, policy_type, kind, local):
    policy = prompted_lab.policy(policy_type, max_new_tokens=8).eval()
    given = sample(subtask="")
    with InferenceClient(addresses) as client:
        session = client.open_session(
            robot_id=f"asks-{policy_type}-{kind}", client_id="test", model=policy_type, spec=SPEC, replan_interval_steps=2
        )
        assert session.has_text_head
        answers = list(
            client.generate(
                session.session_id, kind=kind, observation=given.observation, task=given.task, user_text="what is there"
            )
        )
    assert answers[-1].full_text
    request = TextRequest(kind=local, user_text="what is there")
    assert answers[-1].full_text == "".join(policy.generate([given], request, CPU))


@pytest.mark.parametrize("policy_type", ["pi05", "smolvla"])
def test_a_policy_without_a_text_head_says_so(addresses, policy_type):
    with InferenceClient(addresses) as client:
        session = client.open_session(
            robot_id=f"asks-{policy_type}", client_id="test", model=policy_type, spec=SPEC, replan_interval_steps=2
        )
        assert not session.has_text_head
        with pytest.raises(Refused, match="no text head"):
            list(
                client.generate(
                    session.session_id,
                    kind=inference_pb2.TEXT_KIND_SUBTASK,
                    observation=sample().observation,
                    task="tidy up",
                )
            )
