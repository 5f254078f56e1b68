"""Pictures of one row that are seen ahead: launched behind a gate before they are there, taken when the row has come.

What was seen lies in memory that the next graph may use: it holds until another unit runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .graphs import GraphPool, Recorded


class Gate(Protocol):
    """What the device can be made to wait at; see DeviceGate."""

    def pictures(self, shape: torch.Size) -> torch.Tensor: ...
    def wait(self, number: int, now_s: float) -> None: ...
    def has_brought(self, number: int) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Attributes:
    tokens: (I, P, D).
    began: Recorded when the device began with the pictures; None on the CPU.
    """

    tokens: torch.Tensor
    began: Any


class VisionAhead:
    """Args:
    vision: The unit that sees the bytes of one row's pictures.
    """

    def __init__(self, gate: Gate, vision: Callable[[], Recorded[torch.Tensor]], pool: GraphPool) -> None:
        self._gate = gate
        self._vision = vision
        self._pool = pool
        self._number = 0
        self._num_runs = 0
        # Of what was launched last, on a device.
        self._began: Any = None
        self._ended: Any = None

    @torch.inference_mode()
    def launch(self, number: int) -> None:
        """Behind that gate; not while the device is still at the last: rows that never come must not fill it."""
        self._number = 0
        if self._ended is not None and not self._ended.query():
            return
        self._gate.wait(number, time.monotonic())
        if self._pool.stream is not None:  # Else there is no device that would wait.
            stream = torch.cuda.current_stream(self._pool.stream.device)
            self._began, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            self._began.record(stream)
            self._run()
            self._ended.record(stream)
        self._number = number

    @torch.inference_mode()
    def take(self, number: int) -> Seen | None:
        """What was seen behind a gate, once; None where that is not, or not any more, the row's pictures."""
        launched, self._number = self._number, 0
        if number != launched or not self._gate.has_brought(number):
            return None
        if self._pool.stream is None:
            self._run()
        if self._pool.num_runs != self._num_runs:
            return None
        return Seen(tokens=self._vision().outputs, began=self._began)

    def forget(self) -> None:
        """What was launched is not taken: weights changed."""
        self._number = 0

    def _run(self) -> None:
        vision = self._vision()
        into = vision.inputs["pictures"]
        into.copy_(self._gate.pictures(into.shape), non_blocking=True)
        vision.run()
        self._num_runs = self._pool.num_runs
