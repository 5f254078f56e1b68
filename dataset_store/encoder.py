"""Pictures of episodes to video while they arrive, on a few low-priority threads.

An encoder takes frames that are at hand; what it had no room for, or lost in a restart, it reads again from the episode's
log when the episode is finished. The video's bytes don't depend on the episode's number.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from manyhands import codec
from manyhands.dataset.v1 import dataset_pb2
from manyhands.errors import Cancelled, Corrupt, ManyhandsError

from .definition import Definition
from .episode_log import read_frames
from .layout import make_directory, put_file
from .statistics import PictureHistogram
from .video import VideoWriter, check_video, encoder_id

logger = logging.getLogger(__name__)

_RESULT = "encoded.json"
# Of one episode: about 70 frames of 480x640. More waits in the log.
_MAX_PENDING_BYTES = 64 * 1024 * 1024
_PRIORITY = 10

Pictures = Mapping[str, npt.NDArray[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class EncodedEpisode:
    """Finished videos of one episode, in its staging folder.

    Attributes:
        encoder: Streams with another value cannot share a file with these.
        size_bytes: By camera.
        histograms: By camera, of the sampled frames.
    """

    folder: Path
    frame_count: int
    encoder: str
    size_bytes: dict[str, int]
    histograms: dict[str, PictureHistogram]

    def video(self, camera: str) -> Path:
        return self.folder / f"{camera}.mp4"


class EpisodeEncoder:
    """Encodes one episode. offer() and finish() are for one thread, the work happens on the pool's."""

    def __init__(self, pool: EncoderPool, definition: Definition, folder: Path) -> None:
        self._pool = pool
        self._definition = definition
        self._folder = folder
        self._lock = threading.Lock()
        self._pending: collections.deque[Pictures] = collections.deque()
        self._pending_bytes = 0
        self._num_offered = 0
        self._is_scheduled = False
        self._is_abandoned = False
        # Held by the one pool thread that encodes.
        self._working = threading.Lock()
        self._writers: dict[str, VideoWriter] = {}
        self._histograms: dict[str, PictureHistogram] = {}
        self._num_encoded = 0
        self._is_broken = False

    def offer(self, sequence: int, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Takes frame `sequence` if it is the next one and there is room; never blocks, never fails."""
        with self._lock:
            if sequence != self._num_offered or self._is_abandoned or self._pending_bytes > _MAX_PENDING_BYTES:
                return
            pictures: Pictures = {f.name: arrays[f.name].view(np.uint8) for f in self._definition.cameras}
            self._pending.append(pictures)
            self._pending_bytes += sum(picture.nbytes for picture in pictures.values())
            self._num_offered += 1
            if not self._is_scheduled:
                self._is_scheduled = True
                self._pool.submit(self._drain)

    def finish(self, log: Path, frame_count: int) -> EncodedEpisode:
        """Encodes what is left, from the log if need be, and makes the result durable. Blocks: call on the pool."""
        with self._working:
            existing = load_encoded(self._folder, self._definition, frame_count)
            if existing is not None:
                return existing
            try:
                self._encode_pending()
                if self._is_broken or self._num_encoded > frame_count:
                    self._restart()
                for sequence, frame in enumerate(read_frames(log)):
                    if self._pool.is_interrupted:
                        raise Cancelled("the store is closing; encoding goes on at its next start")
                    if self._num_encoded <= sequence < frame_count:
                        self._encode({f.name: _picture(frame, f.name) for f in self._definition.cameras})
                if self._num_encoded != frame_count:
                    raise Corrupt(f"log {log.name} holds {self._num_encoded} frames, {frame_count} were sealed")
                return self._store(frame_count)
            except BaseException:
                self._is_broken = True
                raise

    def abandon(self) -> None:
        """Drops what there is; the episode was discarded, or another process would go on with it."""
        with self._lock:
            self._is_abandoned = True
            self._pending.clear()
        with self._working:
            self._close_writers()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _drain(self) -> None:
        with self._working:
            try:
                self._encode_pending()
            except Exception:
                logger.exception("encoding in %s failed; it will be repeated from the log", self._folder.name)
                self._is_broken = True

    def _encode_pending(self) -> None:
        while True:
            with self._lock:
                if not self._pending or self._is_abandoned or self._pool.is_interrupted:
                    self._is_scheduled = False
                    return
                pictures = self._pending.popleft()
                self._pending_bytes -= sum(picture.nbytes for picture in pictures.values())
            if not self._is_broken:
                self._encode(pictures)

    def _encode(self, pictures: Pictures) -> None:
        if not self._writers and self._definition.cameras:
            self._open_writers()
        for name, picture in pictures.items():
            self._writers[name].write(picture)
            self._histograms[name].add(self._num_encoded, picture)
        self._num_encoded += 1

    def _open_writers(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        make_directory(self._folder)
        for feature in self._definition.cameras:
            self._writers[feature.name] = VideoWriter(
                self._folder / f"{feature.name}.mp4",
                height=feature.shape[0],
                width=feature.shape[1],
                fps=self._definition.fps,
                settings=self._definition.video,
            )
            self._histograms[feature.name] = PictureHistogram()

    def _restart(self) -> None:
        self._close_writers()
        self._num_encoded = 0
        self._is_broken = False

    def _close_writers(self) -> None:
        for writer in self._writers.values():
            with contextlib.suppress(Exception):
                writer.abandon()
        self._writers, self._histograms = {}, {}

    def _store(self, frame_count: int) -> EncodedEpisode:
        make_directory(self._folder)
        sizes: dict[str, int] = {}
        for name, writer in self._writers.items():
            writer.close()
            path = self._folder / f"{name}.mp4"
            check_video(path, fps=self._definition.fps, num_frames=frame_count)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sizes[name] = path.stat().st_size
        self._writers = {}
        result = {
            "frame_count": frame_count,
            "encoder": encoder_id(),
            "size_bytes": sizes,
            "histograms": {name: histogram.to_json() for name, histogram in self._histograms.items()},
        }
        # Written last: without it the folder counts for nothing.
        put_file(self._folder, _RESULT, lambda path: _write_json(path, result), replace=True)
        encoded = load_encoded(self._folder, self._definition, frame_count)
        assert encoded is not None
        return encoded


class EncoderPool:
    """A bounded number of encoding threads, at lower priority than everything that has a rate to keep."""

    def __init__(self, *, num_threads: int) -> None:
        self._executor = ThreadPoolExecutor(num_threads, "encode", initializer=_lower_priority)
        self.is_interrupted = False

    def submit(self, work: Any, *arguments: Any) -> Future[Any]:
        return self._executor.submit(work, *arguments)

    def interrupt(self) -> None:
        """Work stops after the frame at hand; whoever waits for a result gets Cancelled. The frames are in the logs."""
        self.is_interrupted = True

    def close(self) -> None:
        self.interrupt()
        self._executor.shutdown(wait=True, cancel_futures=True)


def load_encoded(folder: Path, definition: Definition, frame_count: int) -> EncodedEpisode | None:
    """What an earlier finish() left whole, or None."""
    try:
        result = json.loads((folder / _RESULT).read_text())
    except FileNotFoundError:
        return None
    if result["frame_count"] != frame_count or set(result["size_bytes"]) != {f.name for f in definition.cameras}:
        return None
    return EncodedEpisode(
        folder=folder,
        frame_count=frame_count,
        encoder=result["encoder"],
        size_bytes=result["size_bytes"],
        histograms={name: PictureHistogram.from_json(value) for name, value in result["histograms"].items()},
    )


def _picture(frame: dataset_pb2.Frame, name: str) -> npt.NDArray[np.uint8]:
    for value in frame.observation:
        if value.name == name:
            return codec.decode_image(value.image, field=name)
    raise Corrupt(f"frame {frame.sequence} in the log has no {name}")


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def _lower_priority() -> None:
    with contextlib.suppress(OSError, ManyhandsError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _PRIORITY)
