"""A dataset as model inputs, by frame index.

Preparing inputs (decoding, resizing, normalising) is the same for a frame every time, so all of them are made once where
they fit into memory; else the next batch is made while the present one trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dataset_store.reader import DatasetReader, EpisodeRow
from manyhands.errors import InvalidInput
from policies import rows
from policies.normalization import compute_statistics
from policies.policy import Policy, Sample

Indices = npt.NDArray[np.int64]
_CPU = torch.device("cpu")
# Rows that statistics of relative actions are taken of: more change no digit that matters.
_MAX_STATISTICS_ROWS = 4_000_000


class Demonstrations:
    """Samples with action chunks of a published root.

    Attributes:
        spec, num_frames: Of the data.
        horizon: Actions of a chunk, H.
        actions: (num_frames, R) float32, in the robot's units.
        states: (num_frames, S) float32, in the robot's units.
    """

    def __init__(self, reader: DatasetReader, *, horizon: int) -> None:
        self._reader = reader
        if not reader.num_frames:
            raise InvalidInput("has no published frames; record and publish episodes first", field="run.dataset")
        self.spec = reader.spec
        self.num_frames = reader.num_frames
        self.horizon = horizon
        self.actions = self._joined([feature.name for feature in self.spec.action])
        self.states = self._joined([feature.name for feature in self.spec.states])

    @property
    def digest(self) -> bytes:
        """Equal digests are equal states, actions and episodes."""
        return self._reader.digest

    @property
    def has_annotations(self) -> bool:
        return self._reader.has_language

    def samples(self, indices: Sequence[int], observations: frozenset[str]) -> list[Sample]:
        """In the order asked for, with only the observations that are needed: pictures cost most."""
        cameras = [feature.name for feature in self.spec.images if feature.name in observations]
        pictures = {camera: self._pictures(camera, indices) for camera in cameras}
        return [self._sample(index, {camera: found[index] for camera, found in pictures.items()}) for index in indices]

    def episode_ranges(self) -> list[range]:
        return [range(episode.from_index, episode.to_index) for episode in self._reader.episodes]

    def statistics(
        self, relative_action_mask: npt.NDArray[np.bool_] | None
    ) -> dict[str, dict[str, npt.NDArray[np.float64]]]:
        """As the store keeps them; for relative actions those of the chunks' differences from the state."""
        statistics = dict(self._reader.statistics)
        if relative_action_mask is not None:
            statistics |= self._relative_statistics(relative_action_mask)
        return statistics

    def frame(self, index: int) -> Sample:
        """Without observations and actions: what a recipe of messages looks at."""
        episode = self._episode_of(index)
        return Sample(
            observation={},
            task=self._reader.tasks[int(self._reader.columns["task_index"][index])],
            annotations=self._reader.language_of(index),
            index=index,
            timestamp_s=(index - episode.from_index) / self._reader.fps,
        )

    def frames_without_task(self) -> Indices:
        """Indices, ascending."""
        empty = [number for number, task in enumerate(self._reader.tasks) if not task.strip()]
        return np.flatnonzero(np.isin(self._reader.columns["task_index"], empty)).astype(np.int64)

    def event_frames(self) -> Indices:
        """Indices of the frames that have language of their own, ascending."""
        return self._reader.event_frames()

    def _sample(self, index: int, pictures: Mapping[str, npt.NDArray[np.uint8]]) -> Sample:
        columns = self._reader.columns
        steps = index + np.arange(self.horizon)
        end = self._episode_of(index).to_index
        numbers = {feature.name: columns[feature.name][index].reshape(feature.shape) for feature in self.spec.states}
        return dataclasses.replace(
            self.frame(index),
            observation={**numbers, **pictures},
            actions=self.actions[np.minimum(steps, end - 1)],
            is_pad=steps >= end,
        )

    def _pictures(self, camera: str, indices: Sequence[int]) -> dict[int, npt.NDArray[np.uint8]]:
        """By index; every episode is decoded forwards once."""
        wanted = np.unique(np.asarray(indices, np.int64))
        episodes = self._reader.episode_of(wanted)
        found: dict[int, npt.NDArray[np.uint8]] = {}
        for episode in np.unique(episodes):
            own = wanted[episodes == episode]
            first = self._reader.episodes[int(episode)].from_index
            decoded = self._reader.pictures(camera, int(episode), [int(index) - first for index in own])
            found.update(zip((int(index) for index in own), decoded, strict=True))
        return found

    def _relative_statistics(self, mask: npt.NDArray[np.bool_]) -> dict[str, dict[str, npt.NDArray[np.float64]]]:
        """Of action minus the state at the chunk's start, over the chunks that lie whole in an episode.

        Of a large dataset every n-th chunk is taken. Where no episode is long enough, chunks repeat their last action, as
        training has it.
        """
        starts = self._chunk_starts()
        stride = -(-len(starts) * self.horizon // _MAX_STATISTICS_ROWS)
        starts = starts[:: max(stride, 1)]
        ends = self._reader.episode_starts[self._reader.episode_of(starts) + 1]
        steps = np.minimum(starts[:, None] + np.arange(self.horizon), ends[:, None] - 1)
        anchors = np.zeros((len(starts), len(mask)), np.float32)
        size = min(len(mask), self.states.shape[1])
        anchors[:, :size] = self.states[starts, :size]
        values = self.actions[steps] - (anchors * mask)[:, None, :]
        statistics = {}
        offset = 0
        for feature in self.spec.action:
            size = feature.shape[0]
            statistics[feature.name] = compute_statistics(values[..., offset : offset + size])
            offset += size
        return statistics

    def _chunk_starts(self) -> Indices:
        whole = [np.arange(r.start, r.stop - self.horizon + 1) for r in self.episode_ranges()]
        starts = np.concatenate(whole).astype(np.int64)
        return starts if len(starts) else np.arange(self.num_frames)

    def _episode_of(self, index: int) -> EpisodeRow:
        return self._reader.episodes[int(self._reader.episode_of(np.array([index]))[0])]

    def _joined(self, names: Sequence[str]) -> npt.NDArray[np.float32]:
        columns = [self._reader.columns[name].reshape(self.num_frames, -1) for name in names]
        return np.concatenate([np.zeros((self.num_frames, 0)), *columns], axis=1, dtype=np.float32)


class Batches:
    """Model inputs of frames, from memory or made one batch ahead.

    Args:
        max_cached_bytes: Inputs of the whole dataset are kept up to this size.
    """

    def __init__(self, demonstrations: Demonstrations, policy: Policy[Any], *, max_cached_bytes: int) -> None:
        self._demonstrations = demonstrations
        self._policy = policy
        self._observations = policy.used_observations()
        self._cached = self._prepare_all(max_cached_bytes)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[bytes, Future[Any]] | None = None

    @property
    def is_cached(self) -> bool:
        return self._cached is not None

    def get(self, indices: Indices, upcoming: Indices) -> Any:
        """InputsT of indices; upcoming is what will be asked for next."""
        if self._cached is not None:
            return rows.select(self._cached, torch.from_numpy(indices))
        if self._ahead is not None and self._ahead[0] == indices.tobytes():
            inputs = self._ahead[1].result()
        else:
            inputs = self._prepare(indices.tolist())
        self._ahead = (upcoming.tobytes(), self._executor.submit(self._prepare, upcoming.tolist()))
        return inputs

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)

    def _prepare(self, indices: Sequence[int]) -> Any:
        with torch.no_grad():
            return self._policy.preprocess(self._demonstrations.samples(indices, self._observations), _CPU)

    def _prepare_all(self, max_cached_bytes: int) -> Any | None:
        parts = []
        num_bytes = 0
        for episode in self._demonstrations.episode_ranges():
            parts.append(self._prepare(list(episode)))
            num_bytes += rows.num_bytes(parts[-1])
            if num_bytes > max_cached_bytes:
                return None
        return rows.join(parts)
