"""Brings a new version's tensors from host to device beside what runs there.

Copied as they are, 9 GB at once, they stop what serves: a copy from pageable memory holds the driver, new memory is mapped,
and a kernel over a gigabyte has the device for a millisecond. So they go in pieces, through memory that is pinned and kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

PIECE_BYTES = 16 * 2**20
# One is filled while the other travels.
_PIECES = 2


class Courier:
    """One thread at a time. On the CPU, and for what is on the device already, bring() is a copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type != "cuda":
            return
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._sent = [torch.cuda.Event() for _ in range(_PIECES)]  # type: ignore[no-untyped-call]
        self._pinned = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(_PIECES)]
        self._arrived = [torch.empty(PIECE_BYTES, dtype=torch.uint8, device=device) for _ in range(_PIECES)]

    @contextlib.contextmanager
    def journey(self) -> Iterator[None]:
        """Work inside runs on a stream of its own, behind what the current one has, and is done at the end."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def bring(self, tensor: torch.Tensor, into: torch.Tensor) -> None:
        """into.copy_(tensor), inside a journey(). into: As many numbers, in one piece; perhaps of another dtype."""
        source, target = tensor.detach().reshape(-1), into.view(-1)
        if self._stream is None or source.device.type == "cuda":
            target.copy_(source)
            return
        step = PIECE_BYTES // source.element_size()
        for number, begin in enumerate(range(0, source.numel(), step)):
            piece = source[begin : begin + step]
            at, num_bytes = number % _PIECES, piece.numel() * piece.element_size()
            self._sent[at].synchronize()
            pinned, arrived = (place[at][:num_bytes].view(piece.dtype) for place in (self._pinned, self._arrived))
            pinned.copy_(piece)
            arrived.copy_(pinned, non_blocking=True)
            target[begin : begin + step].copy_(arrived)
            self._sent[at].record(self._stream)
