"""What a recorder, a trainer or a viewer says to the dataset store. Blocking.

with DatasetClient("127.0.0.1:50051") as store:
    store.create_dataset("reach", spec)
    with store.open_append() as stream:
        next_sequence = stream.begin("reach", episode_uuid, robot_id="left", spec_digest=spec.digest)
        digest = EpisodeDigest()
        for frame in frames:                                # dataset_pb2.Frame with sequence 0, 1, 2, ...
            digest.add(frame)
            if frame.sequence >= next_sequence:
                stream.send(frame)
        stream.end(digest.frame_count, digest.sha256, dataset_pb2.EPISODE_END_SUCCESS)
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import Message

from .. import channel
from ..dataset.v1 import dataset_pb2, dataset_pb2_grpc
from ..errors import Conflict, Corrupt, InvalidInput, ManyhandsError
from ..retry import Patience, call_with_retry
from ..security import SecuritySettings
from ..spec import Spec
from .append_stream import AppendStream

__all__ = ["AppendStream", "DatasetClient", "EpisodeDigest", "fetch_snapshot"]

ResponseT = TypeVar("ResponseT")
# With a broken stream of samples: enough for a store that restarts.
_SAMPLE_PATIENCE_S = 10.0
_MAX_SNAPSHOT_ATTEMPTS = 20
_REPLACED_FILES = frozenset({"meta/info.json", "meta/stats.json", "meta/tasks.parquet"})


class EpisodeDigest:
    """What End must carry: the count of an episode's frames and the sha256 over them, frame by frame.

    It must see every frame from sequence 0 on, also those that a resumed stream does not send again.
    """

    def __init__(self) -> None:
        self.frame_count = 0
        self._sha256 = hashlib.sha256()

    def add(self, frame: dataset_pb2.Frame) -> bytes:
        """Takes the next frame; returns its deterministic serialisation, which is also what a spool should keep."""
        return self.add_serialised(frame.SerializeToString(deterministic=True))

    def add_serialised(self, payload: bytes) -> bytes:
        self._sha256.update(payload)
        self.frame_count += 1
        return payload

    @property
    def sha256(self) -> bytes:
        return self._sha256.digest()


class DatasetClient(channel.Client):
    """One connection to one store; any number of threads may use it. Everything but appending is retried when unreachable.

    Args:
        address: "host:port".
        timeout_s: Deadline of every short call. Publish has its own: encoding may have to catch up first.
    """

    SERVER = "dataset store"

    def __init__(self, address: str, *, security_settings: SecuritySettings | None = None, timeout_s: float = 10.0) -> None:
        super().__init__(address, security_settings=security_settings)
        self._timeout_s = timeout_s
        self._stub = dataset_pb2_grpc.DatasetServiceStub(self._channel)

    def create_dataset(
        self, name: str, spec: Spec, *, video: dataset_pb2.VideoEncoding | None = None
    ) -> dataset_pb2.DatasetInfo:
        """Makes the dataset, or finds the equal one that is there; AlreadyExists names the first difference."""
        definition = dataset_pb2.DatasetDefinition(name=name, spec=spec.to_proto(), video=video)
        request = dataset_pb2.CreateDatasetRequest(definition=definition)
        return self._call(self._stub.CreateDataset, request).dataset

    def list_datasets(self) -> Sequence[dataset_pb2.DatasetInfo]:
        request = dataset_pb2.ListDatasetsRequest()
        return self._call(self._stub.ListDatasets, request).datasets

    def get_dataset(self, name: str) -> dataset_pb2.DatasetInfo:
        request = dataset_pb2.GetDatasetRequest(dataset=name)
        return self._call(self._stub.GetDataset, request).dataset

    def publish(self, name: str, *, timeout_s: float = 300.0) -> dataset_pb2.DatasetInfo:
        """Returns when readers see every episode that was sealed before the call.

        Raises Overloaded while the store's disk is full; it goes on by itself when there is space.
        """
        request = dataset_pb2.PublishRequest(dataset=name)
        return self._call(self._stub.Publish, request, timeout_s=timeout_s).dataset

    def list_episodes(self, name: str, *, from_index: int = 0) -> Iterator[dataset_pb2.Episode]:
        """Published episodes in index order, fetched a page at a time."""
        while True:
            page = self._list_page(dataset_pb2.ListEpisodesRequest(dataset=name, from_index=from_index, page_size=1000))
            yield from page.episodes
            if page.next_index <= from_index:
                return
            from_index = page.next_index

    def get_snapshot(self, name: str) -> dataset_pb2.GetSnapshotResponse:
        """The published files of this moment, with their digests."""
        request = dataset_pb2.GetSnapshotRequest(dataset=name)
        return self._call(self._stub.GetSnapshot, request)

    def read_shard(
        self, name: str, path: str, *, offset: int = 0, length: int = 0, timeout_s: float = 600.0
    ) -> Iterator[bytes]:
        """The bytes of one published file from offset on (length 0: to its end). Not retried: ask again at an offset."""
        request = dataset_pb2.ReadShardRequest(dataset=name, path=path, offset=offset, length=length)
        with channel.translated_errors():
            for response in self._stub.ReadShard(request, timeout=timeout_s):
                yield response.data

    def sample(self, request: dataset_pb2.SampleRequest) -> Iterator[dataset_pb2.SampleResponse]:
        """Training samples from request.position on; a broken stream is opened again where it broke."""
        position, remaining = request.position, request.count
        patience = Patience(_SAMPLE_PATIENCE_S)
        while True:
            asked = dataset_pb2.SampleRequest()
            asked.CopyFrom(request)
            asked.position, asked.count = position, remaining
            try:
                with channel.translated_errors():
                    for response in self._stub.Sample(asked):
                        yield response
                        position = response.position + 1
                        patience.progress()
                        if request.count:
                            remaining -= 1
                return
            except ManyhandsError as error:
                if request.count and not remaining:
                    return
                patience.wait(error)

    def open_append(self, *, max_queued_frames: int = 64) -> AppendStream:
        """A stream for recording; see AppendStream. A broken one is closed and another opened."""
        return AppendStream(self._stub, max_queued_frames=max_queued_frames)

    def _list_page(self, request: dataset_pb2.ListEpisodesRequest) -> dataset_pb2.ListEpisodesResponse:
        return self._call(self._stub.ListEpisodes, request)

    def _call(self, method: Callable[..., ResponseT], request: Message, *, timeout_s: float | None = None) -> ResponseT:
        """Every call that comes here is idempotent: it is tried again within its deadline."""
        return call_with_retry(
            lambda left_s: method(request, timeout=left_s), timeout_s=timeout_s or self._timeout_s, idempotent=True
        )


def fetch_snapshot(client: DatasetClient, dataset: str, cache_dir: Path) -> Path:
    """Copies the published dataset into cache_dir and returns its root there, every file checked against its digest.

    Files that an earlier fetch brought (whole or in part, of this or another snapshot) are not copied again. The returned
    root never changes: newer episodes come with another root from another call.

    Raises:
        NotFound: No such dataset, or nothing is published yet.
        Corrupt: A file does not have the digest that the store declares.
    """
    objects = cache_dir / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    for _ in range(_MAX_SNAPSHOT_ATTEMPTS):
        snapshot = client.get_snapshot(dataset)
        root = cache_dir / dataset / snapshot.digest.hex()[:16]
        if root.exists():
            return root
        # The three files below meta/ are replaced by every publishing: first, while they are still those of the snapshot.
        for file in snapshot.files:
            _check_path(file.path)
        files = sorted(snapshot.files, key=lambda file: (file.path not in _REPLACED_FILES, file.path))
        if all(_fetch_file(client, dataset, file, objects) for file in files):
            return _link_root(root, snapshot.files, objects)
    raise Conflict(f"dataset {dataset!r} was published {_MAX_SNAPSHOT_ATTEMPTS} times while it was copied; try again")


def _check_path(path: str) -> None:
    """The store's word is not enough for writing outside of the cache."""
    parts = path.split("/")
    if not path or any(part in ("", ".", "..") for part in parts) or "\\" in path or "\0" in path:
        raise InvalidInput(f"path {path!r} in the snapshot is not one below its root", field="path")


