"""Brings tensors of a version from the weights service to an engine: python -m services.inference.bring_in, started by the
engine process only, for one version.

In the engine itself thousands of small messages, each taken apart by Python, would want the interpreter again and again, and
so would the thread that launches units. Here they are received, verified and looked through, with the low priority of the
thread that started this process, and go to the engine whole, in large pieces of shared memory.
"""

from __future__ import annotations

import logging
import select
import socket
import struct
from collections.abc import Mapping

import numpy as np

from manyhands import logs, stamps, weights_manifest
from manyhands.clients.weights import Bytes, WeightsClient
from manyhands.common.v1 import common_pb2
from manyhands.engine.v1 import engine_pb2
from manyhands.errors import Corrupt, InternalError, ManyhandsError
from manyhands.weights.v1 import weights_pb2

from . import engine_messages, engine_program
from .shared_ring import Doorbell, RingShape, RingWriter, map_memory

logger = logging.getLogger(__name__)

PIECE_BYTES = 16 * 1024 * 1024
# Number of the tensor, offset and size of the piece, whether it is the tensor's last, whether this is the end. Behind it its
# bytes; of the end a google.rpc.Status, empty where all went well.
HEADER = struct.Struct("<IQQ??")
BYTES_AT = 64
SHAPE = RingShape(slot_count=4, slot_bytes=BYTES_AT + PIECE_BYTES)
# Every process has a ring of its own.
GENERATION = 1
# The bits that are all set in an infinity and in what is no number.
_EXPONENTS: Mapping[int, tuple[str, int]] = {
    common_pb2.DATA_TYPE_FLOAT16: ("<u2", 0x7C00),
    common_pb2.DATA_TYPE_BFLOAT16: ("<u2", 0x7F80),
    common_pb2.DATA_TYPE_FLOAT32: ("<u4", 0x7F80_0000),
    common_pb2.DATA_TYPE_FLOAT64: ("<u8", 0x7FF0_0000_0000_0000),
}
_CHECKED_AT_ONCE = 1 << 18


class Pieces:
    """The writing end of the ring."""

    def __init__(self, ring: RingWriter) -> None:
        self._ring = ring

    def tensor(self, number: int, content: Bytes) -> None:
        begin = 0
        while True:
            piece = content[begin : begin + PIECE_BYTES]
            is_last = begin + piece.nbytes == content.nbytes
            self._put(piece, HEADER.pack(number, begin, piece.nbytes, is_last, False))
            begin += piece.nbytes
            if is_last:
                return

    def end(self, error: ManyhandsError | None) -> None:
        status = engine_messages.to_status_bytes(error)[:PIECE_BYTES]
        self._put(np.frombuffer(status, np.uint8), HEADER.pack(0, 0, len(status), True, True))

    def _put(self, content: Bytes, header: bytes) -> None:
        while (body := self._ring.reserve()) is None:
            select.select([self._ring.doorbell.free_fd], [], [])
        body[: len(header)] = header
        np.copyto(np.frombuffer(body, np.uint8)[BYTES_AT : BYTES_AT + content.nbytes], content)
        self._ring.publish()


def bring(task: engine_pb2.BringIn, pieces: Pieces) -> None:
    """Raises what WeightsClient.fetch_into() raises, and Corrupt for a tensor whose values are not finite."""
    num_bytes = sum(weights_manifest.entry_bytes(entry) for entry in task.tensors)
    logger.info("bringing %d tensors in, %.1f MB", len(task.tensors), num_bytes / 1e6)
    numbers = {entry.name: number for number, entry in enumerate(task.tensors)}
    coming: dict[str, Bytes] = {}

    def place(entry: weights_pb2.TensorEntry) -> Bytes:
        coming[entry.name] = np.empty(weights_manifest.entry_bytes(entry), np.uint8)
        return coming[entry.name]

    security, patience_s = engine_messages.from_security(task.security), stamps.to_seconds(task.patience)
    with WeightsClient(task.address, security_settings=security, patience_s=patience_s) as client:
        for entry in client.fetch_into(task.tensors, place):
            content = coming.pop(entry.name)
            if not is_finite(entry.dtype, content):
                raise Corrupt("holds values that are not finite", field=entry.name)
            pieces.tensor(numbers[entry.name], content)


def is_finite(dtype: int, content: Bytes) -> bool:
    """policies.tensor_file.is_finite() of a tensor's bytes, without torch: to load it takes longer than many a version."""
    if dtype not in _EXPONENTS:
        return True
    integer, exponent = _EXPONENTS[dtype]
    bits = content.view(integer)
    parts = (bits[begin : begin + _CHECKED_AT_ONCE] for begin in range(0, bits.size, _CHECKED_AT_ONCE))
    return not any(bool(((part & exponent) == exponent).any()) for part in parts)


def main() -> int:
    socket_fd, memory_fd, filled_fd, free_fd = engine_program.begin(4)
    with socket.socket(fileno=socket_fd) as told:
        task = engine_pb2.BringIn.FromString(b"".join(iter(lambda: told.recv(1 << 20), b"")))
        logs.set_up(task.log_level, process="bring-in", as_json=task.log_json)
        memory = map_memory(memory_fd, SHAPE.num_bytes)
        pieces = Pieces(RingWriter(memory, 0, SHAPE, Doorbell(filled_fd=filled_fd, free_fd=free_fd), GENERATION))
        error: ManyhandsError | None = None
        try:
            bring(task, pieces)
        except ManyhandsError as known:
            error = known
        except Exception:
            logger.exception("weights cannot be brought in")
            error = InternalError("weights cannot be brought in; the server's log has the reason")
        pieces.end(error)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
