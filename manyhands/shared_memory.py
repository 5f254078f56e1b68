"""A client's end of the memory that a server on the same machine has made for its pictures; docs/design/0021."""

from __future__ import annotations

import fcntl
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
TOKEN_BYTES = 16
# Of a session.
MOST_BYTES = 64 * 1024 * 1024


class SharedMemory:
    """Pictures of requests, an area each, until they are answered. One stream at a time has it; any thread."""

    def __init__(self, memory: mmap.mmap, told: inference_pb2.SharedMemory) -> None:
        self._memory = memory
        self._area_bytes = told.area_bytes
        self._lock = threading.Lock()
        self._is_used = False
        self._free = list(told.areas)
        self._taken: dict[int, int] = {}

    @classmethod
    def find(cls, told: inference_pb2.SharedMemory) -> SharedMemory | None:
        """None where it is not to be found, or cannot be trusted: another machine or container, somebody else's process."""
        areas_end = max(told.areas, default=0) + told.area_bytes
        is_sane = told.area_bytes > 0 and min(told.areas, default=0) >= HEADER_BYTES and areas_end <= told.num_bytes
        if not is_sane or told.num_bytes > MOST_BYTES:
            return None
        path = Path(f"/proc/{told.process_id}/fd/{told.descriptor}")
        try:
            # Before it is opened: it might be anything of any process that has this number here.
            if not str(path.readlink()).startswith(f"/memfd:{NAME}"):
                return None
            memory_fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                # Were it shrunk, whoever writes beyond would be killed by the kernel.
                is_sealed = fcntl.fcntl(memory_fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
                if not is_sealed or os.fstat(memory_fd).st_size != told.num_bytes:
                    return None
                memory = mmap.mmap(memory_fd, told.num_bytes)
            finally:
                os.close(memory_fd)
        except (OSError, ValueError) as error:
            logger.debug("no shared memory at %s: %s", path, error)
            return None
        if memory[:TOKEN_BYTES] != told.token:
            memory.close()
            return None
        return cls(memory, told)

    def take(self) -> bool:
        """For a stream, which gives it back; False where another one still has it."""
        with self._lock:
            was_used, self._is_used = self._is_used, True
            return not was_used

    def give_back(self) -> None:
        """The stream is over, and nobody hears what becomes of its requests."""
        with self._lock:
            self._is_used = False
            self._free += self._taken.values()
            self._taken.clear()

    def place(self, request: inference_pb2.ActRequest) -> inference_pb2.ActRequest:
        """The request with its uncompressed pictures there, while there is room; the others stay in the message."""
        if not any(map(_is_raw, request.observation.values)):
            return request
        with self._lock:
            if not self._free or request.request_id in self._taken:
                return request
            begin = self._taken[request.request_id] = self._free.pop()
        end = begin + self._area_bytes
        placed = inference_pb2.ActRequest()
        placed.CopyFrom(request)
        for value in filter(_is_raw, placed.observation.values):
            data = value.image.data  # Each read copies it: once.
            if not data or begin + len(data) > end:
                continue
            self._memory[begin : begin + len(data)] = data
            placed.shared_pictures.add(name=value.name, offset=begin)
            value.image.data = b""
            begin += len(data)
        return placed

    def answered(self, request_id: int) -> None:
        """Its area may be written again."""
        with self._lock:
            area = self._taken.pop(request_id, None)
            if area is not None:
                self._free.append(area)


def _is_raw(value: common_pb2.NamedValue) -> bool:
    return value.HasField("image") and value.image.encoding == common_pb2.IMAGE_ENCODING_RAW_RGB8
