"""SIGTERM while weights are on their way in, on either path: nothing half swapped, nobody waits, no process is left."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deploy.local import Topology
from manyhands.clients.inference import InferenceClient
from manyhands.clients.weights import WeightsClient
from manyhands.errors import Cancelled
from policies import checkpoint
from tests.support import fault_lab
from tests.support.fault_lab import Lab, Robot, chunk_policy, engine_of
from tests.support.inference_lab import ENVIRONMENT
from tests.support.waiting import wait_until
from tests.support.weights_lab import start_weights


@pytest.fixture
def topology(tmp_path: Path) -> Iterator[Topology]:
    with Topology(tmp_path / "logs", environment=ENVIRONMENT) as topology:
        yield topology


def publish(address: str, lab: Lab, number: int) -> None:
    """The served model's weights, all a little larger."""
    policy = chunk_policy(lab.path)
    scaled = {
        name: tensor * (1 + 0.001 * number) if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() else tensor
        for name, tensor in policy.state_dict().items()
    }
    with WeightsClient(address) as learner:
        learner.publish(
            model=lab.model,
            policy_type="flow" if lab.path == "plain" else "pi052",
            config_json=json.dumps(policy.config_dict()),
            spec=lab.spec,
            tensors=checkpoint.to_wire(scaled),
            publish_id=f"run/{number}",
        )


@pytest.mark.parametrize("path", fault_lab.PATHS)
def test_a_swap_during_shutdown_ends_cleanly(topology: Topology, tmp_path: Path, checkpoints: Path, path: str) -> None:
    weights = start_weights(topology, tmp_path)
    lab = fault_lab.serve(topology, checkpoints, path, "--weights", weights)
    outcomes: list[object] = []
    with InferenceClient(lab.address) as client:
        publish(weights, lab, 1)
        assert client.swap_weights(lab.model, 1).current.number == 1
        publish(weights, lab, 2)
        # The swap waits for a weights service that says nothing.
        topology.services["weights"].process.send_signal(signal.SIGSTOP)

        def swap() -> None:
            try:
                outcomes.append(client.swap_weights(lab.model, 2))
            except Exception as error:
                outcomes.append(error)

        swapping = threading.Thread(target=swap)
        swapping.start()
        robot = Robot(lab, client, "left")
        wait_until(lambda: robot.chunks_since(0) > 5)
        assert outcomes == []
        engine = engine_of(lab.service)
        lab.service.process.send_signal(signal.SIGTERM)
        told_s = time.monotonic()
        assert lab.service.process.wait(10.0) == 0
        assert time.monotonic() - told_s < 5.0
        assert engine is not None
        wait_until(lambda: not engine.is_running(), timeout_s=2.0)
        swapping.join(10.0)
        topology.services["weights"].process.send_signal(signal.SIGCONT)
        robot.thread.join(10.0)
    (outcome,) = outcomes
    assert isinstance(outcome, Cancelled), outcome
    assert "nothing was changed" in str(outcome)
    assert {reply.version.number for reply in robot.replies if reply.version.model} == {1}
    assert "Traceback" not in lab.service.log_path.read_text()
