"""What is served: a policy, its version, and how another version's tensors get into it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from manyhands import weights_manifest
from manyhands.common.v1 import common_pb2
from manyhands.errors import Refused
from manyhands.spec import FeatureKind, Spec
from manyhands.weights.v1 import weights_pb2
from policies import checkpoint
from policies.policy import Policy

from .engine_port import Observed

AnyPolicy = Policy[Any]


class ServedModel:
    """A policy under its name in the server's list.

    policy and version change together, in replace(), which the engine's thread calls between two passes. Readers on other
    threads borrow() the policy, so that new weights are not staged in it meanwhile.
    """

    def __init__(self, name: str, policy: AnyPolicy) -> None:
        manifest = weights_manifest.build(
            model=name,
            policy_type=policy.type_name,
            config_json=json.dumps(policy.config_dict()),
            spec=policy.spec,
            tensors=checkpoint.as_wire(policy.state_dict()),
            publish_id="start",
        )
        self.name = name
        self.policy = policy.eval()
        self.version = common_pb2.PolicyVersion(model=name, number=0, digest=weights_manifest.digest(manifest))
        self.digests = {entry.name: entry.sha256 for entry in manifest.tensors}
        self.forms = {entry.name: (entry.dtype, tuple(entry.shape)) for entry in manifest.tensors}
        self.parameter_count = sum(parameter.numel() for parameter in policy.parameters())
        # Features that the policy reads; the rest of its spec need not be sent.
        used = policy.used_observations()
        self.used_spec = Spec(
            observation=tuple(feature for feature in policy.spec.observation if feature.name in used),
            action=policy.spec.action,
            control_rate_hz=policy.spec.control_rate_hz,
        )
        # What sessions are held to; the same for every version.
        self.type_name = policy.type_name
        self.spec = policy.spec
        self.horizon = policy.horizon
        self.model_action_size = policy.model_action_size
        self.has_text_head = policy.has_text_head
        self.masks_missing_cameras = policy.masks_missing_cameras
        self._borrowers: dict[int, int] = {}
        self._returned = threading.Condition()

    def replace(self, policy: AnyPolicy, version: common_pb2.PolicyVersion, digests: Mapping[str, bytes]) -> AnyPolicy:
        """The engine's thread only, between passes. Answers the module that is free now."""
        with self._returned:
            previous, self.policy = self.policy, policy
            self.version = version
            self.digests = dict(digests)
            return previous

    @contextlib.contextmanager
    def borrow(self) -> Iterator[tuple[AnyPolicy, common_pb2.PolicyVersion]]:
        with self._returned:
            policy, version = self.policy, self.version
            self._borrowers[id(policy)] = self._borrowers.get(id(policy), 0) + 1
        try:
            yield policy, version
        finally:
            with self._returned:
                self._borrowers[id(policy)] -= 1
                self._returned.notify_all()

    def wait_until_returned(self, policy: AnyPolicy, timeout_s: float) -> bool:
        with self._returned:
            return self._returned.wait_for(lambda: not self._borrowers.get(id(policy)), timeout_s)


def check_fits(served: ServedModel, manifest: weights_pb2.Manifest) -> None:
    """Raises Refused, naming what differs, unless manifest has the served policy's type, configuration and tensors."""
    policy = served.policy
    if manifest.policy_type != policy.type_name:
        raise Refused(f"is {manifest.policy_type!r}, {policy.type_name!r} is served", field="policy_type")
    if json.loads(manifest.config_json) != json.loads(json.dumps(policy.config_dict())):
        raise Refused("differs from the served policy's; serve the version as a model of its own", field="config_json")
    if manifest.HasField("spec") and manifest.spec.digest != policy.spec.digest:
        raise Refused("differs from the served policy's; serve the version as a model of its own", field="spec")
    offered = {entry.name: (entry.dtype, tuple(entry.shape)) for entry in manifest.tensors}
    for name, form in served.forms.items():
        if name not in offered:
            raise Refused("is missing in the version", field=name)
        if offered[name] != form:
            raise Refused(f"has (data type, shape) {offered[name]}, the served policy {form}", field=name)
    for name in offered:
        if name not in served.forms:
            raise Refused("is not a tensor of the served policy", field=name)


def canary_sample(spec: Spec) -> Observed:
    """Zeros for the state, mid grey for the cameras."""
    observation: dict[str, npt.NDArray[np.generic]] = {}
    for feature in spec.observation:
        fill = 127 if feature.kind is FeatureKind.IMAGE else 0
        observation[feature.name] = np.full(feature.shape, fill, dtype=feature.dtype)
    return Observed(observation=observation, task="canary")
