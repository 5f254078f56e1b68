"""What tests of weights under live control share: a weights service as a process, and publishing small policies to it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from deploy.local import Topology
from manyhands.clients.weights import WeightsClient
from manyhands.common.v1 import common_pb2
from policies import checkpoint
from policies.flow import FlowPolicy
from tests.support.inference_lab import SPEC


def start_weights(topology: Topology, folder: Path, address: str = "127.0.0.1:0") -> str:
    return topology.start("weights", ["weights", "--root", str(folder / "weights"), "--address", address]).address


def publish(learner: WeightsClient, policy: FlowPolicy, step: int, **changes: torch.Tensor) -> common_pb2.PolicyVersion:
    """Publishes policy's tensors as a version of "tiny", some of them changed."""
    return learner.publish(
        model="tiny",
        policy_type="flow",
        config_json=json.dumps(policy.config_dict()),
        spec=SPEC,
        tensors=checkpoint.to_wire({**policy.state_dict(), **changes}),
        publish_id=f"run/{step}",
    )
