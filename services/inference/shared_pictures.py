"""Memory in which a robot on the same machine leaves its pictures, one piece a session; docs/design/0021.

The server makes it and says where it is; a client never names a file. What a request says of it is a place and a size, which
are checked, and pixels are copied out before anything looks at them: a client that writes on changes nothing but its own
pictures.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from manyhands.common.v1 import common_pb2
from manyhands.errors import InvalidInput, NotOffered
from manyhands.inference.v1 import inference_pb2
from manyhands.shared_memory import HEADER_BYTES, NAME
from manyhands.spec import Feature, FeatureKind

from .shared_ring import grow_and_seal, make_memory

# One in flight, one that is being decoded, and one that is being written.
NUM_AREAS = 3
# Three of four 4K cameras would be more; such a robot sends them encoded.
MAX_BYTES = 64 * 1024 * 1024
_PAGE = 4096


class SharedPictures:
    """Args:
    area_bytes: Of one observation's pictures.
    """

    def __init__(self, area_bytes: int) -> None:
        self._area_bytes = area_bytes
        self._num_bytes = _num_bytes(area_bytes)
        self._token = secrets.token_bytes(16)
        self._memory_fd: int | None = make_memory(NAME)
        self._memory = grow_and_seal(self._memory_fd, self._num_bytes)
        self._memory[: len(self._token)] = self._token
        self._bytes: npt.NDArray[np.uint8] | None = np.frombuffer(self._memory, dtype=np.uint8)

    @classmethod
    def of(cls, required: Sequence[Feature]) -> SharedPictures | None:
        """For an observation of these features; None where there are no pictures, too many, or no such memory here."""
        area_bytes = sum(math.prod(feature.shape) for feature in required if feature.kind is FeatureKind.IMAGE)
        if not area_bytes or _num_bytes(area_bytes) > MAX_BYTES:
            return None
        try:
            return cls(area_bytes)
        except NotOffered:
            return None

    def told(self) -> inference_pb2.SharedMemory:
        """What the client needs to find it."""
        assert self._memory_fd is not None
        stride = _stride(self._area_bytes)
        return inference_pb2.SharedMemory(
            process_id=os.getpid(),
            descriptor=self._memory_fd,
            num_bytes=self._num_bytes,
            token=self._token,
            area_bytes=self._area_bytes,
            areas=[HEADER_BYTES + number * stride for number in range(NUM_AREAS)],
        )

    def picture(self, image: common_pb2.Image, offset: int, *, field: str) -> npt.NDArray[np.uint8]:
        """(height, width, 3), a copy. Raises InvalidInput for a place or a size that cannot be."""
        if image.encoding != common_pb2.IMAGE_ENCODING_RAW_RGB8 or image.data:
            raise InvalidInput("lies in shared memory and must be RAW_RGB8 without data", field=field)
        height, width = image.height, image.width
        size = height * width * 3
        if height <= 0 or width <= 0 or offset < HEADER_BYTES or offset + size > self._num_bytes:
            raise InvalidInput(
                f"{height}x{width} pixels at {offset} are not within the session's shared memory, which has pictures from "
                f"{HEADER_BYTES} to {self._num_bytes}",
                field=field,
            )
        pixels = self._bytes
        if pixels is None:
            raise InvalidInput("the session has ended", field=field)
        return pixels[offset : offset + size].reshape(height, width, 3).copy()

    def close(self) -> None:
        """Gives it back, also where somebody still holds this object: a stream that has ended."""
        memory_fd, self._memory_fd = self._memory_fd, None
        if memory_fd is None:
            return
        os.close(memory_fd)
        self._bytes = None
        with contextlib.suppress(BufferError):  # A thread is copying a picture: freed with what it holds.
            self._memory.close()


def _stride(area_bytes: int) -> int:
    return -(-area_bytes // _PAGE) * _PAGE


def _num_bytes(area_bytes: int) -> int:
    return HEADER_BYTES + NUM_AREAS * _stride(area_bytes)
