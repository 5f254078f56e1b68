"""A ring of slots in memory that two processes share: one writes, one reads, neither can make the other wait.

The two sides share nothing but the slots. How many are filled and how many are free again travels through two eventfds,
whose counters the kernel keeps: reading one orders the memory as well, on any processor. What a side knows of its place in
the ring is its own; a peer that writes rubbish into slots or counters is found out (RingBroken, or a slot that is passed
over) and cannot make this side read or write beyond the memory, which is sealed so that nobody can shrink it.

A slot begins with the generation of the engine process that it is for and the slot's number in that ring's life: one that an
earlier process left behind, or one that comes twice, is never taken for an answer.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from manyhands.errors import InternalError, NotOffered

_MAGIC = 0x6D68_7267  # "mhrg"
_HEADER = struct.Struct("<IIQ")  # Magic, generation, number.
HEADER_BYTES = 64  # Bodies begin on a cache line.
_MAX_RING_BYTES = 1 << 32


class RingBroken(InternalError):
    """The peer counts slots that cannot be: it is broken, and its process has to end."""


@dataclass(frozen=True, kw_only=True)
class RingShape:
    """slot_bytes: Of a body, without the header."""

    slot_count: int
    slot_bytes: int

    def __post_init__(self) -> None:
        if self.slot_count < 1 or self.slot_bytes < 1 or self.num_bytes > _MAX_RING_BYTES:
            raise InternalError(f"a ring of {self.slot_count} slots of {self.slot_bytes} bytes cannot be")

    @property
    def stride(self) -> int:
        return HEADER_BYTES + -(-self.slot_bytes // HEADER_BYTES) * HEADER_BYTES

    @property
    def num_bytes(self) -> int:
        return self.slot_count * self.stride


@dataclass(frozen=True, kw_only=True)
class Doorbell:
    """File descriptors of two eventfds, non-blocking: slots filled, and slots free again."""

    filled_fd: int
    free_fd: int

    @classmethod
    def make(cls) -> Doorbell:
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        return cls(filled_fd=os.eventfd(0, flags), free_fd=os.eventfd(0, flags))

    def close(self) -> None:
        os.close(self.filled_fd)
        os.close(self.free_fd)


def make_memory(name: str = "manyhands-engine") -> int:
    """An empty file in memory that another process may inherit; grow_and_seal() gives it its size."""
    if sys.platform != "linux":
        raise NotOffered("serving needs Linux: memfd, eventfd and the kernel's word when a parent ends")
    return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def grow_and_seal(memory_fd: int, num_bytes: int) -> mmap.mmap:
    """Maps num_bytes of it. Sealed: were it shrunk, whoever reads beyond would be killed by the kernel."""
    os.ftruncate(memory_fd, num_bytes)
    fcntl.fcntl(memory_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return mmap.mmap(memory_fd, num_bytes)


def map_memory(memory_fd: int, num_bytes: int) -> mmap.mmap:
    """Maps what the other process has sized and sealed."""
    if os.fstat(memory_fd).st_size != num_bytes:
        raise RingBroken(f"the shared memory has {os.fstat(memory_fd).st_size} bytes, the rings need {num_bytes}")
    return mmap.mmap(memory_fd, num_bytes)


class _Side:
    def __init__(self, memory: mmap.mmap, offset: int, shape: RingShape, doorbell: Doorbell, generation: int) -> None:
        if offset < 0 or offset + shape.num_bytes > len(memory):
            raise RingBroken(f"a ring of {shape.num_bytes} bytes at {offset} does not fit into {len(memory)}")
        self.shape = shape
        self.doorbell = doorbell
        self._memory = memoryview(memory)
        self._offset = offset
        self._generation = generation
        self._number = 0

    def _header_at(self, number: int) -> int:
        return self._offset + (number % self.shape.slot_count) * self.shape.stride

    def _body(self, number: int) -> memoryview:
        start = self._header_at(number) + HEADER_BYTES
        return self._memory[start : start + self.shape.slot_bytes]


class RingWriter(_Side):
    """The side that fills slots. One thread at a time."""

    _taken = 0

    def reserve(self) -> memoryview | None:
        """The body of the next slot, to be filled and then publish()ed; None while all are full.

        Raises:
            RingBroken: More slots were freed than are in use.
        """
        if self._taken == self.shape.slot_count:
            self._taken -= _count(self.doorbell.free_fd)
            if self._taken < 0:
                raise RingBroken("more slots were freed than were in use")
            if self._taken == self.shape.slot_count:
                return None
        return self._body(self._number)

    def publish(self) -> None:
        """Hands the slot that reserve() gave to the reader."""
        _HEADER.pack_into(self._memory, self._header_at(self._number), _MAGIC, self._generation, self._number)
        self._number += 1
        self._taken += 1
        _ring(self.doorbell.filled_fd)


class RingReader(_Side):
    """The side that empties slots. One thread at a time.

    Attributes:
        num_passed_over: Slots that were announced but held no slot of this ring's life.
    """

    num_passed_over = 0
    _announced = 0

    def take(self) -> Iterator[memoryview]:
        """Bodies of the slots that are filled now, in order. A body is the writer's again when the next one is asked for.

        Raises:
            RingBroken: More slots were announced than there are.
        """
        self._announced += _count(self.doorbell.filled_fd)
        if self._announced > self.shape.slot_count:
            raise RingBroken(f"{self._announced} slots were announced, there are {self.shape.slot_count}")
        while self._announced:
            header = _HEADER.unpack_from(self._memory, self._header_at(self._number))
            if header == (_MAGIC, self._generation, self._number):
                # Not in a finally: who gives up on a body gives up on the ring, and may have closed its doorbell.
                yield self._body(self._number)
            else:
                self.num_passed_over += 1
            self._number += 1
            self._announced -= 1
            _ring(self.doorbell.free_fd)


def _count(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def _ring(fd: int) -> None:
    try:
        os.eventfd_write(fd, 1)
    except BlockingIOError:  # The counter is at its end: only a broken peer can have done that.
        raise RingBroken("the peer filled a counter of slots") from None
