"""The engine's end of the process that brings weights in (bring_in.py). One thread at a time; close() from any."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from manyhands import logs, stamps
from manyhands.clients.weights import Bytes, placed
from manyhands.engine.v1 import engine_pb2
from manyhands.errors import Cancelled, InternalError, Unreachable
from manyhands.security import SecuritySettings
from manyhands.weights.v1 import weights_pb2

from . import engine_messages
from .bring_in import BYTES_AT, GENERATION, HEADER, SHAPE
from .engine_program import REAP_S, EngineProgram
from .shared_ring import Doorbell, RingReader, grow_and_seal, make_memory

MODULE = "services.inference.bring_in"
# Beside the doorbell, the process's end is looked for.
WAIT_S = 0.5


class WeightsBringer:
    """Args:
    address: Of the weights service.
    patience_s: How long a service that is away is tried again; 0: once.
    """

    def __init__(self, address: str, *, security_settings: SecuritySettings | None = None, patience_s: float = 10.0) -> None:
        self._address = address
        self._security = security_settings or SecuritySettings()
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._program: EngineProgram | None = None
        self._closed = False

    def fetch_into(
        self, entries: Iterable[weights_pb2.TensorEntry], place: Callable[[weights_pb2.TensorEntry], Bytes]
    ) -> Iterator[weights_pb2.TensorEntry]:
        """Tensors of a manifest, each to where it belongs, whole, as their digests say, and finite.

        Args:
            place: Answers the memory of an entry, (its bytes,) uint8. Called when all of the tensor is here; until the entry
                comes out of the iterator that memory holds anything.

        Raises:
            InvalidInput: place answered memory of another size.
            Corrupt: A tensor's bytes are not what their digest says, or its values not finite; field names it.
            NotFound: The service has dropped this version.
            Unreachable: The service, or the process, is gone.
            InternalError: The process cannot do it.
            Cancelled: close() was called.
        """
        wanted = list(entries)
        if not wanted:
            return
        with self._running(wanted) as (program, line, ring):
            into: Bytes | None = None
            is_over = False
            while True:
                for body in ring.take():
                    number, offset, size, is_last, is_end = HEADER.unpack_from(body)
                    content = np.frombuffer(body, np.uint8)[BYTES_AT : BYTES_AT + size]
                    if is_end:
                        error = engine_messages.from_status_bytes(content.tobytes())
                        if error is not None:
                            raise error
                        return
                    entry = wanted[number]
                    if offset == 0:
                        into = placed(place, entry)
                    assert into is not None
                    np.copyto(into[offset : offset + size], content)
                    if is_last:
                        yield entry
                if is_over:
                    raise self._ended(program)
                readable, _, _ = select.select([ring.doorbell.filled_fd, line.fileno()], [], [], WAIT_S)
                # What it said before its end is looked at first, once more.
                is_over = line.fileno() in readable

    def close(self) -> None:
        """What is brought in, now or later, ends with Cancelled."""
        with self._lock:
            self._closed = True
            if self._program is not None:
                self._program.kill()

    def _ended(self, program: EngineProgram) -> Exception:
        if self._closed:
            return Cancelled("the server is going away; nothing was changed")
        code = program.wait(REAP_S)
        if code is not None and code > 0:  # Killed it may fare better next time; what it cannot do it never can.
            return InternalError(f"the process that brings weights in ended with exit code {code}; the log has the reason")
        return Unreachable(f"the process that brings weights in ended with exit code {code}; try again")

    @contextmanager
    def _running(
        self, wanted: Sequence[weights_pb2.TensorEntry]
    ) -> Iterator[tuple[EngineProgram, socket.socket, RingReader]]:
        """The process, the line that ends with it, and the ring; it is gone afterwards."""
        memory_fd, bell = make_memory(), Doorbell.make()
        ours, theirs = socket.socketpair()
        program: EngineProgram | None = None
        try:
            memory = grow_and_seal(memory_fd, SHAPE.num_bytes)
            with self._lock:
                if self._closed:
                    raise Cancelled("the server is going away; nothing was changed")
                files = [theirs.fileno(), memory_fd, bell.filled_fd, bell.free_fd]
                program = self._program = EngineProgram(MODULE, files)
            theirs.close()
            try:
                ours.sendall(self._task(wanted).SerializeToString())
                ours.shutdown(socket.SHUT_WR)
            except OSError:
                raise self._ended(program) from None
            yield program, ours, RingReader(memory, 0, SHAPE, bell, GENERATION)
        finally:
            with self._lock:
                self._program = None
            if program is not None:
                program.kill()
                program.wait(REAP_S)
            ours.close()
            theirs.close()
            bell.close()
            os.close(memory_fd)

    def _task(self, wanted: Sequence[weights_pb2.TensorEntry]) -> engine_pb2.BringIn:
        log_level, log_json = logs.current()
        return engine_pb2.BringIn(
            log_level=log_level,
            log_json=log_json,
            address=self._address,
            security=engine_messages.to_security(self._security),
            patience=stamps.to_duration(self._patience_s),
            tensors=wanted,
        )
