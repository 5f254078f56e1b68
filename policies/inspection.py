"""What a policy is made of and what it costs, for people: parameters by part, memory, the prompt of a sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from manyhands.spec import FeatureKind

from .policy import Policy, Sample

# Training: weights, gradients and AdamW's two moments in float32, and the averaged weights.
_BYTES_TRAINED = 4 + 4 + 8
_BYTES_AVERAGED = 4


@dataclass(frozen=True, kw_only=True)
class Part:
    """Attributes:
    parameters, trained: Numbers, and how many of them train.
    num_bytes: In the precision they are kept in.
    dtypes: Names, in alphabetical order.
    """

    name: str
    parameters: int
    trained: int
    num_bytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the device, without activations, which depend on the batch and on what is recomputed.

    Attributes:
        weights: To serve.
        per_robot: On top, for each row in a pass: what its prefix keeps.
        training: Weights, gradients and optimiser of what trains in float32, the rest as it is, and averaged weights.
    """

    weights: int
    per_robot: int
    training: int


def parts(policy: Policy[Any]) -> list[Part]:
    """In the order of the module; a policy's network is shown by its own parts."""
    return [_part(name, module) for name, module in _modules(policy) if any(True for _ in module.parameters())]


def memory(policy: Policy[Any]) -> Memory:
    found = parts(policy)
    trained = sum(part.trained for part in found)
    weights = sum(part.num_bytes for part in found)
    frozen = sum(
        parameter.numel() * parameter.element_size() for parameter in policy.parameters() if not parameter.requires_grad
    )
    averaged = _BYTES_AVERAGED * sum(part.parameters for part in found)
    return Memory(weights=weights, per_robot=policy.prefix_bytes(), training=trained * _BYTES_TRAINED + frozen + averaged)


def example_sample(policy: Policy[Any], *, task: str, annotations: dict[str, Any] | None = None) -> Sample:
    """Zeros for numbers, grey pictures, the given words."""
    observation: dict[str, np.typing.NDArray[np.generic]] = {
        feature.name: np.full(feature.shape, 127 if feature.kind is FeatureKind.IMAGE else 0, dtype=feature.dtype)
        for feature in policy.spec.observation
    }
    actions = np.zeros((policy.horizon, sum(feature.shape[0] for feature in policy.spec.action)), dtype=np.float32)
    return Sample(observation=observation, task=task, actions=actions, annotations=annotations)


def _modules(policy: Policy[Any]) -> Iterator[tuple[str, nn.Module]]:
    for name, module in policy.named_children():
        if name == "network":
            yield from module.named_children()
        else:
            yield name, module


def _part(name: str, module: nn.Module) -> Part:
    tensors: list[torch.nn.Parameter] = list(module.parameters())
    return Part(
        name=name,
        parameters=sum(tensor.numel() for tensor in tensors),
        trained=sum(tensor.numel() for tensor in tensors if tensor.requires_grad),
        num_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
    )
