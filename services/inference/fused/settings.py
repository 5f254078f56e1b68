"""What a fused network is prepared for, and rows as it takes them.

Shapes: I cameras, P tokens of a camera, D width, T horizon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from policies import rtc, text

Tokens = Sequence[int] | npt.NDArray[np.integer]
# (height, width, 3) each; None: a missing one.
Pictures = Sequence[npt.NDArray[np.uint8] | None]


@dataclass(frozen=True, kw_only=True)
class FusedSettings:
    """Attributes:
    num_cameras: I, every prefix has as many; a missing one is masked.
    num_steps: Euler steps of a chunk.
    horizon: Actions of a chunk, T.
    num_slots: Rows in work at a time.
    max_text: Tokens decoded behind a prefix.
    prompt_lengths: Buckets; a prompt is padded to the next.
    prefix_rows, expert_rows, text_rows: Buckets of rows in one pass.
    prefix_slices: That a question's prefix comes in; None: each about as long as a text step; 0: there are no questions.
    questions_at_once: Amid their prefix, each with some 10 MB of its own.
    draft_length: Tokens of a draft checked in one pass; 0: no drafts.
    decoding: Which tokens are special or no text; the rest of it is a request's.
    max_guidance_weight: Of guided chunking.
    trained_max_delay: > 0: trained chunking, which keeps up to so many committed actions.
    schedule: Of guided chunking.
    pictures_fit: Whether pictures come as bytes in the network's size, for vision_of_bytes(); else as numbers, for vision().
    fp8: The MLPs of a prefix are multiplied in FP8, but for the last layer's: faster, and some percent from float32.
    """

    num_cameras: int
    num_steps: int = 10
    horizon: int = 50
    num_slots: int = 32
    max_text: int = 128
    prompt_lengths: tuple[int, ...] = (48, 96, 200)
    prefix_rows: tuple[int, ...] = (1, 2, 4)
    expert_rows: tuple[int, ...] = (1, 2, 4, 8, 16)
    text_rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    prefix_slices: int | None = None
    questions_at_once: int = 6
    draft_length: int = 0
    decoding: text.Decoding = field(default_factory=text.Decoding)
    max_guidance_weight: float = rtc.DEFAULT_MAX_GUIDANCE_WEIGHT
    trained_max_delay: int = 0
    schedule: rtc.PrefixSchedule = rtc.PrefixSchedule.LINEAR
    pictures_fit: bool = False
    fp8: bool = False


@dataclass(frozen=True, kw_only=True)
class PrefixRow:
    """Attributes:
    slot: Where it goes.
    picture_tokens: (I, P, D) or (I * P, D) of vision(), on the device.
    picture_valid: Per camera.
    tokens: Ids of the prompt.
    """

    slot: int
    picture_tokens: torch.Tensor
    picture_valid: Sequence[bool]
    tokens: Tokens


@dataclass(frozen=True, kw_only=True)
class TextRow:
    """Attributes:
    slot: Of the row.
    flags: units.TOO_SHORT while fewer than min_new_tokens came, units.NO_LOCATIONS for anything but visual questions.
    """

    slot: int
    flags: int
