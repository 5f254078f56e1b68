"""A store process, and episodes whose every frame says in its picture and its numbers which one it is."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from dataset_store.reader import DatasetReader
from manyhands import codec
from manyhands.clients.dataset import AppendStream, DatasetClient, EpisodeDigest
from manyhands.common.v1 import common_pb2
from manyhands.dataset.v1 import dataset_pb2
from manyhands.spec import Feature, FeatureKind, Spec

CAMERAS = ("observation.images.top", "observation.images.wrist")
SIZE = 64
_CELLS = 4
FPS = 20


def lab_spec(num_cameras: int = 2) -> Spec:
    cameras = tuple(
        Feature(name=name, kind=FeatureKind.IMAGE, dtype="uint8", shape=(SIZE, SIZE, 3)) for name in CAMERAS[:num_cameras]
    )
    state = Feature(
        name="observation.state",
        kind=FeatureKind.STATE,
        dtype="float32",
        shape=(3,),
        element_names=("episode", "frame", "wave"),
        element_units=("1", "1", "m"),
    )
    action = Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(2,))
    return Spec(observation=(state, *cameras), action=(action,), control_rate_hz=float(FPS), robot_type="lab")


@functools.cache
def encoded_picture(number: int) -> common_pb2.Image:
    return codec.encode_image(picture_of(number))


def picture_of(number: int) -> npt.NDArray[np.uint8]:
    """(64, 64, 3): a 4x4 grid of black and white cells, the bits of number; survives any encoder."""
    bits = np.array([number >> bit & 1 for bit in range(_CELLS * _CELLS)], np.uint8).reshape(_CELLS, _CELLS)
    cells = np.kron(bits * 220 + 16, np.ones((SIZE // _CELLS, SIZE // _CELLS), np.uint8)).astype(np.uint8)
    return np.repeat(cells[:, :, None], 3, axis=2)


def number_in(pixels: npt.NDArray[np.uint8]) -> int:
    """The number that picture_of() drew, whatever compression did to it."""
    cell = SIZE // _CELLS
    means = pixels.mean(axis=2).reshape(_CELLS, cell, _CELLS, cell).mean(axis=(1, 3)).ravel()
    return int(sum(1 << bit for bit, mean in enumerate(means) if mean > 128))


def lab_frame(episode: int, frame: int, *, num_cameras: int = 2, task: str = "") -> dataset_pb2.Frame:
    """Cameras show (episode * 256 + frame) % 65536, the second one its complement; the state says both numbers."""
    number = (episode * 256 + frame) % 65536
    state = np.array([episode, frame, np.sin(frame / 3)], np.float32)
    observation = [common_pb2.NamedValue(name="observation.state", tensor=codec.encode_tensor(state))]
    for name, shown in zip(CAMERAS[:num_cameras], (number, 65535 - number), strict=False):
        observation.append(common_pb2.NamedValue(name=name, image=encoded_picture(shown)))
    return dataset_pb2.Frame(
        sequence=frame,
        task=task or f"task {episode % 3}",
        observation=observation,
        action=codec.encode_values({"action": np.array([frame, -episode], np.float32)}),
        source=dataset_pb2.ACTION_SOURCE_TELEOPERATOR,
    )


def episode_uuid(number: int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"episode {number}"))


def record(stream: AppendStream, dataset: str, episode: int, num_frames: int, *, spec: Spec, robot_id: str = "lab") -> int:
    """Records (or goes on with) one whole episode; returns the sequence the store asked to begin at."""
    num_cameras = len(spec.images)
    start = stream.begin(dataset, episode_uuid(episode), robot_id=robot_id, spec_digest=spec.digest)
    if stream.is_sealed:
        return start
    digest = EpisodeDigest()
    for sequence in range(num_frames):
        frame = lab_frame(episode, sequence, num_cameras=num_cameras)
        digest.add(frame)
        if sequence >= start:
            stream.send(frame)
    stream.end(digest.frame_count, digest.sha256, dataset_pb2.EPISODE_END_SUCCESS)
    return start


def check_contents(root: Path, lengths: dict[int, int], *, num_cameras: int = 2) -> None:
    """Every episode of lengths is in the published root exactly once, every frame with its own numbers and pictures."""
    reader = DatasetReader(root)
    found = {int(reader.columns["observation.state"][episode.from_index, 0]): episode for episode in reader.episodes}
    assert len(found) == reader.num_episodes == len(lengths), "episodes are missing or there twice"
    for number, length in lengths.items():
        episode = found[number]
        assert episode.uuid == episode_uuid(number)
        assert episode.num_frames == length
        rows = slice(episode.from_index, episode.to_index)
        np.testing.assert_array_equal(reader.columns["observation.state"][rows, 0], np.full(length, number))
        np.testing.assert_array_equal(reader.columns["observation.state"][rows, 1], np.arange(length))
        np.testing.assert_array_equal(reader.columns["action"][rows, 0], np.arange(length))
        tasks = {reader.tasks[index] for index in reader.columns["task_index"][rows]}
        assert tasks == {f"task {number % 3}"} == set(episode.tasks)
        for camera, mask in zip(CAMERAS[:num_cameras], (0, 65535), strict=False):
            shown = [number_in(pixels) ^ mask for pixels in reader.pictures(camera, episode.index)]
            assert shown == [(number * 256 + frame) % 65536 for frame in range(length)], f"{camera} of episode {number}"


class StoreProcess:
    """`manyhands store` as a process that can be killed and started again on the same port."""

    def __init__(self, root: Path, *flags: str) -> None:
        self.root = root
        self._flags = flags
        self.address = "127.0.0.1:0"
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def published_root(self, dataset: str) -> Path:
        return self.root / "datasets" / dataset

    def start(self) -> None:
        command = [sys.executable, "-m", "manyhands", "store", "--root", str(self.root), "--address", self.address]
        self._process = subprocess.Popen(
            [*command, "--min-free-mib", "0", *self._flags],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.startswith("READY "), f"the store said {line!r} instead of READY"
        self.address = line.split()[1]

    def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(timeout=10)

    def stop(self) -> int:
        assert self._process is not None
        self._process.terminate()
        try:
            return self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def client(self) -> DatasetClient:
        client = DatasetClient(self.address)
        client.wait_until_ready()
        return client
