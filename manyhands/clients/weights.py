"""The weights service from a learner's and a reader's side: what is there already is never sent again.

Blocking, numpy only. Safe to use from several threads.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message
from grpc.experimental import ChannelOptions

from .. import channel, errors, stamps, weights_manifest
from ..common.v1 import common_pb2
from ..retry import Backoff, Patience, call_with_patience
from ..security import SecuritySettings
from ..spec import Spec
from ..weights.v1 import weights_pb2, weights_pb2_grpc
from ..weights_manifest import PIECE_BYTES, RawTensor, TensorLike

# Deadlines of streams grow with what they carry: nobody's link is meant to be slower than this.
_SLOWEST_BYTES_PER_S = 5_000_000

ResponseT = TypeVar("ResponseT")

Bytes = npt.NDArray[np.uint8]
"""(N,) uint8."""


@dataclass(frozen=True, kw_only=True)
class PublishedVersion:
    """One version the service has.

    Attributes:
        version: model, number, digest.
        age_s: Seconds since it was published, when the service said so.
        metrics: As "train/loss", "train/step".
    """

    version: common_pb2.PolicyVersion
    age_s: float
    metrics: Mapping[str, float] = field(default_factory=dict)


class WeightsClient(channel.Client):
    """Publishes and reads versions. Everything here is idempotent, publishing by its publish_id.

    Args:
        address: "host:port" of the weights service.
        timeout_s: Deadline of each small call; streams get more with their size.
        patience_s: For how long a call or stream is tried again while the service is unreachable or has no room; 0 means
            one attempt.
    """

    SERVER = "weights service"
    # Streams are read on the thread that asks for them. With gRPC's own thread between, each message wakes two, and an
    # engine beside them has one more to share the interpreter with.
    OPTIONS = ((ChannelOptions.SingleThreadedUnaryStream, 1),)

    def __init__(
        self,
        address: str,
        *,
        security_settings: SecuritySettings | None = None,
        timeout_s: float = 10.0,
        patience_s: float = 10.0,
    ) -> None:
        super().__init__(address, security_settings=security_settings)
        self._stub = weights_pb2_grpc.WeightsServiceStub(self._channel)
        self._timeout_s = timeout_s
        self._patience_s = patience_s

    def publish(
        self,
        *,
        model: str,
        policy_type: str,
        config_json: str,
        spec: Spec | None,
        tensors: Mapping[str, TensorLike],
        publish_id: str,
        metrics: Mapping[str, float] | None = None,
        parent_number: int | None = None,
    ) -> common_pb2.PolicyVersion:
        """Makes a version of tensors and answers it when it is on the service's disk; sends only what the service lacks.

        Args:
            tensors: By name in the state dict: numpy arrays, RawTensors or (DataType, shape, bytes) for bfloat16.
            publish_id: Chosen by the learner, as "run/step". The same id and content answer the same version again.
            metrics: Shown with the version: "train/loss", "train/step".
            parent_number: When given, the version must still be the newest one, else Conflict.

        Raises:
            InvalidInput: Names the tensor or field that cannot be published.
            AlreadyExists: publish_id names a version with other content.
            Conflict: parent_number is not the newest version.
            Unreachable: For longer than patience_s.
        """
        raws = {name: weights_manifest.raw_tensor(value, field=name) for name, value in tensors.items()}
        manifest = weights_manifest.build(
            model=model,
            policy_type=policy_type,
            config_json=config_json,
            spec=spec,
            tensors=raws,
            publish_id=publish_id,
            metrics=metrics,
        )
        by_digest = {entry.sha256: raws[entry.name] for entry in manifest.tensors}

        def attempt() -> common_pb2.PolicyVersion:
            request = weights_pb2.FindMissingRequest(sha256=list(by_digest))
            missing = self._stub.FindMissing(request, timeout=self._timeout_s).sha256
            num_bytes = sum(memoryview(by_digest[sha256].data).nbytes for sha256 in missing)
            response = self._stub.Publish(
                _publish_requests(manifest, {sha256: by_digest[sha256] for sha256 in missing}, parent_number),
                timeout=self._timeout_s + num_bytes / _SLOWEST_BYTES_PER_S,
            )
            return response.version

        return call_with_patience(attempt, patience_s=self._patience_s)

    def find_missing(self, sha256s: list[bytes]) -> list[bytes]:
        """Those of sha256s the service lacks, in their order."""
        request = weights_pb2.FindMissingRequest(sha256=sha256s)
        return list(self._call(self._stub.FindMissing, request).sha256)

    def get_manifest(self, model: str, number: int = 0) -> weights_pb2.Manifest:
        """The manifest of a version, checked; number 0 is the newest. manifest.number says which one it is.

        Raises:
            NotFound: No such model or version; lists what there is.
            Corrupt: The manifest's content is not what its digest says.
        """
        request = weights_pb2.GetManifestRequest(model=model, number=number)
        response = self._call(self._stub.GetManifest, request)
        manifest = response.manifest
        weights_manifest.check(manifest)
        if weights_manifest.digest(manifest) != response.version.digest:
            raise errors.Corrupt(
                f"manifest {manifest.number} of {manifest.model} has digest {weights_manifest.digest(manifest).hex()[:16]}, "
                f"the service says {response.version.digest.hex()[:16]}"
            )
        return manifest

    def list_versions(self, model: str = "") -> list[PublishedVersion]:
        """All versions of model, or of all models, oldest first."""
        request = weights_pb2.ListVersionsRequest(model=model)
        return [_published(version) for version in self._call(self._stub.ListVersions, request).versions]

    def fetch(self, manifest: weights_pb2.Manifest, have: Container[bytes] = ()) -> dict[str, RawTensor]:
        """The tensors of manifest by name, each digest verified; names whose sha256 is in have are left out.

        Raises:
            NotFound: The service has dropped this version.
            Corrupt: Bytes that are not what their digest says.
        """
        wanted = [entry for entry in manifest.tensors if entry.sha256 not in have]
        tensors = {}

        def place(entry: weights_pb2.TensorEntry) -> Bytes:
            # Not a bytearray: that would be filled with zeros, a gigabyte of them while nobody else has the interpreter.
            data = np.empty(weights_manifest.entry_bytes(entry), np.uint8)
            tensors[entry.name] = RawTensor(dtype=entry.dtype, shape=tuple(entry.shape), data=data.data)
            return data

        for _ in self.fetch_into(wanted, place):
            pass
        return tensors

    def fetch_into(
        self, entries: Iterable[weights_pb2.TensorEntry], place: Callable[[weights_pb2.TensorEntry], Bytes]
    ) -> Iterator[weights_pb2.TensorEntry]:
        """Tensors of a manifest, each piece straight to where it belongs. Goes on after a broken link.

        Nothing as large as a tensor is allocated, and other threads get the interpreter between any two pieces.

        Args:
            place: Answers the memory of an entry. Called just before its first byte is written, and again where a broken
                link has it begin anew; until the entry comes out of the iterator that memory holds anything.

        Yields:
            Each entry when its memory has all of it, digest verified.

        Raises:
            InvalidInput: place answered memory of another size.
            NotFound: The service has dropped this version.
            Corrupt: Bytes that are not what their digest says, or that are not in order; field names the tensor.
        """
        waiting: dict[bytes, list[weights_pb2.TensorEntry]] = {}
        for entry in entries:
            waiting.setdefault(entry.sha256, []).append(entry)
        patience = Patience(self._patience_s)
        while waiting:
            try:
                for entry, whole in self._fetch_stream([same[0] for same in waiting.values()], place):
                    yield entry
                    for other in waiting.pop(entry.sha256)[1:]:
                        np.copyto(placed(place, other), whole)
                        yield other
                    patience.progress()
                if waiting:
                    raise errors.Unreachable(f"the weights service ended the stream {len(waiting)} tensors early")
            except errors.ManyhandsError as error:
                patience.wait(error)

    def watch(self, model: str = "", after_number: int = 0) -> VersionWatch:
        """Iterates over versions with number > after_number, those that exist and then each new one, for ever.

        Reconnects when the service goes away and misses none. close() (from any thread) ends the iteration. An empty
        model means all models.
        """
        return VersionWatch(self._stub, model, after_number)

    def _fetch_stream(
        self, entries: Sequence[weights_pb2.TensorEntry], place: Callable[[weights_pb2.TensorEntry], Bytes]
    ) -> Iterator[tuple[weights_pb2.TensorEntry, Bytes]]:
        num_bytes = sum(weights_manifest.entry_bytes(entry) for entry in entries)
        request = weights_pb2.FetchRequest(sha256=[entry.sha256 for entry in entries])
        with channel.translated_errors():
            call = self._stub.Fetch(request, timeout=self._timeout_s + num_bytes / _SLOWEST_BYTES_PER_S)
            try:
                for entry in entries:
                    into = _receive(call, entry, place)
                    if into is None:
                        return
                    yield entry, into
            finally:
                call.cancel()

    def _call(self, method: Callable[..., ResponseT], request: Message) -> ResponseT:
        return call_with_patience(lambda: method(request, timeout=self._timeout_s), patience_s=self._patience_s)


class VersionWatch(Iterator[PublishedVersion]):
    """What WeightsClient.watch() answers."""

    def __init__(self, stub: weights_pb2_grpc.WeightsServiceStub, model: str, after_number: int) -> None:
        self._stub = stub
        self._model = model
        self._after_number = after_number
        self._newest: dict[str, int] = {}
        self._closed = threading.Event()
        self._call: Any = None
        self._backoff = Backoff()
        self._num_failures = 0

    def close(self) -> None:
        self._closed.set()
        if self._call is not None:
            self._call.cancel()

    def __next__(self) -> PublishedVersion:
        while not self._closed.is_set():
            try:
                with channel.translated_errors():
                    if self._call is None:
                        # All models count for themselves: only a single model's stream can go on from a number.
                        after = self._newest.get(self._model, self._after_number)
                        self._call = self._stub.Watch(weights_pb2.WatchRequest(model=self._model, after_number=after))
                    published = _published(next(self._call))
            except (errors.Unreachable, errors.Cancelled, StopIteration):
                self._call = None
                # No Patience here: it never ends by itself, and close() must not have to wait for it.
                self._closed.wait(self._backoff.wait_s(self._num_failures))
                self._num_failures += 1
                continue
            self._num_failures = 0
            version = published.version
            if version.number > self._newest.get(version.model, self._after_number):
                self._newest[version.model] = version.number
                return published
        raise StopIteration


def _published(message: weights_pb2.WatchResponse) -> PublishedVersion:
    return PublishedVersion(version=message.version, age_s=stamps.to_seconds(message.age), metrics=dict(message.metrics))


def _publish_requests(
    manifest: weights_pb2.Manifest, missing: Mapping[bytes, RawTensor], parent_number: int | None
) -> Iterator[weights_pb2.PublishRequest]:
    header = weights_pb2.PublishHeader(
        manifest=manifest, parent_number=parent_number or 0, require_parent=parent_number is not None
    )
    yield weights_pb2.PublishRequest(header=header)
    for sha256, raw in missing.items():
        for piece in pieces(sha256, raw.data):
            yield weights_pb2.PublishRequest(piece=piece)


def pieces(sha256: bytes, data: bytes | bytearray | memoryview) -> Iterator[weights_pb2.TensorPiece]:
    """One tensor in pieces of at most 4 MiB; an empty tensor is one empty piece."""
    view = memoryview(data).cast("B")
    offset = 0
    while True:
        end = min(offset + PIECE_BYTES, view.nbytes)
        last = end == view.nbytes
        yield weights_pb2.TensorPiece(sha256=sha256, offset=offset, data=bytes(view[offset:end]), last=last)
        if last:
            return
        offset = end


def _receive(
    call: Iterator[weights_pb2.FetchResponse],
    entry: weights_pb2.TensorEntry,
    place: Callable[[weights_pb2.TensorEntry], Bytes],
) -> Bytes | None:
    """Where the next tensor of the stream is, whole; None when the stream ends. The size is the manifest's, not the peer's
    word. Copying and hashing let go of the interpreter."""
    into: Bytes | None = None
    hasher = hashlib.sha256()
    offset, size = 0, weights_manifest.entry_bytes(entry)
    for response in call:
        piece = response.piece
        content = np.frombuffer(piece.data, np.uint8)
        end = offset + content.nbytes
        if piece.sha256 != entry.sha256 or piece.offset != offset or end > size:
            raise errors.Corrupt(
                f"expected byte {offset} of {size} of tensor {entry.sha256.hex()[:16]}, got {content.nbytes} bytes at "
                f"{piece.offset} of {piece.sha256.hex()[:16]}",
                field=entry.name,
            )
        if into is None:
            into = placed(place, entry)
        np.copyto(into[offset:end], content)
        hasher.update(content.data)
        offset = end
        if piece.last:
            if offset != size or hasher.digest() != entry.sha256:
                raise errors.Corrupt(
                    f"{offset} of {size} bytes came, with sha256 {hasher.hexdigest()[:16]} instead of "
                    f"{entry.sha256.hex()[:16]}",
                    field=entry.name,
                )
            return into
    return None


def placed(place: Callable[[weights_pb2.TensorEntry], Bytes], entry: weights_pb2.TensorEntry) -> Bytes:
    """The memory that place answers; InvalidInput where it has not the entry's size."""
    into, size = place(entry), weights_manifest.entry_bytes(entry)
    if into.shape != (size,):
        raise errors.InvalidInput(f"the memory for it has shape {into.shape}, its bytes need ({size},)", field=entry.name)
    return into
