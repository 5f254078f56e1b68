"""The short way of a lone robot's pictures to the device, in memory that front end and engine share.

A row is told ahead while its pictures are decoded (EnginePort.expect). The engine may then launch what sees them, behind a
gate: the device waits there, with its work before it, until the front end has written the pictures and opens the gate. No
process has to wake up for that, and what a launch takes the host is over by then.

Gates are numbered in the order in which they are closed, and the memory says up to which number they are open.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from .engine_port import Model, Observed

_HEADER_BYTES = 64


def gate_bytes(models: Iterable[Model]) -> int:
    """Of a gate for the pictures of any of these."""
    return whole_pages(_HEADER_BYTES + max(_picture_bytes(model) for model in models))


def whole_pages(num_bytes: int) -> int:
    """As many as have room for num_bytes. A driver pins pages: a gate begins with one and ends with one."""
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


class PictureGate:
    """One side's view of it; both have the same.

    Args:
        offset: Where it begins in the memory, on a page.
        num_bytes: gate_bytes().

    Attributes:
        memory: (num_bytes,) uint8, all of it; it begins with the number, four bytes.
        pictures: (bytes,) uint8, one behind the other in the order of the model's spec.
    """

    def __init__(self, memory: mmap.mmap, offset: int, num_bytes: int) -> None:
        self.memory: npt.NDArray[np.uint8] = np.ndarray((num_bytes,), dtype=np.uint8, buffer=memory, offset=offset)
        self.pictures = self.memory[_HEADER_BYTES:]
        self._number = self.memory[:4].view(np.uint32)

    def write(self, model: Model, observed: Observed) -> bool:
        """Answers whether the observation has every picture; else what is written is not whole."""
        begin = 0
        for image in model.used_spec.images:
            picture = observed.observation.get(image.name)
            if picture is None:
                return False
            end = begin + picture.size
            self.pictures[begin:end].reshape(picture.shape)[...] = picture
            begin = end
        return True

    def open(self, number: int) -> None:
        """This gate and those before it."""
        self._number[0] = number

    def is_open(self, number: int) -> bool:
        return int(self._number[0]) >= number


def _picture_bytes(model: Model) -> int:
    return sum(math.prod(image.shape) for image in model.used_spec.images)
