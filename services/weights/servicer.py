"""WeightsService over a WeightsStore: streams in and out, and one wake-up for all watchers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, ParamSpec, TypeVar

from manyhands import stamps, weights_manifest
from manyhands.common.v1 import common_pb2
from manyhands.errors import InvalidInput, Overloaded, TooLate
from manyhands.weights.v1 import weights_pb2, weights_pb2_grpc

from .files import TensorWriter
from .store import StoredVersion, WeightsStore, full_disk_as_overloaded

logger = logging.getLogger(__name__)

P = ParamSpec("P")
ResultT = TypeVar("ResultT")
Context = Any

# Of a tensor's file at once.
READ_BYTES = 4 * 1024 * 1024
# As a reader gets them. Its libraries copy a message several times while they hold its interpreter: 0.02 ms each time at
# this size, 0.1 to 0.4 ms at 4 MiB, where every copy takes fresh pages from the kernel besides, which makes it slower.
FETCHED_PIECE_BYTES = 512 * 1024


class WeightsServicer(weights_pb2_grpc.WeightsServiceServicer):
    """Args:
    max_publishing: Streams that may publish at once; one more is told to come again.
    idle_timeout_s: A publishing stream that says nothing for this long is ended.
    """

    def __init__(self, store: WeightsStore, *, max_publishing: int = 4, idle_timeout_s: float = 60.0) -> None:
        self._store = store
        self._max_publishing = max_publishing
        self._idle_timeout_s = idle_timeout_s
        self._publishing = 0
        # Hashing and fsync release the interpreter lock; a few threads keep a disk busy.
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="weights")
        self._news = asyncio.Event()
        self._draining = False

    async def drain(self) -> None:
        """Ends all watches, so that their clients reconnect elsewhere or later."""
        self._draining = True
        self._wake()

    async def FindMissing(  # noqa: N802
        self, request: weights_pb2.FindMissingRequest, context: Context
    ) -> weights_pb2.FindMissingResponse:
        _check_count(len(request.sha256))
        return weights_pb2.FindMissingResponse(sha256=await self._run(self._store.missing, list(request.sha256)))

    async def Publish(  # noqa: N802
        self, request_iterator: AsyncIterator[weights_pb2.PublishRequest], context: Context
    ) -> weights_pb2.PublishResponse:
        if self._publishing >= self._max_publishing:
            raise Overloaded(f"{self._publishing} learners are publishing, the most at once", retry_after_s=1.0)
        self._publishing += 1
        try:
            return await self._publish(self._within_idle_timeout(request_iterator))
        finally:
            self._publishing -= 1

    async def Watch(  # noqa: N802
        self, request: weights_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[weights_pb2.WatchResponse]:
        if request.model:
            weights_manifest.check_model_name(request.model)
        after_order = 0
        while not self._draining:
            # Taken before reading: what is published in between wakes this watcher at once.
            news = self._news
            for stored in self._store.versions(request.model, after_order=after_order):
                after_order = stored.order
                if stored.version.number > request.after_number:
                    yield _watched(stored)
            await news.wait()

    async def Fetch(  # noqa: N802
        self, request: weights_pb2.FetchRequest, context: Context
    ) -> AsyncIterator[weights_pb2.FetchResponse]:
        _check_count(len(request.sha256))
        for sha256 in request.sha256:
            file = await self._run(self._store.open_tensor, sha256)
            with file:
                async for piece in self._pieces(sha256, file):
                    yield weights_pb2.FetchResponse(piece=piece)

    async def GetManifest(  # noqa: N802
        self, request: weights_pb2.GetManifestRequest, context: Context
    ) -> weights_pb2.GetManifestResponse:
        if request.number < 0:
            raise InvalidInput(f"{request.number} must be 0 (the newest) or more", field="number")
        stored = self._store.get(request.model, request.number)
        return weights_pb2.GetManifestResponse(manifest=stored.manifest, version=stored.version)

    async def ListVersions(  # noqa: N802
        self, request: weights_pb2.ListVersionsRequest, context: Context
    ) -> weights_pb2.ListVersionsResponse:
        return weights_pb2.ListVersionsResponse(
            versions=[_watched(stored) for stored in self._store.versions(request.model)]
        )

    async def _pieces(self, sha256: bytes, file: BinaryIO) -> AsyncIterator[weights_pb2.TensorPiece]:
        """Of one tensor, the last marked; an empty tensor is one empty piece. A read brings many: it changes threads."""
        offset = 0
        data = await self._run(file.read, READ_BYTES)
        while True:
            following = await self._run(file.read, READ_BYTES) if data else b""
            for begin in range(0, max(len(data), 1), FETCHED_PIECE_BYTES):
                content = data[begin : begin + FETCHED_PIECE_BYTES]
                is_last = not following and begin + len(content) == len(data)
                yield weights_pb2.TensorPiece(sha256=sha256, offset=offset + begin, data=content, last=is_last)
            if not following:
                return
            offset += len(data)
            data = following

    async def _publish(self, requests: AsyncIterator[weights_pb2.PublishRequest]) -> weights_pb2.PublishResponse:
        first = await anext(requests, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidInput("the first message of the stream must be the header with the manifest", field="header")
        header = first.header
        manifest = header.manifest
        await self._run(weights_manifest.check, manifest)
        existing = await self._run(self._store.published_as, manifest)
        if existing is not None:
            return weights_pb2.PublishResponse(version=existing)
        sizes = await self._run(self._store.admit, manifest)
        with self._store.pinned(sizes):
            received_bytes = await self._receive(requests, sizes)
            parent_number = header.parent_number if header.require_parent else None
            with full_disk_as_overloaded():
                published = await self._run(self._store.publish, manifest, parent_number=parent_number)
        if isinstance(published, common_pb2.PolicyVersion):  # Another stream with this publish_id was faster.
            return weights_pb2.PublishResponse(version=published, received_bytes=received_bytes)
        version = published.version
        logger.info(
            "version %d of %s (%s): %d new of %d bytes",
            version.number, version.model, manifest.publish_id, received_bytes, sum(sizes.values()),
        )  # fmt: skip
        self._wake()
        removed = await self._run(self._store.retire)
        if removed:
            logger.info("removed %d tensors that no version names", removed)
        return weights_pb2.PublishResponse(version=version, received_bytes=received_bytes)

    async def _receive(self, requests: AsyncIterator[weights_pb2.PublishRequest], sizes: dict[bytes, int]) -> int:
        """Tensors to disk, each as soon as it is whole, so that a stream that breaks later keeps it."""
        received_bytes = 0
        with contextlib.ExitStack() as open_writer:
            writer: TensorWriter | None = None
            async for request in requests:
                if request.WhichOneof("part") != "piece":
                    raise InvalidInput("only pieces follow the header", field="piece")
                piece = request.piece
                data = piece.data  # Each read of a bytes field copies it: once.
                weights_manifest.check_digest(piece.sha256, field="piece.sha256")
                if len(data) > weights_manifest.PIECE_BYTES:
                    raise InvalidInput(
                        f"has {len(data)} bytes, over the limit of {weights_manifest.PIECE_BYTES}", field="piece.data"
                    )
                if writer is None:
                    if piece.sha256 not in sizes:
                        raise InvalidInput("the manifest names no such tensor", field=f"tensor {piece.sha256.hex()}")
                    writer = open_writer.enter_context(self._store.writer(piece.sha256, sizes[piece.sha256]))
                elif piece.sha256 != writer.sha256:
                    raise InvalidInput(
                        f"a piece of {piece.sha256.hex()} came before its last one; a tensor's pieces are together",
                        field=writer.label,
                    )
                with full_disk_as_overloaded():
                    await self._run(writer.write, piece.offset, data)
                    received_bytes += len(data)
                    if piece.last:
                        await self._run(writer.finish)
                        open_writer.close()
                        writer = None
            if writer is not None:
                raise InvalidInput(f"the stream ended after {writer.offset} bytes of it", field=writer.label)
        return received_bytes

    async def _within_idle_timeout(
        self, requests: AsyncIterator[weights_pb2.PublishRequest]
    ) -> AsyncIterator[weights_pb2.PublishRequest]:
        while True:
            try:
                async with asyncio.timeout(self._idle_timeout_s):
                    request = await anext(requests, None)
            except TimeoutError:
                raise TooLate(
                    f"nothing came for {self._idle_timeout_s:g} s; publish again, whole tensors are kept"
                ) from None
            if request is None:
                return
            yield request

    async def _run(self, call: Callable[P, ResultT], *args: P.args, **kwargs: P.kwargs) -> ResultT:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, functools.partial(call, *args, **kwargs))

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


def _check_count(count: int) -> None:
    if count > weights_manifest.MAX_TENSORS:
        raise InvalidInput(f"{count} digests, at most {weights_manifest.MAX_TENSORS}; ask in parts", field="sha256")


def _watched(stored: StoredVersion) -> weights_pb2.WatchResponse:
    age_s = max(0.0, time.time() - stored.published_unix_s)
    return weights_pb2.WatchResponse(
        version=stored.version, age=stamps.to_duration(age_s), metrics=dict(stored.manifest.metrics)
    )
