"""mp4 files whose frame k lies exactly at k/fps: writing, joining without re-encoding, reading."""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.container
import av.error
import numpy as np
import numpy.typing as npt

from manyhands.errors import Corrupt, InvalidInput

from .definition import VideoSettings

_ENCODER = {"h264": "libx264", "libsvtav1": "libsvtav1"}
_CANONICAL = {"h264": "h264", "av1": "av1", "libdav1d": "av1"}

Pixels = npt.NDArray[np.uint8]


def encoder_id() -> str:
    """Streams of one id and equal settings can be joined; a newer library may write other headers."""
    return f"pyav {av.__version__} libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}"


class VideoWriter:
    """One episode of one camera. Frames are encoded as they come; one thread at a time."""

    def __init__(self, path: Path, *, height: int, width: int, fps: int, settings: VideoSettings) -> None:
        self.num_frames = 0
        self._time_base = Fraction(1, fps)
        self._container = av.open(str(path), "w", format="mp4")
        stream: Any = self._container.add_stream(_ENCODER[settings.codec], rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = self._time_base
        stream.codec_context.thread_count = 1
        options = {"crf": str(settings.crf), "preset": settings.preset, "g": str(settings.keyframe_interval)}
        if settings.codec == "h264":
            # No B-frames: they would shift the first timestamp. Closed groups, so that files can be joined at any episode.
            options |= {"bf": "0", "x264-params": "scenecut=0:open-gop=0"}
        else:
            options["svtav1-params"] = "lp=1"
            os.environ.setdefault("SVT_LOG", "1")  # Errors only; it tells its settings for every episode otherwise.
        stream.codec_context.options = options
        self._stream = stream

    def write(self, pixels: Pixels) -> None:
        """pixels: (height, width, 3) uint8 RGB."""
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts = self.num_frames
        frame.time_base = self._time_base
        for packet in self._stream.encode(frame):
            self._container.mux(packet)
        self.num_frames += 1

    def close(self) -> None:
        """Finishes the file; without it there is none."""
        for packet in self._stream.encode(None):
            self._container.mux(packet)
        self._container.close()

    def abandon(self) -> None:
        self._container.close()


def check_video(path: Path, *, fps: int, num_frames: int) -> None:
    """Raises Corrupt unless the file has exactly these frames: the library does not report every failed write."""
    indices, _ = packet_indices(path, fps=fps)
    if indices != list(range(num_frames)):
        raise Corrupt(f"{path.name} has {len(indices)} frames after writing {num_frames}; is the disk full?")


def join_videos(sources: Sequence[Path], target: Path, *, fps: int) -> None:
    """Copies the packets of equally encoded files one after the other."""
    total = 0
    with av.open(str(target), "w", format="mp4", options={"movflags": "faststart"}) as output:
        stream: Any = None
        for source in sources:
            with av.open(str(source)) as container:
                video = container.streams.video[0]
                if stream is None:
                    # Opaque: packets are copied, and the decoder that opened them (dav1d) may have no encoder.
                    stream = output.add_stream_from_template(video, opaque=True)
                    stream.time_base = Fraction(1, fps)
                first = total
                for packet in container.demux(video):
                    if packet.pts is None:
                        continue
                    frame_index = first + _to_index(packet.pts, video.time_base, fps, source)
                    packet.stream = stream
                    packet.time_base = Fraction(1, fps)
                    packet.pts = packet.dts = frame_index
                    packet.duration = 1
                    output.mux(packet)
                    total += 1


def probe(path: Path, settings: VideoSettings) -> dict[str, Any]:
    """The `info` block of info.json: facts of the stream and what the encoder was asked."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return {
            "video.height": stream.height,
            "video.width": stream.width,
            "video.codec": _CANONICAL.get(stream.codec_context.name, stream.codec_context.name),
            "video.pix_fmt": stream.pix_fmt,
            "video.fps": int(stream.average_rate or 0),
            "video.channels": 3,
            "has_audio": bool(container.streams.audio),
            "video.g": settings.keyframe_interval,
            "video.crf": settings.crf,
            "video.preset": settings.preset,
            "video.fast_decode": 0,
            "video.video_backend": "pyav",
            "video.extra_options": {},
            "is_depth_map": False,
        }


def packet_indices(path: Path, *, fps: int) -> tuple[list[int], set[int]]:
    """Frame index of every packet in file order, and which of them are keyframes. Nothing is decoded."""
    indices: list[int] = []
    keyframes: set[int] = set()
    with _open(path) as container:
        video = container.streams.video[0]
        for packet in container.demux(video):
            if packet.pts is None:
                continue
            index = _to_index(packet.pts, video.time_base, fps, path)
            indices.append(index)
            if packet.is_keyframe:
                keyframes.add(index)
    return indices, keyframes


class VideoReader:
    """Frames of one file by index. One thread only; goes forward without seeking where that is cheaper."""

    # Decoding on beats a seek up to about this many frames (measured at g = 2; larger g moves it up, never wrong).
    _MAX_SKIP = 8

    def __init__(self, path: Path, *, fps: int) -> None:
        self.path = path
        self._fps = fps
        self._container = _open(path)
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "NONE"
        self._frames: Iterator[Any] | None = None
        self._position = -1  # Index of the last decoded frame.

    def close(self) -> None:
        self._container.close()

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, Pixels]]:
        """(index, (height, width, 3) uint8 RGB) for ascending indices; Corrupt where the file has no such frame."""
        for wanted in indices:
            if self._frames is None or not 0 < wanted - self._position <= self._MAX_SKIP:
                self._seek(wanted)
            yield wanted, self._advance(wanted)

    def _seek(self, index: int) -> None:
        time_base = self._stream.time_base
        assert time_base is not None
        self._container.seek(round(index / (self._fps * time_base)), stream=self._stream, backward=True)
        self._frames = self._container.decode(self._stream)
        self._position = -1

    def _advance(self, wanted: int) -> Pixels:
        assert self._frames is not None
        for frame in self._frames:
            self._position = _to_index(frame.pts, frame.time_base, self._fps, self.path)
            if self._position == wanted:
                return frame.to_ndarray(format="rgb24")  # type: ignore[no-any-return]
            if self._position > wanted:
                break
        self._frames = None
        raise Corrupt(f"{self.path.name} has no frame {wanted}; run 'manyhands dataset verify' on the root")


class ReaderCache:
    """Open readers, a bounded number per thread: decoders are not thread-safe, and each holds a descriptor and megabytes.

    A forked process starts with none: its copies would share file positions with the parent's.
    """

    def __init__(self, *, fps: int, max_open: int = 16) -> None:
        if max_open < 1:
            raise InvalidInput(f"max_open ({max_open}) must be at least 1", field="max_open")
        self._fps = fps
        self._max_open = max_open
        self._local = threading.local()

    def get(self, path: Path) -> VideoReader:
        readers: collections.OrderedDict[Path, VideoReader] | None = getattr(self._local, "readers", None)
        if readers is None or self._local.pid != os.getpid():
            readers = self._local.readers = collections.OrderedDict()
            self._local.pid = os.getpid()
        reader = readers.get(path)
        if reader is None:
            while len(readers) >= self._max_open:
                readers.popitem(last=False)[1].close()
            reader = readers[path] = VideoReader(path, fps=self._fps)
        readers.move_to_end(path)
        return reader


def _open(path: Path) -> av.container.InputContainer:
    try:
        return av.open(str(path))
    except av.error.FFmpegError as error:
        raise Corrupt(f"{path.name} cannot be opened as a video: {error.strerror}") from None


def _to_index(pts: int, time_base: Fraction | None, fps: int, path: Path) -> int:
    assert time_base is not None
    index = pts * time_base * fps
    if index.denominator != 1:
        raise Corrupt(f"{path.name} has a frame at {float(pts * time_base)} s, which is no multiple of 1/{fps} s")
    return int(index)
