"""A client's end of the memory that a server on the same machine has made for its pictures; docs/design/0021."""

from __future__ import annotations

import logging
import mmap
import os
import threading
from pathlib import Path

from .common.v1 import common_pb2
from .inference.v1 import inference_pb2

logger = logging.getLogger(__name__)

# As the kernel shows it.
NAME = "manyhands-pictures"
# Pictures begin on a page.
HEADER_BYTES = 4096
_MOST_BYTES = 1 << 30


class SharedMemory:
    """Pictures of requests, an area each, until they are answered. Any thread."""

    def __init__(self, memory: mmap.mmap, told: inference_pb2.SharedMemory) -> None:
        self._memory = memory
        self._area_bytes = told.area_bytes
        self._lock = threading.Lock()
        self._free = list(told.areas)
        self._taken: dict[int, int] = {}

    @classmethod
    def find(cls, told: inference_pb2.SharedMemory) -> SharedMemory | None:
        """None where it is not to be found: another machine or another container, or somebody else's process."""
        path = Path(f"/proc/{told.process_id}/fd/{told.descriptor}")
        areas_end = max(told.areas, default=0) + told.area_bytes
        if told.area_bytes < 1 or min(told.areas, default=0) < HEADER_BYTES or areas_end > told.num_bytes <= _MOST_BYTES:
            return None
        try:
            # Before it is opened: it might be anything of any process that has this number here.
            if not str(path.readlink()).startswith(f"/memfd:{NAME}"):
                return None
            memory_fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if os.fstat(memory_fd).st_size != told.num_bytes:
                    return None
                memory = mmap.mmap(memory_fd, told.num_bytes)
            finally:
                os.close(memory_fd)
        except OSError as error:
            logger.debug("no shared memory at %s: %s", path, error)
            return None
        if not told.token or memory[: len(told.token)] != told.token:
            memory.close()
            return None
        return cls(memory, told)

    def place(self, request: inference_pb2.ActRequest) -> None:
        """Moves uncompressed pictures of a request there, while there is room; the others stay in the message."""
        pictures = [value for value in request.observation.values if _is_raw(value)]
        with self._lock:
            if not pictures or not self._free:
                return
            begin = self._taken[request.request_id] = self._free.pop()
        end = begin + self._area_bytes
        for value in pictures:
            data = value.image.data
            if begin + len(data) > end:
                continue
            self._memory[begin : begin + len(data)] = data
            request.shared_pictures.add(name=value.name, offset=begin)
            value.image.data = b""
            begin += len(data)

    def restart(self) -> None:
        """A stream begins: what others sent is given up."""
        with self._lock:
            self._free += self._taken.values()
            self._taken.clear()

    def answered(self, request_id: int) -> None:
        """Its area may be written again."""
        with self._lock:
            area = self._taken.pop(request_id, None)
            if area is not None:
                self._free.append(area)


def _is_raw(value: common_pb2.NamedValue) -> bool:
    return value.HasField("image") and value.image.encoding == common_pb2.IMAGE_ENCODING_RAW_RGB8 and bool(value.image.data)
