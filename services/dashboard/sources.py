"""What the shared services say: versions served and published, learning, datasets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from manyhands import channel, errors
from manyhands.dataset.v1 import dataset_pb2, dataset_pb2_grpc
from manyhands.inference.v1 import inference_pb2, inference_pb2_grpc
from manyhands.learner.v1 import learner_pb2, learner_pb2_grpc
from manyhands.weights.v1 import weights_pb2, weights_pb2_grpc

from . import shapes
from .feed import Json
from .upstream import Upstream, keep_trying

CALL_TIMEOUT_S = 3.0
POLL_INTERVAL_S = 1.0
DATASETS_INTERVAL_S = 2.0
VERSIONS_KEPT = 200
POINTS_KEPT = 5000


def watch_inference(upstream: Upstream, address: str) -> None:
    """Topic "inference": sessions, stage times, swaps, models."""
    stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(upstream.channel(address))

    async def poll() -> None:
        status = await stub.GetStatus(inference_pb2.GetStatusRequest(), timeout=CALL_TIMEOUT_S)
        upstream.feed.set("inference", shapes.inference_status(status, now_s=upstream.feed.now_s()))

    upstream.add_service("inference", address)
    upstream.spawn(keep_trying("inference", poll, pause_s=POLL_INTERVAL_S), "inference")


def watch_weights(upstream: Upstream, address: str) -> None:
    """Topic "versions": what was published, newest last."""
    stub: weights_pb2_grpc.WeightsServiceAsyncStub = weights_pb2_grpc.WeightsServiceStub(upstream.channel(address))

    async def watch() -> None:
        # A stream begins with all versions there are: what was retired meanwhile is gone from the list.
        versions: list[Json] = []
        async for response in stub.Watch(weights_pb2.WatchRequest()):
            published = upstream.feed.now_s() - shapes.milliseconds(response.age) / 1000
            versions.append(
                {
                    "version": shapes.version(response.version),
                    "t": round(published, 1),
                    "metrics": shapes.metrics(response.metrics),
                }
            )
            versions = versions[-VERSIONS_KEPT:]
            upstream.feed.set("versions", list(versions))

    upstream.add_service("weights", address)
    upstream.spawn(keep_trying("weights", watch), "weights")


def watch_learner(upstream: Upstream, address: str) -> None:
    """Topics "learner" (status) and "learner:points" (curves of the present run)."""
    feed = upstream.feed
    stub: learner_pb2_grpc.LearnerServiceAsyncStub = learner_pb2_grpc.LearnerServiceStub(upstream.channel(address))

    async def status() -> None:
        answer = await stub.GetStatus(learner_pb2.GetStatusRequest(), timeout=CALL_TIMEOUT_S)
        feed.set("learner", shapes.learner_status(answer))

    async def progress() -> None:
        # Each stream tells the whole run again: what was published late, while nobody listened, is in it.
        shown_run: str | None = None
        async for response in stub.WatchProgress(learner_pb2.WatchProgressRequest()):
            if response.status.run.run_id != shown_run:
                shown_run = response.status.run.run_id
                feed.clear("learner:points")
            if response.metrics or response.HasField("published"):
                feed.append("learner:points", shapes.learner_point(response), keep=POINTS_KEPT)

    upstream.add_service("learner", address)
    upstream.spawn(keep_trying("learner", status, pause_s=POLL_INTERVAL_S), "learner status")
    upstream.spawn(keep_trying("learner's progress", progress), "learner progress")


class DatasetReader:
    """The store: topic "datasets", and on demand episodes and ranges of their videos."""

    def __init__(self, upstream: Upstream, address: str) -> None:
        self._stub: dataset_pb2_grpc.DatasetServiceAsyncStub = dataset_pb2_grpc.DatasetServiceStub(upstream.channel(address))
        self._feed = upstream.feed
        self._sizes: dict[str, dict[str, int]] = {}
        self._refreshing = asyncio.Lock()
        upstream.add_service("store", address)
        upstream.spawn(keep_trying("store", self._poll, pause_s=DATASETS_INTERVAL_S), "store")

    async def episodes(self, dataset: str, *, from_index: int, page_size: int) -> Json:
        request = dataset_pb2.ListEpisodesRequest(dataset=dataset, from_index=from_index, page_size=page_size)
        with channel.translated_errors():
            answer = await self._stub.ListEpisodes(request, timeout=CALL_TIMEOUT_S)
        return {
            "episodes": [shapes.episode(episode) for episode in answer.episodes],
            "next_index": answer.next_index,
        }

    async def size_bytes(self, dataset: str, path: str) -> int:
        """Of a published file. Published files never change, so one look is enough. Raises NotFound for any other path."""
        if path not in self._sizes.get(dataset, {}):
            async with self._refreshing:
                if path not in self._sizes.get(dataset, {}):
                    with channel.translated_errors():
                        request = dataset_pb2.GetSnapshotRequest(dataset=dataset)
                        snapshot = await self._stub.GetSnapshot(request, timeout=CALL_TIMEOUT_S)
                    self._sizes[dataset] = {file.path: file.size_bytes for file in snapshot.files}
        size = self._sizes[dataset].get(path)
        if size is None:
            raise errors.NotFound(f"{dataset} has no published file {path!r}", field="path")
        return size

    async def read(self, dataset: str, path: str, *, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """The bytes of a range of a published file, as the store sends them."""
        request = dataset_pb2.ReadShardRequest(dataset=dataset, path=path, offset=offset, length=length)
        call = self._stub.ReadShard(request)
        try:
            with channel.translated_errors():
                async for response in call:
                    yield response.data
        finally:
            call.cancel()

    async def _poll(self) -> None:
        answer = await self._stub.ListDatasets(dataset_pb2.ListDatasetsRequest(), timeout=CALL_TIMEOUT_S)
        self._feed.set("datasets", [shapes.dataset(info) for info in answer.datasets])
