"""New weights into prepared units, under robots that act: accepted, refused, taken back."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy.local import Topology
from manyhands.clients.act_stream import Chunk
from manyhands.clients.inference import InferenceClient
from manyhands.clients.weights import WeightsClient
from manyhands.errors import Refused
from policies import checkpoint
from tests.support import prompted_lab
from tests.support.inference_lab import ENVIRONMENT, RAW, next_reply
from tests.support.prompted_lab import CPU, SPEC, sample
from tests.support.weights_lab import start_weights

TOLERANCE = 1e-5


def make_policy(seed):
    policy = prompted_lab.policy("pi052", max_new_tokens=4).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return policy


def publish(learner, policy, step, **changes):
    return learner.publish(
        model="pi052",
        policy_type="pi052",
        config_json=json.dumps(policy.config_dict()),
        spec=SPEC,
        tensors=checkpoint.to_wire({**policy.state_dict(), **changes}),
        publish_id=f"run/{step}",
    )


def chunk_of(policy, seed):
    given = sample(subtask="")
    inputs = policy.preprocess([given], CPU)
    with torch.inference_mode():
        return policy.postprocess(policy.act(inputs, policy.draw_noise([seed])), inputs)[0]


class Robot:
    """Asks again after each answer, and keeps every reply by its seed."""

    def __init__(self, client, name):
        self._session = client.open_session(
            robot_id=name, client_id="test", model="pi052", spec=SPEC, replan_interval_steps=2
        )
        self._client = client
        self._stop = threading.Event()
        self.replies = {}
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        given = sample(subtask="")
        with self._client.act_stream(self._session.session_id) as stream:
            seed = 0
            while not self._stop.wait(0.02):
                seed += 1
                stream.send(
                    observation=given.observation, task=given.task, noise_seed=seed, image_encoding=RAW, deadline_s=20.0
                )
                self.replies[seed] = next_reply(stream)

    def stop(self):
        self._stop.set()
        self._thread.join(20.0)


def test_versions_change_under_robots_and_a_bad_one_never_serves(tmp_path: Path) -> None:
    policies = {number: make_policy(number) for number in range(3)}
    checkpoint.save(policies[0], tmp_path / "start")
    with Topology(tmp_path / "logs", environment=ENVIRONMENT) as topology:
        weights = start_weights(topology, tmp_path)
        flags = ["--model", f"pi052={tmp_path / 'start'}", "--path", "fused", "--weights", weights]
        address = topology.start("serve", ["serve", *flags, "--address", "127.0.0.1:0"]).address
        with InferenceClient(address) as client, WeightsClient(weights) as learner:
            robots = [Robot(client, f"robot {index}") for index in range(3)]
            try:
                assert publish(learner, policies[1], 1).number == 1
                assert client.swap_weights("pi052", 1).current.number == 1
                assert publish(learner, policies[2], 2).number == 2
                assert client.swap_weights("pi052", 2).current.number == 2
                # Finite weights whose chunk is not.
                huge = torch.full_like(policies[2].network.action_out.weight, 3e38)
                publish(learner, policies[2], 3, **{"network.action_out.weight": huge})
                with pytest.raises(Refused, match="canary"):
                    client.swap_weights("pi052", 3)
                assert client.swap_weights("pi052", 1).current.number == 1  # Back.
            finally:
                for robot in robots:
                    robot.stop()
            swaps = client.status().swaps
    assert [(swap.version.number, swap.accepted) for swap in swaps] == [(1, True), (2, True), (3, False), (1, True)]
    seen = set()
    for robot in robots:
        for seed, reply in robot.replies.items():
            assert isinstance(reply.result, Chunk), reply.result
            number = reply.version.number
            seen.add(number)
            expected = chunk_of(policies[number], seed)
            assert np.linalg.norm(reply.result.actions - expected) <= TOLERANCE * np.linalg.norm(expected)
    assert seen == {0, 1, 2}
