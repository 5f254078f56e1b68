"""Episodes of several robots side by side in one mp4, from what the store published."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import numpy.typing as npt

_TILE_PIXELS = 320
_CAPTION_PIXELS = 28
_END_PAUSE_S = 0.6


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One camera's frames of one episode inside a published mp4.

    Attributes:
        path: The mp4.
        from_timestamp_s, to_timestamp_s: Half-open span of the episode.
        caption: Drawn below the picture.
    """

    path: Path
    from_timestamp_s: float
    to_timestamp_s: float
    caption: str


def side_by_side(columns: Sequence[Sequence[Clip]], path: Path, *, fps: int) -> None:
    """Writes path: a column per robot, its clips one after the other; a column that is over shows its last frame."""
    players = [_play(column, fps) for column in columns]
    tiles = [_blank() for _ in columns]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=fps)
        stream.width, stream.height = _TILE_PIXELS * len(columns), _TILE_PIXELS + _CAPTION_PIXELS
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, fps)
        while True:
            fresh = [next(player, None) for player in players]
            if all(tile is None for tile in fresh):
                break
            tiles = [old if new is None else new for old, new in zip(tiles, fresh, strict=True)]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.hstack(tiles), format="rgb24")))
        container.mux(stream.encode(None))


def _play(clips: Sequence[Clip], fps: int) -> Iterator[npt.NDArray[np.uint8]]:
    for clip in clips:
        tile = _blank()
        for picture in _frames(clip, fps):
            tile = _tile(picture, clip.caption)
            yield tile
        for _ in range(round(_END_PAUSE_S * fps)):
            yield tile


def _frames(clip: Clip, fps: int) -> Iterator[npt.NDArray[np.uint8]]:
    half_frame_s = 0.5 / fps
    with av.open(str(clip.path)) as container:
        stream = container.streams.video[0]
        container.seek(round(clip.from_timestamp_s * 1_000_000))
        for frame in container.decode(stream):
            if frame.time < clip.from_timestamp_s - half_frame_s:
                continue
            if frame.time > clip.to_timestamp_s - half_frame_s:
                return
            yield np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)


def _blank() -> npt.NDArray[np.uint8]:
    return np.zeros((_TILE_PIXELS + _CAPTION_PIXELS, _TILE_PIXELS, 3), dtype=np.uint8)


def _tile(picture: npt.NDArray[np.uint8], caption: str) -> npt.NDArray[np.uint8]:
    tile = _blank()
    tile[:_TILE_PIXELS] = cv2.resize(picture, (_TILE_PIXELS, _TILE_PIXELS), interpolation=cv2.INTER_LINEAR)
    cv2.putText(
        tile, caption, (8, _TILE_PIXELS + 19), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (235, 235, 235), 1, lineType=cv2.LINE_AA
    )
    return tile
