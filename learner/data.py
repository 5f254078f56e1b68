"""A dataset as model inputs, by frame index.

Preparing inputs (decoding, resizing, normalising) is the same for a frame every time, so all of them are made once where
they fit into memory; else the next batch is made while the present one trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dataset_store.reader import DatasetReader
from manyhands.errors import InvalidInput
from policies import rows
from policies.normalization import compute_statistics
from policies.policy import Policy, Sample

Indices = npt.NDArray[np.int64]
_CPU = torch.device("cpu")


class Demonstrations:
    """Samples with action chunks from a published root."""

    def __init__(self, root: Path, *, horizon: int) -> None:
        self._reader = DatasetReader(root)
        if not self._reader.num_frames:
            raise InvalidInput("has no published frames; record and publish episodes first", field="run.dataset")
        self.spec = self._reader.spec
        self.num_frames = self._reader.num_frames
        self.horizon = horizon
        self._actions = np.concatenate(
            [self._column(feature.name) for feature in self.spec.action], axis=1, dtype=np.float32
        )

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

    def _sample(self, index: int, pictures: Mapping[str, npt.NDArray[np.uint8]]) -> Sample:
        columns = self._reader.columns
        episode = self._reader.episodes[int(self._reader.episode_of(np.array([index]))[0])]
        steps = index + np.arange(self.horizon)
        numbers = {feature.name: columns[feature.name][index].reshape(feature.shape) for feature in self.spec.states}
        return Sample(
            observation={**numbers, **pictures},
            task=self._reader.tasks[int(columns["task_index"][index])],
            actions=self._actions[np.minimum(steps, episode.to_index - 1)],
            is_pad=steps >= episode.to_index,
            index=index,
            timestamp_s=(index - episode.from_index) / self._reader.fps,
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
        state = np.concatenate([self._column(feature.name) for feature in self.spec.states], axis=1)
        if state.shape[1] < len(mask):
            raise InvalidInput(
                f"relative actions need a state of at least {len(mask)} numbers, the dataset has {state.shape[1]}",
                field="action",
            )
        differences = []
        for episode in self.episode_ranges():
            steps = np.arange(episode.start, episode.stop)[:, None] + np.arange(self.horizon)
            steps = np.minimum(steps, episode.stop - 1)
            differences.append(self._actions[steps] - (state[episode.start : episode.stop, : len(mask)] * mask)[:, None, :])
        values = np.concatenate(differences)
        statistics = {}
        offset = 0
        for feature in self.spec.action:
            size = feature.shape[0]
            statistics[feature.name] = compute_statistics(values[..., offset : offset + size])
            offset += size
        return statistics

    def _column(self, name: str) -> npt.NDArray[Any]:
        return self._reader.columns[name].reshape(self.num_frames, -1)


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
