"""A weights service in this process that has one version and sends its tensors as a test says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import grpc

from manyhands import weights_manifest
from manyhands.clients.weights import pieces
from manyhands.weights.v1 import weights_pb2, weights_pb2_grpc
from manyhands.weights_manifest import RawTensor

Pieces = Iterator[weights_pb2.TensorPiece]


class ScriptedWeights(weights_pb2_grpc.WeightsServiceServicer):
    """Attributes:
    send: (name, tensor) to the pieces that are sent; what it raises ends the stream. Set it at any time.
    asked: The names asked for, by stream.
    missing: Whether it has dropped the version.
    """

    missing = False

    def __init__(self, manifest: weights_pb2.Manifest, tensors: Mapping[str, RawTensor]) -> None:
        self.manifest = weights_pb2.Manifest()
        self.manifest.CopyFrom(manifest)
        self.manifest.number = 1
        self.send: Callable[[str, RawTensor], Pieces] = lambda _name, raw: pieces(raw.sha256, raw.data)
        self.asked: list[list[str]] = []
        self._by_digest = {entry.sha256: (entry.name, tensors[entry.name]) for entry in reversed(manifest.tensors)}
        self._server = grpc.server(ThreadPoolExecutor(max_workers=2))
        weights_pb2_grpc.add_WeightsServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.stop(None).wait()

    def GetManifest(  # noqa: N802
        self, request: weights_pb2.GetManifestRequest, context: Any
    ) -> weights_pb2.GetManifestResponse:
        version = weights_manifest.version_of(self.manifest)
        return weights_pb2.GetManifestResponse(manifest=self.manifest, version=version)

    def Fetch(  # noqa: N802
        self, request: weights_pb2.FetchRequest, context: grpc.ServicerContext
    ) -> Iterator[weights_pb2.FetchResponse]:
        self.asked.append([self._by_digest[sha256][0] for sha256 in request.sha256])
        if self.missing:
            context.abort(grpc.StatusCode.NOT_FOUND, "the version is gone")
        for sha256 in request.sha256:
            try:
                for piece in self.send(*self._by_digest[sha256]):
                    yield weights_pb2.FetchResponse(piece=piece)
            except ConnectionError as error:
                context.abort(grpc.StatusCode.UNAVAILABLE, str(error))


def wrong_pieces() -> dict[str, Callable[[RawTensor], Pieces]]:
    """Ways to send a tensor of at least 8 bytes wrongly."""

    def sent(raw: RawTensor, *parts: tuple[int, int, bytes]) -> Pieces:
        """(offset, and of the tensor's bytes the end of what is sent there, what follows them)."""
        data = bytes(raw.data)
        for number, (begin, end, more) in enumerate(parts, start=1):
            last = number == len(parts)
            yield weights_pb2.TensorPiece(sha256=raw.sha256, offset=begin, data=data[begin:end] + more, last=last)

    def size(raw: RawTensor) -> int:
        return memoryview(raw.data).nbytes

    return {
        "out of order": lambda raw: sent(raw, (4, size(raw), b""), (0, 4, b"")),
        "a hole": lambda raw: sent(raw, (0, 2, b""), (4, size(raw), b"")),
        "short": lambda raw: sent(raw, (0, 4, b"")),
        "too long": lambda raw: sent(raw, (0, 4, b""), (4, size(raw), b"more")),
        "other bytes": lambda raw: sent(raw, (0, 4, b""), (4, size(raw) - 1, b"?")),
        "another tensor": lambda raw: pieces(bytes(32), raw.data),
    }
