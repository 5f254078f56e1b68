"""DatasetService over one Store: messages to calls on worker threads, so that the event loop never waits for a disk."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc

from manyhands.dataset.v1 import dataset_pb2, dataset_pb2_grpc
from manyhands.errors import InvalidInput, NotFound, Overloaded

from .definition import Definition
from .ingest import AppendSession
from .layout import INFO, snapshot_digest
from .samples import SampleSource
from .store import Store

T = TypeVar("T")

_PIECE_BYTES = 1024 * 1024
# Of one stream, received and not yet logged: beyond it gRPC's flow control stops the recorder.
_MAX_QUEUED_BYTES = 32 * 1024 * 1024
# A thread hop costs as much as a sample without pictures.
_SAMPLES_AT_ONCE = 16
_DEFAULT_PAGE = 100
_MAX_PAGE = 1000


class DatasetService(dataset_pb2_grpc.DatasetServiceServicer):
    """Args: max_streams: Recorders at once; each has a thread while its frames are written."""

    def __init__(self, store: Store, *, max_streams: int = 64) -> None:
        self._store = store
        self._max_streams = max_streams
        self._num_streams = 0
        self._writers = ThreadPoolExecutor(max_streams, "ingest")
        self._readers = ThreadPoolExecutor(8, "read")
        self._samples = SampleSource(store)

    def close(self) -> None:
        self._writers.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)

    async def CreateDataset(  # noqa: N802
        self, request: dataset_pb2.CreateDatasetRequest, context: Any
    ) -> dataset_pb2.CreateDatasetResponse:
        definition = Definition.from_proto(request.definition)
        return dataset_pb2.CreateDatasetResponse(dataset=await self._read(self._store.create_dataset, definition))

    async def ListDatasets(  # noqa: N802
        self, request: dataset_pb2.ListDatasetsRequest, context: Any
    ) -> dataset_pb2.ListDatasetsResponse:
        return dataset_pb2.ListDatasetsResponse(datasets=await self._read(self._list_datasets))

    async def GetDataset(  # noqa: N802
        self, request: dataset_pb2.GetDatasetRequest, context: Any
    ) -> dataset_pb2.GetDatasetResponse:
        return dataset_pb2.GetDatasetResponse(dataset=await self._read(self._store.info, request.dataset))

    async def AppendEpisode(  # noqa: N802
        self, request_iterator: AsyncIterator[dataset_pb2.AppendEpisodeRequest], context: Any
    ) -> AsyncIterator[dataset_pb2.AppendEpisodeResponse]:
        if self._num_streams >= self._max_streams:
            raise Overloaded(f"{self._num_streams} recorders are connected, the limit (--max-streams)", retry_after_s=5.0)
        self._num_streams += 1
        session = AppendSession(self._store)
        inbox = _Inbox()
        receiving = asyncio.create_task(inbox.fill(request_iterator))
        loop = asyncio.get_running_loop()
        try:
            while requests := await inbox.take():
                # Shielded: a recorder that goes away must not cut a write in two threads' hands.
                working = loop.run_in_executor(self._writers, session.process, requests)
                try:
                    responses, error = await asyncio.shield(working)
                except asyncio.CancelledError:
                    await asyncio.wait([working])
                    raise
                for response in responses:
                    yield response
                if error is not None:
                    raise error
        finally:
            receiving.cancel()
            session.close()
            self._num_streams -= 1

    async def Publish(  # noqa: N802
        self, request: dataset_pb2.PublishRequest, context: Any
    ) -> dataset_pb2.PublishResponse:
        return dataset_pb2.PublishResponse(dataset=await self._read(self._store.publish, request.dataset))

    async def ListEpisodes(  # noqa: N802
        self, request: dataset_pb2.ListEpisodesRequest, context: Any
    ) -> dataset_pb2.ListEpisodesResponse:
        if not 0 <= request.page_size <= _MAX_PAGE:
            raise InvalidInput(f"page_size ({request.page_size}) must be 0 to {_MAX_PAGE}", field="page_size")
        if request.from_index < 0:
            raise InvalidInput(f"from_index ({request.from_index}) must be >= 0", field="from_index")
        return await self._read(self._list_episodes, request.dataset, request.from_index, request.page_size or _DEFAULT_PAGE)

    async def GetSnapshot(  # noqa: N802
        self, request: dataset_pb2.GetSnapshotRequest, context: Any
    ) -> dataset_pb2.GetSnapshotResponse:
        return await self._read(self._snapshot, request.dataset)

    async def ReadShard(  # noqa: N802
        self, request: dataset_pb2.ReadShardRequest, context: Any
    ) -> AsyncIterator[dataset_pb2.ReadShardResponse]:
        file = await self._read(self._open_shard, request)
        with contextlib.closing(file):
            offset = request.offset
            end = offset + request.length if request.length else None
            while True:
                size = _PIECE_BYTES if end is None else min(_PIECE_BYTES, end - offset)
                data = await self._read(file.read, size)
                if not data:
                    return
                yield dataset_pb2.ReadShardResponse(offset=offset, data=data)
                offset += len(data)

    async def Sample(  # noqa: N802
        self, request: dataset_pb2.SampleRequest, context: Any
    ) -> AsyncIterator[dataset_pb2.SampleResponse]:
        stream = await self._read(self._samples.stream, request)
        while pieces := await self._read(_take_some, stream):
            for response in pieces:
                yield response

    def _list_datasets(self) -> list[dataset_pb2.DatasetInfo]:
        return [self._store.info(definition.name) for definition in self._store.catalogue.datasets()]

    def _list_episodes(self, dataset: str, from_index: int, count: int) -> dataset_pb2.ListEpisodesResponse:
        definition = self._store.definition(dataset)
        catalogue = self._store.catalogue
        page = catalogue.published(dataset, from_index, count + 1)
        has_more = len(page) > count
        page = page[:count]
        episodes = []
        for episode in page:
            first = catalogue.first_frame_of_batch(dataset, episode)
            assert episode.first_frame is not None
            start = episode.first_frame - first
            spans = [
                dataset_pb2.VideoSpan(
                    feature=camera.name,
                    path=episode.files.video(camera.name),
                    from_timestamp_s=start / definition.fps,
                    to_timestamp_s=(start + episode.frame_count) / definition.fps,
                )
                for camera in definition.cameras
            ]
            episodes.append(
                dataset_pb2.Episode(
                    index=episode.episode_index or 0,
                    episode_uuid=episode.uuid,
                    frame_count=episode.frame_count,
                    tasks=episode.tasks,
                    reason=dataset_pb2.EpisodeEnd.ValueType(episode.reason),
                    robot_id=episode.robot_id,
                    versions=episode.versions,
                    videos=spans,
                )
            )
        return dataset_pb2.ListEpisodesResponse(episodes=episodes, next_index=episodes[-1].index + 1 if has_more else 0)

    def _snapshot(self, dataset: str) -> dataset_pb2.GetSnapshotResponse:
        self._store.definition(dataset)
        files, counts = self._store.catalogue.snapshot(dataset)
        if not files:
            raise NotFound(f"nothing of dataset {dataset!r} is published yet; Publish does it", field="dataset")
        return dataset_pb2.GetSnapshotResponse(
            dataset=dataset,
            digest=snapshot_digest(files),
            files=[dataset_pb2.ShardFile(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256) for file in files],
            episode_count=counts.episodes,
            frame_count=counts.frames,
        )

    def _open_shard(self, request: dataset_pb2.ReadShardRequest) -> Any:
        self._store.definition(request.dataset)
        # Only a path that the catalogue has is ever joined to the root.
        if not self._store.catalogue.has_file(request.dataset, request.path):
            raise NotFound(
                f"{request.path!r} is not in the snapshot of dataset {request.dataset!r}; {INFO} is, for one", field="path"
            )
        path = self._store.published_root(request.dataset) / request.path
        size = path.stat().st_size
        if not 0 <= request.offset <= size or request.length < 0:
            raise InvalidInput(
                f"offset {request.offset} and length {request.length} must lie within {size} bytes", field="offset"
            )
        file = path.open("rb")
        file.seek(request.offset)
        return file

    async def _read(self, call: Callable[..., T], *arguments: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, functools.partial(call, *arguments))


def _take_some(stream: Iterator[dataset_pb2.SampleResponse]) -> list[dataset_pb2.SampleResponse]:
    return list(itertools.islice(stream, _SAMPLES_AT_ONCE))


class _Inbox:
    """Requests that have arrived and wait for the writer, bounded in bytes."""

    def __init__(self) -> None:
        self._requests: list[dataset_pb2.AppendEpisodeRequest] = []
        self._num_bytes = 0
        self._is_over = False
        self._changed = asyncio.Event()
        self._taken = asyncio.Event()

    async def fill(self, requests: AsyncIterator[dataset_pb2.AppendEpisodeRequest]) -> None:
        try:
            async for request in requests:
                while self._num_bytes > _MAX_QUEUED_BYTES:
                    self._taken.clear()
                    await self._taken.wait()
                self._requests.append(request)
                self._num_bytes += request.ByteSize()
                self._changed.set()
        except grpc.aio.UsageError:
            pass  # gRPC says so when the stream was cancelled meanwhile.
        finally:
            self._is_over = True
            self._changed.set()

    async def take(self) -> list[dataset_pb2.AppendEpisodeRequest]:
        """All that is there, at least one; empty at the stream's end."""
        while not self._requests and not self._is_over:
            self._changed.clear()
            await self._changed.wait()
        requests, self._requests, self._num_bytes = self._requests, [], 0
        self._taken.set()
        return requests
