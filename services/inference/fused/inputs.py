"""What graphs read: for each bucket tensors at fixed places, filled from pinned memory by copies that nobody waits for.

Numbers that travel together lie one behind the other, so that one copy brings them.

Shapes: B rows, I cameras, P tokens of a camera, L prompt tokens, D width of the language tower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from policies.pi052.config import NetworkConfig

from .graphs import Uploads
from .settings import FusedSettings, Pictures, Tokens
from .starts import ChunkStart, num_numbers


class Inputs:
    """Args:
    scratch: The slot of rows that fill a bucket.
    dtype: Of what vision gives.
    """

    def __init__(
        self, config: NetworkConfig, settings: FusedSettings, *, scratch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._config = config
        self._settings = settings
        self._scratch = scratch
        self._dtype = dtype
        self._device = device
        most, cameras = max(settings.prefix_rows), settings.num_cameras
        widest = max(most, *settings.expert_rows, *settings.text_rows)
        of_prompts = most * (1 + cameras + 2 * max(settings.prompt_lengths))
        self._uploads = Uploads(device, max(2 * widest, of_prompts, settings.draft_length))
        self._numbers_of_start = num_numbers(settings.horizon, config.action_size)
        self._starts = Uploads(device, most * self._numbers_of_start, torch.float32, num_places=8)
        self.picture_shape = (config.image_height, config.image_width, 3)
        picture = math.prod(self.picture_shape)
        self._picture_bytes = Uploads(device, most * cameras * picture, torch.uint8, num_places=4)

    def of(self, name: str, rows: int, length: int) -> dict[str, torch.Tensor]:
        """New ones of a unit; length: of prompts, where it has any."""
        config, cameras, device = self._config, self._settings.num_cameras, self._device
        slots = torch.full((rows,), self._scratch, dtype=torch.int32, device=device)
        flags = torch.zeros(rows, dtype=torch.int32, device=device)
        picture_shape = (rows * cameras, 3, config.image_height, config.image_width)
        if name == "vision":
            return {"pictures": torch.zeros(picture_shape, device=device)}
        if name == "vision_of_bytes":
            return {"pictures": torch.zeros(rows * cameras, *self.picture_shape, dtype=torch.uint8, device=device)}
        if name == "begin":
            numbers = torch.zeros(rows, self._numbers_of_start, device=device)
            return {**self._slots_and("num_clean", rows), "numbers": numbers}
        if name == "expert_step":
            return self._slots_and("steps", rows)
        if name in ("first_text", "text_step"):
            return self._slots_and("flags", rows)
        if name == "check_draft":
            draft = torch.zeros(rows, self._settings.draft_length, dtype=torch.int32, device=device)
            return {"slots": slots, "flags": flags, "draft": draft}
        flat = torch.zeros(rows * (1 + cameras + 2 * length), dtype=torch.int32, device=device)
        sizes = [rows, rows * cameras, rows * length, rows * length]
        slots, picture_valid, tokens, token_valid = torch.split(flat, sizes)
        slots.fill_(self._scratch)
        prompt = {
            "slots": slots,
            "picture_valid": picture_valid.view(rows, cameras).fill_(1),
            "tokens": tokens.view(rows, length),
            "token_valid": token_valid.view(rows, length),
        }
        if name == "prefix_slices":
            return {"pictures": torch.zeros(picture_shape, device=device), **prompt}
        seen_shape = (rows, config.num_patches * cameras, config.language.width)
        return {"picture_tokens": torch.zeros(seen_shape, dtype=self._dtype, device=device), **prompt}

    def _slots_and(self, second: str, rows: int) -> dict[str, torch.Tensor]:
        both = torch.zeros(2 * rows, dtype=torch.int32, device=self._device)
        both[:rows] = self._scratch
        return {"slots": both[:rows], second: both[rows:]}

    def send_slots(self, slots: Sequence[int], into: torch.Tensor, seconds: Sequence[int] | None = None) -> None:
        """Slots, and what lies behind them where there are seconds, into tensors of of(); the rest is scratch and zeros."""
        num_rows = into.shape[0]
        spare = num_rows - len(slots)
        values = [*slots, *[self._scratch] * spare]
        if seconds is not None:
            values += [*seconds, *[0] * spare]
        self._uploads.send(values, into.as_strided((len(values),), (1,)))

    def send_starts(self, starts: Sequence[ChunkStart], into: torch.Tensor) -> None:
        """into: (B, numbers)."""
        place = self._starts.place()[: into.numel()].reshape(into.shape)
        for numbers, start in zip(place, starts, strict=True):
            numbers[...] = start.numbers
        self._starts.send_place(into)

    def send_pictures(self, pictures: Pictures, into: torch.Tensor) -> None:
        """into: (N, height, width, 3) uint8."""
        places = self._picture_bytes.place()[: into.numel()].reshape(into.shape)
        for place, picture in zip(places, pictures, strict=True):
            place[...] = 0 if picture is None else picture
        self._picture_bytes.send_place(into)

    def send_prompts(self, rows: Sequence[tuple[int, Sequence[bool], Tokens]], into: Mapping[str, torch.Tensor]) -> None:
        """Slots, valid cameras, tokens and valid tokens."""
        num_rows, length = into["tokens"].shape
        cameras = self._settings.num_cameras
        total = num_rows * (1 + cameras + 2 * length)
        place = self._uploads.place()[:total]
        slots, picture_valid, tokens, token_valid = np.split(
            place, np.cumsum([num_rows, num_rows * cameras, num_rows * length])
        )
        slots[:] = self._scratch
        picture_valid[:] = 1
        tokens[:] = 0
        token_valid[:] = 0
        for index, (slot, valid, prompt) in enumerate(rows):
            slots[index] = slot
            picture_valid[index * cameras : (index + 1) * cameras] = valid
            tokens[index * length :][: len(prompt)] = prompt
            token_valid[index * length :][: len(prompt)] = 1
        self._uploads.send_place(into["slots"].as_strided((total,), (1,)))

    def fill(self, values: Sequence[int], into: torch.Tensor, *, beyond: int) -> None:
        """beyond: What the rest becomes."""
        self._uploads.send([*values, *[beyond] * (into.shape[0] - len(values))], into)
