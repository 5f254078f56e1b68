"""Memory in which a robot on the same machine leaves its pictures, one piece a session; docs/design/0021.

The server makes it and says where it is; a client never names a file. What a request says of it is a place and a size, which
are checked, and pixels are copied out before anything looks at them: a client that writes on changes nothing but its own
pictures.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from manyhands.common.v1 import common_pb2
from manyhands.errors import InvalidInput, NotOffered
from manyhands.inference.v1 import inference_pb2
from manyhands.shared_memory import HEADER_BYTES, MOST_BYTES, NAME, TOKEN_BYTES
from manyhands.spec import Feature, FeatureKind

from .picture_gate import whole_pages
from .shared_ring import grow_and_seal, make_memory

logger = logging.getLogger(__name__)

# One in flight, one that is being decoded, and one that is being written.
NUM_AREAS = 3
# Of all sessions. A page that was written, or read, is the server's.
MAX_BYTES_IN_ALL = 512 * 1024 * 1024


class SharedPictures:
    """Args:
        area_bytes: Of one observation's pictures.

    Attributes:
        num_bytes: Of all of it.

    Raises:
        NotOffered, OSError: There is no such memory here, or no room for it.
    """

    def __init__(self, area_bytes: int) -> None:
        self._area_bytes = area_bytes
        self.num_bytes = _num_bytes(area_bytes)
        self._token = secrets.token_bytes(TOKEN_BYTES)
        memory_fd = make_memory(NAME)
        try:
            self._memory = grow_and_seal(memory_fd, self.num_bytes)
        except OSError:
            os.close(memory_fd)
            raise
        self._memory_fd: int | None = memory_fd
        self._memory[: len(self._token)] = self._token
        self._bytes: npt.NDArray[np.uint8] | None = np.frombuffer(self._memory, dtype=np.uint8)

    @classmethod
    def of(cls, required: Sequence[Feature], left_bytes: int = MAX_BYTES_IN_ALL) -> SharedPictures | None:
        """For an observation of these features; None where there are no pictures, or no room for them.

        Args:
            left_bytes: Of MAX_BYTES_IN_ALL.
        """
        area_bytes = sum(math.prod(feature.shape) for feature in required if feature.kind is FeatureKind.IMAGE)
        if not area_bytes or _num_bytes(area_bytes) > min(MOST_BYTES, left_bytes):
            return None
        try:
            return cls(area_bytes)
        except (NotOffered, OSError) as error:  # Pictures come in messages then.
            logger.warning("no shared memory for a robot's pictures: %s", error)
            return None

    def told(self) -> inference_pb2.SharedMemory:
        """What the client needs to find it."""
        assert self._memory_fd is not None
        stride = whole_pages(self._area_bytes)
        return inference_pb2.SharedMemory(
            process_id=os.getpid(),
            descriptor=self._memory_fd,
            num_bytes=self.num_bytes,
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
        if height <= 0 or width <= 0 or offset < HEADER_BYTES or offset + size > self.num_bytes:
            raise InvalidInput(
                f"{height}x{width} pixels at {offset} are not within the session's shared memory, which has pictures from "
                f"{HEADER_BYTES} to {self.num_bytes}",
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


def _num_bytes(area_bytes: int) -> int:
    return HEADER_BYTES + NUM_AREAS * whole_pages(area_bytes)
