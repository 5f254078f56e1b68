"""What training reads: a published root as batches of observations, tasks and action chunks.

view = TrainingView(root, horizon=16)
sampler = view.sampler(seed=0, rank=rank, world_size=world_size)
batch = view.batch(sampler.batch(global_position, batch_size))
"""

from __future__ import annotations

import collections
import hashlib
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from manyhands.errors import InvalidInput
from manyhands.spec import Spec

from .definition import SOURCE_COLUMN
from .reader import DatasetReader
from .sampler import Sampler


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B samples. H is the horizon, R the sum of the action features' sizes.

    Attributes:
        observation: By feature name: states (B, n) in the robot's units, cameras (B, height, width, 3) uint8 RGB.
        tasks: B instructions.
        actions: (B, H, R) float32 in the robot's units, from the sample's frame on; beyond the end the last one is repeated.
        is_pad: (B, H) bool, True beyond the episode's end.
        indices: (B,) int64 frame indices in the dataset.
    """

    observation: dict[str, npt.NDArray[np.generic]]
    tasks: list[str]
    actions: npt.NDArray[np.float32]
    is_pad: npt.NDArray[np.bool_]
    indices: npt.NDArray[np.int64]


class TrainingView:
    """Batches of one published root. Any thread may read.

    Args:
        root: A published root: the store's own (DatasetInfo.root_path), or one that clients.dataset.fetch_snapshot copied.
        horizon: Actions of a sample.
        cameras: Which cameras batches carry; none by default.
        image_size: (height, width) that pictures are scaled to; None keeps them as recorded.
        cache_dir: Where decoded pictures are kept, one file an episode and camera, keyed by its content and the transform; a
            view of a grown dataset builds only what is new. Needed when cameras are given.
    """

    def __init__(
        self,
        root: Path,
        *,
        horizon: int,
        cameras: Sequence[str] = (),
        image_size: tuple[int, int] | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        if horizon < 1:
            raise InvalidInput(f"horizon ({horizon}) must be at least 1", field="horizon")
        self.reader = DatasetReader(root)
        self.horizon = horizon
        self.cameras = tuple(cameras)
        unknown = [name for name in self.cameras if name not in self.reader.cameras]
        if unknown:
            raise InvalidInput(f"is no camera of this dataset; it has {', '.join(self.reader.cameras)}", field=unknown[0])
        self._actions = np.concatenate(
            [self._column(feature.name) for feature in self.reader.spec.action], axis=1, dtype=np.float32
        )
        self._states = {feature.name: self._column(feature.name) for feature in self.reader.spec.states}
        self._pictures: PictureCache | None = None
        if self.cameras:
            if cache_dir is None:
                raise InvalidInput("must be given when the view has cameras", field="cache_dir")
            self._pictures = PictureCache(self.reader, Path(cache_dir), image_size)
            for camera in self.cameras:
                self._pictures.build(camera)

    @property
    def spec(self) -> Spec:
        return self.reader.spec

    @property
    def num_frames(self) -> int:
        return self.reader.num_frames

    @property
    def num_episodes(self) -> int:
        return self.reader.num_episodes

    @property
    def tasks(self) -> list[str]:
        """Distinct instructions; row r is task_index r."""
        return self.reader.tasks

    @property
    def statistics(self) -> dict[str, dict[str, npt.NDArray[np.float64]]]:
        """For Policy.set_statistics."""
        return self.reader.statistics

    @property
    def digest(self) -> bytes:
        """Names the training data of a run."""
        return self.reader.digest

    @property
    def sources(self) -> npt.NDArray[np.int64]:
        """(num_frames,): who decided each action, dataset_pb2.ActionSource; all 0 where other software recorded."""
        return self.reader.columns.get(SOURCE_COLUMN, np.zeros(self.num_frames, np.int64))

    def sampler(self, *, seed: int, rank: int = 0, world_size: int = 1) -> Sampler:
        return Sampler(num_frames=self.num_frames, seed=seed, rank=rank, world_size=world_size)

    def batch(self, indices: npt.NDArray[np.int64]) -> Batch:
        """indices: (B,) frame indices, 0 .. num_frames - 1, in any order."""
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.num_frames:
            raise InvalidInput(f"must be 0 to {self.num_frames - 1}", field="indices")
        episodes = self.reader.episode_of(indices)
        ends = self.reader.episode_starts[episodes + 1]
        steps = indices[:, None] + np.arange(self.horizon)
        is_pad = steps >= ends[:, None]
        observation: dict[str, npt.NDArray[np.generic]] = {}
        for feature in self.spec.observation:
            if feature.name in self._states:
                observation[feature.name] = self._states[feature.name][indices]
            elif feature.name in self.cameras:
                assert self._pictures is not None
                frames = indices - self.reader.episode_starts[episodes]
                observation[feature.name] = self._pictures.gather(feature.name, episodes, frames)
        tasks = self.reader.columns["task_index"][indices]
        return Batch(
            observation=observation,
            tasks=[self.tasks[task] for task in tasks],
            actions=self._actions[np.minimum(steps, ends[:, None] - 1)],
            is_pad=is_pad,
            indices=indices,
        )

    def _column(self, name: str) -> npt.NDArray[np.generic]:
        values = self.reader.columns[name]
        return values.reshape(len(values), -1)


class PictureCache:
    """Decoded, scaled pictures of episodes as memory-mapped files: (frames, height, width, 3) uint8 each."""

    _MAX_OPEN = 1024

    def __init__(self, reader: DatasetReader, folder: Path, image_size: tuple[int, int] | None) -> None:
        self._reader = reader
        self._folder = folder
        self._image_size = image_size
        self._lock = threading.Lock()
        self._open: collections.OrderedDict[Path, npt.NDArray[np.uint8]] = collections.OrderedDict()
        folder.mkdir(parents=True, exist_ok=True)

    def build(self, camera: str) -> int:
        """Decodes the episodes that are not here yet, each in one pass; returns how many."""
        missing = [e.index for e in self._reader.episodes if not self._path(camera, e.index).exists()]
        for episode in missing:
            path = self._path(camera, episode)
            height, width = self._size(camera)
            shape = (self._reader.episodes[episode].num_frames, height, width, 3)
            # Ranks may build the same file at once: each under its own name, the last rename wins with equal bytes.
            temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
            pictures = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
            for frame, pixels in enumerate(self._reader.pictures(camera, episode)):
                pictures[frame] = _scaled(pixels, height, width)
            pictures.flush()
            del pictures
            temporary.rename(path)
        return len(missing)

    def gather(self, camera: str, episodes: npt.NDArray[np.int64], frames: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """(B, height, width, 3) uint8 of (episode, frame) pairs."""
        out = np.empty((len(frames), *self._size(camera), 3), np.uint8)
        for row, (episode, frame) in enumerate(zip(episodes.tolist(), frames.tolist(), strict=True)):
            out[row] = self._map(self._path(camera, episode))[frame]
        return out

    def _map(self, path: Path) -> npt.NDArray[np.uint8]:
        with self._lock:
            pictures = self._open.get(path)
            if pictures is None:
                while len(self._open) >= self._MAX_OPEN:
                    self._open.popitem(last=False)
                pictures = self._open[path] = np.load(path, mmap_mode="r")
            self._open.move_to_end(path)
            return pictures

    def _size(self, camera: str) -> tuple[int, int]:
        if self._image_size is not None:
            return self._image_size
        height, width = self._reader.features[camera]["shape"][:2]
        return height, width

    def _path(self, camera: str, episode: int) -> Path:
        height, width = self._size(camera)
        key = f"{self._reader.episodes[episode].content_key}\0{camera}\0{height}x{width} area"
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"


def _scaled(pixels: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    if pixels.shape[:2] == (height, width):
        return pixels
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
