"""An append-only file of checked records: what the store logs episodes with and an actor spools with.

Each record is length (uint32, little-endian), CRC-32 over length and payload (uint32), payload. A process killed at any
point leaves whole records and at most one torn one at the end; opening the file for writing cuts that off.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import Corrupt, InvalidInput

_HEADER = struct.Struct("<II")
_LENGTH = struct.Struct("<I")
HEADER_BYTES = _HEADER.size
# A frame may carry several raw cameras; a torn length field must not make a reader allocate gigabytes.
MAX_RECORD_BYTES = 256 * 1024 * 1024


class LogWriter:
    """Appends records to one file. Not thread-safe: one writer, one thread at a time; sync() may run beside append().

    Attributes:
        size_bytes: Length of the file: all whole records, the first ones durable after sync().
        num_records: Records in the file, those found at opening included.
    """

    def __init__(self, path: Path) -> None:
        """Opens or creates path; a torn record at its end is cut off."""
        self.path = Path(path)
        self.num_records = 0
        self.size_bytes = 0
        existed = self.path.exists()
        if existed:
            with self.path.open("rb") as file:
                for length in _record_lengths(file):
                    self.num_records += 1
                    self.size_bytes += HEADER_BYTES + length
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._broken = False
        # What was there at opening counts as durable only after the first sync.
        self._durable_bytes = 0
        try:
            os.ftruncate(self._fd, self.size_bytes)
            os.lseek(self._fd, self.size_bytes, os.SEEK_SET)
            if not existed:
                fsync_directory(self.path.parent)
        except OSError:
            os.close(self._fd)
            raise

    def append(self, payload: bytes) -> None:
        """Adds one record; it is durable only after the next sync().

        Raises:
            InvalidInput: The payload is over MAX_RECORD_BYTES.
            OSError: The record could not be written whole (no space, say). The file then ends where it did before, and
                append may be tried again.
            Corrupt: An earlier failure left the file in an unknown state; open it again.
        """
        if len(payload) > MAX_RECORD_BYTES:
            raise InvalidInput(f"a record of {len(payload)} bytes is over the limit of {MAX_RECORD_BYTES}", field="payload")
        self._check_usable()
        length = _LENGTH.pack(len(payload))
        crc = zlib.crc32(payload, zlib.crc32(length))
        parts: list[bytes | memoryview] = [_HEADER.pack(len(payload), crc), payload]
        try:
            remaining = HEADER_BYTES + len(payload)
            while True:
                written = os.writev(self._fd, parts)
                remaining -= written
                if not remaining:
                    break
                parts = _skip(parts, written)
        except OSError:
            self._cut_back()
            raise
        self.size_bytes += HEADER_BYTES + len(payload)
        self.num_records += 1

    def sync(self) -> None:
        """Returns when every record appended before the call is on disk (fdatasync).

        Raises:
            OSError: It failed. The kernel may have dropped the pages and still show them to readers, so the file is cut back
                to what an earlier sync of this writer made durable, and this writer takes nothing more.
            Corrupt: An earlier failure left the file in an unknown state; open it again.
        """
        self._check_usable()
        size_bytes = self.size_bytes
        try:
            os.fdatasync(self._fd)
        except OSError:
            self._broken = True
            if self._durable_bytes:
                os.ftruncate(self._fd, self._durable_bytes)
            raise
        self._durable_bytes = size_bytes

    def close(self) -> None:
        """Closes the file without syncing; harmless when closed already."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_usable(self) -> None:
        if self._broken or self._fd < 0:
            raise Corrupt(f"log {self.path.name} is {'closed' if self._fd < 0 else 'in an unknown state'}; open it again")

    def _cut_back(self) -> None:
        try:
            os.ftruncate(self._fd, self.size_bytes)
            os.lseek(self._fd, self.size_bytes, os.SEEK_SET)
        except OSError:
            self._broken = True


def read_log(path: Path) -> tuple[Iterator[bytes], int]:
    """The whole records of a log, and how many bytes of the file they fill.

    A file longer than the second value has a torn (or damaged) record there; truncate_torn() or opening a LogWriter cuts it
    off. Records are read one at a time, so a log larger than memory is fine.
    """
    path = Path(path)
    with path.open("rb") as file:
        lengths = list(_record_lengths(file))
    return _payloads(path, lengths), sum(lengths) + HEADER_BYTES * len(lengths)


def truncate_torn(path: Path) -> int:
    """Cuts a torn record off the end of a log, durably; returns how many bytes were cut."""
    _, valid_length = read_log(path)
    torn = path.stat().st_size - valid_length
    if torn:
        with path.open("r+b") as file:
            file.truncate(valid_length)
            os.fsync(file.fileno())
    return torn


def fsync_directory(path: Path) -> None:
    """Makes the names in a directory durable; a new or renamed file may be gone after a power loss without it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _payloads(path: Path, lengths: list[int]) -> Iterator[bytes]:
    with path.open("rb") as file:
        for length in lengths:
            file.seek(HEADER_BYTES, os.SEEK_CUR)
            yield file.read(length)


def _record_lengths(file: BinaryIO) -> Iterator[int]:
    """Payload lengths of the whole records from the file's start up to the first one that does not check."""
    remaining = os.fstat(file.fileno()).st_size
    while remaining >= HEADER_BYTES:
        length, crc = _HEADER.unpack(file.read(HEADER_BYTES))
        remaining -= HEADER_BYTES
        if length > min(remaining, MAX_RECORD_BYTES):
            return
        # The length is under the CRC: a tail of zeros, as a crash may leave, is no record of nothing.
        if zlib.crc32(file.read(length), zlib.crc32(_LENGTH.pack(length))) != crc:
            return
        remaining -= length
        yield length


def _skip(parts: list[bytes | memoryview], count: int) -> list[bytes | memoryview]:
    kept: list[bytes | memoryview] = []
    for part in parts:
        if count >= len(part):
            count -= len(part)
        else:
            kept.append(memoryview(part)[count:])
            count = 0
    return kept