def _fetch_file(client: DatasetClient, dataset: str, file: dataset_pb2.ShardFile, objects: Path) -> bool:
    """Brings one file into objects; False where the store has replaced it since the snapshot."""
    final = objects / file.sha256.hex()
    if final.exists():
        return True
    partial = final.with_suffix(".part")
    offset = partial.stat().st_size if partial.exists() else 0
    if offset >= file.size_bytes:
        offset = 0
    with partial.open("r+b" if offset else "wb") as out:
        out.truncate(offset)
        out.seek(offset)
        # ReadShard's length 0 means to the end, which is right here: published files do not grow.
        for data in client.read_shard(dataset, file.path, offset=offset):
            out.write(data)
            if out.tell() > file.size_bytes:  # The digest will not fit, and the disk is not to be filled.
                break
        out.flush()
        os.fsync(out.fileno())
    with partial.open("rb") as written:
        sha256 = hashlib.file_digest(written, "sha256").digest()
    if sha256 != file.sha256:
        partial.unlink()
        if file.path in _REPLACED_FILES:
            return False
        raise Corrupt(
            f"{file.path} of dataset {dataset!r} has digest {sha256.hex()[:16]}, the store declares "
            f"{file.sha256.hex()[:16]}; run 'manyhands dataset verify' on the store's machine",
            field=file.path,
        )
    partial.rename(final)
    return True


def _link_root(root: Path, files: Sequence[dataset_pb2.ShardFile], objects: Path) -> Path:
    building = root.with_name(f"{root.name}.{uuid.uuid4().hex[:8]}.tmp")
    for file in files:
        path = building / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.hardlink_to(objects / file.sha256.hex())
    try:
        building.rename(root)
    except OSError:
        if not root.exists():  # Another process may have built the same root meanwhile; its content is the same.
            raise
        shutil.rmtree(building)
    return root
