"""The ring between front end and engine: everything in order, nothing twice, nobody waits, rubbish is found out."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.shared_ring import (
    HEADER_BYTES,
    Doorbell,
    RingBroken,
    RingReader,
    RingShape,
    RingWriter,
    grow_and_seal,
    make_memory,
    map_memory,
)

GENERATION = 3


@dataclass
class Pair:
    """Both ends, each with a mapping of its own, as two processes have."""

    shape: RingShape
    offset: int = 0

    def __post_init__(self) -> None:
        self.memory_fd = make_memory()
        self.doorbell = Doorbell.make()
        num_bytes = self.offset + self.shape.num_bytes
        self.memory = grow_and_seal(self.memory_fd, num_bytes)
        self.writer = RingWriter(self.memory, self.offset, self.shape, self.doorbell, GENERATION)
        self.reader = RingReader(map_memory(self.memory_fd, num_bytes), self.offset, self.shape, self.doorbell, GENERATION)

    def write(self, content: bytes) -> bool:
        body = self.writer.reserve()
        if body is None:
            return False
        body[: len(content)] = content
        self.writer.publish()
        return True

    def read(self, length: int) -> list[bytes]:
        return [bytes(body[:length]) for body in self.reader.take()]

    def close(self) -> None:
        os.close(self.memory_fd)
        self.doorbell.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair(RingShape(slot_count=4, slot_bytes=100))
    yield pair
    pair.close()


@settings(max_examples=60, deadline=None)
@given(
    slot_count=st.integers(1, 7),
    slot_bytes=st.integers(8, 300),
    offset=st.sampled_from([0, 64, 4096]),
    steps=st.lists(st.one_of(st.binary(min_size=8, max_size=8), st.none()), max_size=80),
)
def test_what_is_written_is_read_in_order_whatever_the_sizes_and_the_turns(
    slot_count: int, slot_bytes: int, offset: int, steps: list[bytes | None]
) -> None:
    """Bytes are a write, None is a turn of the reader. A full ring says so and loses nothing."""
    pair = Pair(RingShape(slot_count=slot_count, slot_bytes=slot_bytes), offset)
    inside: deque[bytes] = deque()
    for content in steps:
        if content is None:
            assert pair.read(8) == list(inside)
            inside.clear()
        elif pair.write(content):
            inside.append(content)
            assert len(inside) <= slot_count
        else:
            assert len(inside) == slot_count
    assert pair.read(8) == list(inside)
    assert pair.reader.num_passed_over == 0
    pair.close()


def test_a_body_is_the_readers_until_the_next_one_is_asked_for(pair: Pair) -> None:
    for number in range(4):
        assert pair.write(bytes([number]) * 100)
    bodies = pair.reader.take()
    first = next(bodies)
    assert not pair.write(b"\xff" * 100)
    assert bytes(first) == bytes(100)
    next(bodies)
    assert pair.write(b"\xff" * 100)


def test_a_slot_of_an_earlier_process_or_one_that_comes_twice_is_passed_over(pair: Pair) -> None:
    stale = RingWriter(pair.memory, 0, pair.shape, pair.doorbell, GENERATION - 1)
    body = stale.reserve()
    assert body is not None
    body[:3] = b"old"
    stale.publish()
    assert pair.read(3) == []
    assert pair.reader.num_passed_over == 1
    os.eventfd_write(pair.doorbell.filled_fd, 1)  # Announced again, with nothing new in it.
    assert pair.read(3) == []
    assert pair.reader.num_passed_over == 2


def test_rubbish_in_every_header_is_passed_over(pair: Pair) -> None:
    for number in range(4):
        pair.write(bytes([number]))
    for slot in range(4):
        start = slot * pair.shape.stride
        pair.memory[start : start + HEADER_BYTES] = os.urandom(HEADER_BYTES)
    assert pair.read(1) == []
    assert pair.reader.num_passed_over == 4


@pytest.mark.parametrize("announced", [5, 1 << 40, (1 << 64) - 2])
def test_a_peer_that_announces_more_slots_than_there_are_is_broken(pair: Pair, announced: int) -> None:
    os.eventfd_write(pair.doorbell.filled_fd, announced)
    with pytest.raises(RingBroken, match="announced"):
        pair.read(1)


def test_a_peer_that_frees_more_than_is_in_use_is_broken(pair: Pair) -> None:
    for _ in range(4):
        assert pair.write(b"x")
    os.eventfd_write(pair.doorbell.free_fd, 5)
    with pytest.raises(RingBroken, match="freed"):
        pair.write(b"x")


def test_a_counter_that_the_peer_filled_makes_nobody_wait(pair: Pair) -> None:
    os.eventfd_write(pair.doorbell.filled_fd, (1 << 64) - 2)
    with pytest.raises(RingBroken, match="counter"):
        pair.write(b"x")


def test_the_memory_cannot_be_cut_short_under_the_other_process(pair: Pair) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(pair.memory_fd, 1)


def test_a_ring_that_does_not_fit_its_memory_is_refused(pair: Pair) -> None:
    with pytest.raises(RingBroken, match="does not fit"):
        RingReader(pair.memory, 64, pair.shape, pair.doorbell, GENERATION)
    with pytest.raises(RingBroken, match="the rings need"):
        map_memory(pair.memory_fd, pair.shape.num_bytes + 1)
