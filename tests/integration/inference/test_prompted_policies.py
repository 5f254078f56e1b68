"""Small siblings of the large policies, with tokenizers, served by the real command: actions and text of one checkpoint."""

from __future__ import annotations

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


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory):
    """One process that serves all of them by name."""
    folder: Path = tmp_path_factory.mktemp("served")
    flags = []
    for policy_type in TYPES:
        checkpoint.save(prompted_lab.policy(policy_type, max_new_tokens=8), folder / policy_type)
        flags += ["--model", f"{policy_type}={folder / policy_type}"]
    with Topology(folder / "logs", environment=ENVIRONMENT) as topology:
        yield topology.start("serve", ["serve", *flags, "--address", "127.0.0.1:0"]).address


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


@pytest.mark.parametrize("policy_type", ["pi052", "smolvla2"])
@pytest.mark.parametrize(
    ("kind", "local"),
    [
        (inference_pb2.TEXT_KIND_SUBTASK, TextKind.SUBTASK),
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
