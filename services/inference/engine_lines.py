"""The engine process's ends of the socket and of the ring of chunks. Any thread gives, none waits for the front end."""

from __future__ import annotations

import os
import socket
import threading
from collections import deque

from manyhands.engine.v1 import engine_pb2

from . import engine_messages
from .engine_port import Outcome, Rehearsal
from .shared_ring import RingWriter
from .slot_layout import SlotLayout


class Line:
    """The socket to the front end. post() never waits and may be called on any thread."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.connection.setblocking(False)
        self._lock = threading.Lock()
        self._unsent = bytearray()
        self._received = bytearray()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    @property
    def wake_fd(self) -> int:
        """Readable when unsent bytes wait for the main thread."""
        return self._wake_fd

    def post(self, *, at_once: bool = True, **message: object) -> None:
        """Sends a FromEngine, as post(ready=Ready()); what the socket does not take now waits for flush().

        at_once: Else it waits for flush() too: tokens come by the dozen, and one call sends them all.
        """
        content = engine_messages.frame(engine_pb2.FromEngine(**message))  # type: ignore[arg-type]
        with self._lock:
            is_awake = bool(self._unsent)
            self._unsent += content
            if at_once:
                self._send_locked()
            if self._unsent and not is_awake:
                os.eventfd_write(self._wake_fd, 1)

    def flush(self) -> bool:
        """Sends what waits; answers whether some still does."""
        try:
            os.eventfd_read(self._wake_fd)
        except BlockingIOError:
            pass
        with self._lock:
            self._send_locked()
            return bool(self._unsent)

    def _send_locked(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self.connection.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:  # Gone: the main thread reads the end of the stream.
            self._unsent.clear()

    def receive(self, *, wait: bool = False) -> list[engine_pb2.ToEngine] | None:
        """Whole messages that are there; None when the front end is gone. With wait, at least one."""
        while True:
            messages = self._parse()
            if messages and wait:
                return messages
            if wait:
                self.connection.setblocking(True)
            try:
                content = self.connection.recv(1 << 20)
            except BlockingIOError:
                return messages
            except OSError:
                return None
            finally:
                self.connection.setblocking(False)
            if not content:
                return None
            self._received += content
            if not wait:
                return messages + self._parse()

    def _parse(self) -> list[engine_pb2.ToEngine]:
        messages: list[engine_pb2.ToEngine] = []
        header = engine_messages.FRAME_HEADER.size
        while len(self._received) >= header:
            length = engine_messages.frame_length(bytes(self._received[:header]))
            if len(self._received) < header + length:
                break
            content = bytes(self._received[header : header + length])
            del self._received[: header + length]
            messages.append(engine_messages.parse(engine_pb2.ToEngine, content))
        return messages


class Answers:
    """The ring of chunks, filled on any thread; what finds no place waits here for the main thread."""

    def __init__(self, ring: RingWriter, layout: SlotLayout) -> None:
        self.ring = ring
        self._layout = layout
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, str, Outcome]] = deque()
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def put(self, token: int, model: str, outcome: Outcome) -> None:
        with self._lock:
            self._waiting.append((token, model, outcome))
            self._fill_locked()
            if self._waiting:
                os.eventfd_write(self.wake_fd, 1)

    def rehearse(self, token: int, model: str, rehearsal: Rehearsal) -> None:
        """As put(); where nothing is free it is dropped."""
        with self._lock:
            if not self._waiting and (body := self.ring.reserve()) is not None:
                self._layout.write_answer(body, token, model, rehearsal)
                self.ring.publish()

    def flush(self) -> bool:
        """Fills free slots; answers whether some outcomes still wait."""
        try:
            os.eventfd_read(self.wake_fd)
        except BlockingIOError:
            pass
        with self._lock:
            self._fill_locked()
            return bool(self._waiting)

    def _fill_locked(self) -> None:
        while self._waiting and (body := self.ring.reserve()) is not None:
            token, model, outcome = self._waiting.popleft()
            self._layout.write_answer(body, token, model, outcome)
            self.ring.publish()
