"""A fused model's pictures, from what a request brings to what vision made of them.

They are seen with their row, or ahead of it behind a gate, or not again: what a chunk's pictures were seen as is kept for
questions about the same ones.

Shapes: I cameras, P tokens of a camera, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from policies import images
from policies.pi052.policy import Pi052Policy
from policies.policy import Sample

from .device_gate import DeviceGate
from .fused.kept_vision import KeptVision
from .fused.network import FusedPi052
from .fused.settings import Pictures
from .fused.vision_ahead import VisionAhead
from .rows_in_work import ChunkRow

# Observations whose pictures are kept as they were seen, of full size 3 MB each on the device: two of each of 32 robots.
MAX_KEPT = 64


class FusedPictures:
    """Args:
    policy: Its cameras and the network's size hold for all versions.
    keeps: Whether there may be questions.
    """

    def __init__(self, fused: FusedPi052, policy: Pi052Policy, *, keeps: bool) -> None:
        self._fused = fused
        self._cameras = tuple(policy.cameras)
        network = policy.config.network
        self._size = (network.image_height, network.image_width)
        tokens_shape = (len(self._cameras) * network.num_patches, network.language.width)
        num_kept = MAX_KEPT if keeps else 0
        self._kept = KeptVision(num_kept, tokens_shape, dtype=fused.weights.dtype, device=fused.device)
        self._ahead: VisionAhead | None = None

    # -- any thread ----------------------------------------------------------------------------------------------------

    def of(self, sample: Sample) -> list[npt.NDArray[np.uint8] | None]:
        """I, None for a camera that is missing; InvalidInput for what is no picture."""
        found: list[npt.NDArray[np.uint8] | None] = []
        for name in self._cameras:
            picture = sample.observation.get(name)
            found.append(None if picture is None else images.check(picture, field=name))
        return found

    def on_device(self, pictures: Pictures) -> torch.Tensor:
        """(I, 3, height, width) float32 in [-1, 1]; bytes travel, numbers are made where they are needed."""
        return torch.stack([self._on_device(picture) for picture in pictures])

    # -- the engine's thread -------------------------------------------------------------------------------------------

    def use_gate(self, gate: DeviceGate) -> None:
        """Makes see_ahead() do something."""
        self._ahead = self._fused.vision_ahead(gate)

    def see_ahead(self, gate: int) -> None:
        """Has the device wait at that gate for the pictures of the row that is told ahead, and see them."""
        if self._ahead is not None:
            self._ahead.launch(gate)

    def see(self, rows: Sequence[ChunkRow]) -> tuple[torch.Tensor, Any]:
        """Of all rows one behind the other (B * I, P, D), holding until the next unit; and what was recorded when the
        device began, where it saw them ahead, else None."""
        if len(rows) == 1 and self._ahead is not None:
            seen = self._ahead.take(rows[0].gate)
            if seen is not None:
                return seen.tokens, seen.began
        fitting = self.fitting([picture for row in rows for picture in row.pictures])
        fused = self._fused
        return (fused.vision(fitting) if isinstance(fitting, torch.Tensor) else fused.vision_of_bytes(fitting)), None

    def fitting(self, pictures: Pictures) -> torch.Tensor | Pictures:
        """As the network takes them: bytes of its size, or on_device()."""
        return pictures if self._fused.settings.pictures_fit else self.on_device(pictures)

    def keep(self, rows: Sequence[ChunkRow], seen: torch.Tensor) -> None:
        """seen: (B, I * P, D)."""
        for row, tokens in zip(rows, seen, strict=True):
            self._kept.keep(row.owner, row.pictures, tokens)

    def find(self, owner: str, pictures: Pictures) -> torch.Tensor | None:
        """See KeptVision."""
        return self._kept.find(owner, pictures)

    def forget(self) -> None:
        """Weights changed."""
        self._kept.forget()
        if self._ahead is not None:
            self._ahead.forget()

    def _on_device(self, picture: npt.NDArray[np.uint8] | None) -> torch.Tensor:
        device = self._fused.device
        if picture is None:
            return torch.full((3, *self._size), images.MISSING_VALUE, device=device)
        there = torch.from_numpy(np.ascontiguousarray(picture)).to(device, non_blocking=True)
        floats = there.permute(2, 0, 1)[None].float() / 255.0
        return images.resize_with_padding(floats, *self._size, images.Padding.CENTRED)[0] * 2.0 - 1.0


def pictures_fit(policy: Pi052Policy) -> bool:
    """Whether every camera has the network's size."""
    network = policy.config.network
    sizes = {feature.shape[:2] for feature in policy.spec.images}
    return sizes == {(network.image_height, network.image_width)}
