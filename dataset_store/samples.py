"""DatasetService.Sample: the sampler's order over the newest published root, one whole sample at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np

from manyhands import codec, stamps
from manyhands.dataset.v1 import dataset_pb2
from manyhands.errors import InvalidInput, NotFound

from .reader import DatasetReader
from .sampler import Sampler
from .store import Store

_MAX_HORIZON = 1000


class SampleSource:
    """Keeps one open reader a dataset, opened again when more is published."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._readers: dict[str, DatasetReader] = {}

    def stream(self, request: dataset_pb2.SampleRequest) -> Iterator[dataset_pb2.SampleResponse]:
        """Checks the request and answers the samples; each costs work only when it is taken.

        The dataset is that of the moment of the call. Who continues a stream while episodes are published continues over
        another dataset; a snapshot (GetSnapshot) holds still.
        """
        if not 1 <= request.horizon <= _MAX_HORIZON:
            raise InvalidInput(f"horizon ({request.horizon}) must be 1 to {_MAX_HORIZON}", field="horizon")
        if request.count < 0:
            raise InvalidInput(f"count ({request.count}) must be >= 0", field="count")
        reader = self._reader(request.dataset)
        for name in request.image_features:
            if name not in reader.cameras:
                raise InvalidInput(f"is no camera of this dataset; it has {', '.join(reader.cameras)}", field=name)
        sampler = Sampler(
            num_frames=reader.num_frames,
            seed=request.seed,
            rank=request.rank,
            world_size=request.world_size,
        )
        length = sampler.epoch_length()
        sampler.in_epoch(request.epoch, request.position, 0)
        stop = min(length, request.position + request.count) if request.count else length
        return self._samples(reader, sampler, request, stop)

    def _samples(
        self, reader: DatasetReader, sampler: Sampler, request: dataset_pb2.SampleRequest, stop: int
    ) -> Iterator[dataset_pb2.SampleResponse]:
        actions = np.concatenate(
            [reader.columns[f.name].reshape(reader.num_frames, -1) for f in reader.spec.action], axis=1, dtype=np.float32
        )
        for position in range(request.position, stop):
            index = int(sampler.in_epoch(request.epoch, position, 1)[0])
            episode = reader.episodes[int(reader.episode_of(np.array([index]))[0])]
            frame = index - episode.from_index
            steps = index + np.arange(request.horizon)
            observation = {feature.name: reader.columns[feature.name][index].reshape(-1) for feature in reader.spec.states}
            for camera in request.image_features:
                observation[camera] = next(iter(reader.pictures(camera, episode.index, [frame])))
            yield dataset_pb2.SampleResponse(
                position=position,
                episode_index=episode.index,
                frame_index=frame,
                task=reader.tasks[int(reader.columns["task_index"][index])],
                observation=codec.encode_values(observation),
                actions=codec.encode_tensor(actions[np.minimum(steps, episode.to_index - 1)]),
                is_pad=codec.encode_tensor(steps >= episode.to_index),
                timestamp=stamps.to_duration(frame / reader.fps),
            )

    def _reader(self, dataset: str) -> DatasetReader:
        episode_count = self._store.info(dataset).episode_count
        if not episode_count:
            raise NotFound(f"nothing of dataset {dataset!r} is published yet; Publish does it", field="dataset")
        with self._lock:
            reader = self._readers.get(dataset)
            if reader is None or reader.num_episodes < episode_count:
                reader = self._readers[dataset] = DatasetReader(self._store.published_root(dataset))
            return reader
