"""The second copy of a served policy, in which a version is put together while the first one serves.

An engine's threads need the interpreter within a millisecond, so nothing here holds it for longer than a small piece takes:
no copy, no check and no allocation under it is as large as a tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import torch

from manyhands.weights.v1 import weights_pb2

from .models import AnyPolicy

# Small enough that a thread that stages weights never has the memory bus for long.
COPY_PIECE_ELEMENTS = 1 << 20


class Source(Protocol):
    """Whose tensors are whole, as their digests say, and finite; see WeightsBringer."""

    def fetch_into(
        self,
        entries: Iterable[weights_pb2.TensorEntry],
        place: Callable[[weights_pb2.TensorEntry], npt.NDArray[np.uint8]],
    ) -> Iterator[weights_pb2.TensorEntry]: ...


@dataclass(kw_only=True)
class Spare:
    """Attributes:
    policy: Nobody acts with it until it serves.
    digests: By tensor, the sha256 of what it holds; none of a tensor that holds nothing yet, or half of something.
    """

    policy: AnyPolicy
    digests: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, policy: AnyPolicy) -> Self:
        """The same module with weights that hold nothing yet: all of them are about to be written, by fill()."""
        empty = {id(tensor): _empty_like(tensor) for tensor in policy.state_dict(keep_vars=True).values()}
        return cls(policy=copy.deepcopy(policy, empty).eval())

    def fill(
        self,
        manifest: weights_pb2.Manifest,
        bringing: Source,
        *,
        live: AnyPolicy,
        live_digests: Mapping[str, bytes],
        check_going_on: Callable[[], None],
    ) -> None:
        """Makes this copy the version of manifest, whose tensors have the policy's names and forms.

        What the copy has stays, what the live policy has is copied, the rest is fetched. When it raises, what is whole is
        known by its digest, and the next fill() need not bring it again.

        Args:
            check_going_on: Called before each tensor; what it raises comes out.

        Raises:
            What bringing.fetch_into() raises.
        """
        targets = self.policy.state_dict()
        live_tensors = live.state_dict()
        live_by_digest = {digest: live_tensors[name] for name, digest in live_digests.items()}
        to_fetch = []
        for entry in manifest.tensors:
            if self.digests.get(entry.name) == entry.sha256:
                continue
            target, source = targets[entry.name], live_by_digest.get(entry.sha256)
            if source is None or source.shape != target.shape or source.dtype != target.dtype:
                to_fetch.append(entry)
                continue
            check_going_on()
            self.digests.pop(entry.name, None)  # Half a tensor is neither the old one nor the new one.
            _copy(target, source)
            self.digests[entry.name] = entry.sha256

        coming: dict[str, torch.Tensor] = {}

        def place(entry: weights_pb2.TensorEntry) -> npt.NDArray[np.uint8]:
            check_going_on()
            self.digests.pop(entry.name, None)
            target = targets[entry.name]
            # What is served on a device comes by way of the host.
            coming[entry.name] = target if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
            return _bytes_of(coming[entry.name])

        for entry in bringing.fetch_into(to_fetch, place):
            target, tensor = targets[entry.name], coming.pop(entry.name)
            if tensor is not target:
                _copy(target, tensor)
            self.digests[entry.name] = entry.sha256


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def _bytes_of(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """(N,), the memory of a contiguous tensor on the CPU."""
    array: npt.NDArray[np.uint8] = tensor.detach().view(-1).view(torch.uint8).numpy()
    return array


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """In pieces; both have the same shape and dtype."""
    flat_target, flat_source = target.detach().view(-1), source.detach().reshape(-1)
    for start in range(0, flat_target.numel(), COPY_PIECE_ELEMENTS):
        end = start + COPY_PIECE_ELEMENTS
        flat_target[start:end].copy_(flat_source[start:end])
