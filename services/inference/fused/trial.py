"""A chunk by weights that are staged and do not serve yet, made beside those that do.

By the functions that graphs are captured from, called as they are, on the stream that versions come by and in a slot that no
robot has. A few layers at a time with a pause behind each: a robot's chunk waits for one piece at most, and a version that
is refused never was among what serves.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from .prefix_slices import PrefixPieces, planned
from .settings import Tokens
from .starts import ChunkStart
from .units import Units

# Each a third of a millisecond of an H200.
PREFIX_PIECES = 24
PAUSE_S = 0.002


@torch.inference_mode()
def staged_chunk(
    units: Units, pictures: torch.Tensor, tokens: Tokens, start: ChunkStart, steps: Sequence[int], *, length: int
) -> torch.Tensor:
    """(T, A) float32 on the host, after some of its Euler steps: what is no number in one of them stays none.

    Args:
        units: Those that serve.
        pictures: (I, 3, height, width) float32 in [-1, 1]; all cameras are there.
        length: That the prompt is padded to: one of those prepared, whose kernels are compiled.
    """
    device, slot = units.weights.device, units.slots.trial

    def numbers(values: object, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.as_tensor(values, dtype=dtype).to(device)[None]

    with units.weights.aside():
        tried = replace(units, weights=units.weights.staged())
        sizes = {"num_cameras": len(pictures), "longest_prompt": length}
        prefix = PrefixPieces(tried, **sizes)
        slots, padding = numbers(slot), [0] * (length - len(tokens))
        inputs = {
            "pictures": pictures,
            "slots": slots,
            "picture_valid": numbers([1] * len(pictures)),
            "tokens": numbers([*tokens, *padding]),
            "token_valid": numbers([1] * len(tokens) + padding),
        }
        is_finite = False
        try:
            for pieces in planned(tried.weights.config, **sizes, num_slices=PREFIX_PIECES):
                prefix.run(pieces, **inputs)
                _let_others(device)
            tried.begin(slots, numbers(start.num_clean), numbers(start.numbers, torch.float32))
            for step in steps:
                tried.expert_step(slots, numbers(step))
                _let_others(device)
            chunk = tried.slots.actions[slot].to("cpu", copy=True)
            is_finite = bool(chunk.isfinite().all())
        finally:
            if not is_finite:
                tried.slots.wipe(slot)
        return chunk


def _let_others(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    time.sleep(PAUSE_S)
