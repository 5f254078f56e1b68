"""What a dataset is made of: its spec, its video encoding, and the columns that follow from them (FORMAT.md)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from manyhands.dataset.v1 import dataset_pb2
from manyhands.errors import InvalidInput
from manyhands.spec import Feature, Spec

from .layout import check_dataset_name

CODECS = ("h264", "libsvtav1")
_DEFAULT_PRESET = {"h264": "ultrafast", "libsvtav1": "12"}
_DEFAULT_CRF = {"h264": 23, "libsvtav1": 30}
_X264_PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")

# Who decided an action and with which weights: not part of what a policy sees ("action..." and "observation..." would be).
SOURCE_COLUMN = "x.source"
POLICY_COLUMN = "x.policy_number"
PROPOSED_PREFIX = "x.proposed."
INDEX_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")


@dataclass(frozen=True, kw_only=True)
class VideoSettings:
    """How pictures are kept. All episodes of a dataset share it.

    Attributes:
        codec: "h264" or "libsvtav1".
        keyframe_interval: g; a random look-up decodes at most so many frames.
        crf: 0 (best) to 51 (h264) or 63 (AV1).
        preset: The encoder's name of its speed.
    """

    codec: str = "h264"
    keyframe_interval: int = 2
    crf: int = _DEFAULT_CRF["h264"]
    preset: str = _DEFAULT_PRESET["h264"]

    @classmethod
    def from_proto(cls, message: dataset_pb2.VideoEncoding) -> VideoSettings:
        codec = message.codec or "h264"
        if codec not in CODECS:
            raise InvalidInput(f"codec {codec!r} is not offered; use one of {', '.join(CODECS)}", field="video.codec")
        settings = cls(
            codec=codec,
            keyframe_interval=message.keyframe_interval or 2,
            crf=message.crf or _DEFAULT_CRF[codec],
            preset=message.preset or _DEFAULT_PRESET[codec],
        )
        if not 1 <= settings.keyframe_interval <= 1000:
            raise InvalidInput(
                f"keyframe_interval ({settings.keyframe_interval}) must be 1 to 1000", field="video.keyframe_interval"
            )
        highest = 51 if codec == "h264" else 63
        if not 1 <= settings.crf <= highest:
            raise InvalidInput(f"crf ({settings.crf}) must be 1 to {highest} for {codec}", field="video.crf")
        presets = _X264_PRESETS if codec == "h264" else tuple(str(n) for n in range(14))
        if settings.preset not in presets:
            raise InvalidInput(f"preset {settings.preset!r} must be one of {', '.join(presets)}", field="video.preset")
        return settings

    def to_proto(self) -> dataset_pb2.VideoEncoding:
        return dataset_pb2.VideoEncoding(
            codec=self.codec, keyframe_interval=self.keyframe_interval, crf=self.crf, preset=self.preset
        )


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the data files; shape (1,) is a scalar there."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Definition:
    """A dataset's name, spec and video encoding; equal definitions are the same dataset."""

    name: str
    spec: Spec
    video: VideoSettings

    @classmethod
    def from_proto(cls, message: dataset_pb2.DatasetDefinition) -> Definition:
        """Raises InvalidInput for a name, spec or encoding that cannot be stored."""
        check_dataset_name(message.name)
        spec = Spec.from_proto(message.spec)
        if spec.control_rate_hz != int(spec.control_rate_hz):
            raise InvalidInput(
                f"control_rate_hz ({spec.control_rate_hz}) must be a whole number: it is the video's frame rate",
                field="spec.control_rate_hz",
            )
        for feature in spec.images:
            if feature.shape[0] % 2 or feature.shape[1] % 2:
                raise InvalidInput(
                    f"is {feature.shape[0]}x{feature.shape[1]}; video needs an even height and width", field=feature.name
                )
        reserved = {*INDEX_COLUMNS, "task", SOURCE_COLUMN, POLICY_COLUMN}
        for feature in spec.observation + spec.action:
            if feature.name in reserved or feature.name.startswith(PROPOSED_PREFIX) or not _is_path_safe(feature.name):
                raise InvalidInput("is not usable as a column's and a folder's name; rename the feature", field=feature.name)
        return cls(name=message.name, spec=spec, video=VideoSettings.from_proto(message.video))

    def to_proto(self) -> dataset_pb2.DatasetDefinition:
        return dataset_pb2.DatasetDefinition(name=self.name, spec=self.spec.to_proto(), video=self.video.to_proto())

    @property
    def fps(self) -> int:
        return int(self.spec.control_rate_hz)

    @cached_property
    def cameras(self) -> tuple[Feature, ...]:
        return self.spec.images

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """Of the data files, in order."""
        columns = [_column(feature) for feature in self.spec.states + self.spec.action]
        for feature in self.spec.action:
            columns.append(_column(feature, prefix=PROPOSED_PREFIX))
        columns += [Column(name=name, dtype="int64", shape=(1,)) for name in (SOURCE_COLUMN, POLICY_COLUMN)]
        columns.append(Column(name="timestamp", dtype="float32", shape=(1,)))
        columns += [Column(name=name, dtype="int64", shape=(1,)) for name in INDEX_COLUMNS[1:]]
        return tuple(columns)

    @cached_property
    def max_frame_bytes(self) -> int:
        """Over this a Frame cannot be right: twice its raw pictures and numbers, and room for the text."""
        raw = sum(
            int(np.prod(feature.shape)) * np.dtype(feature.dtype).itemsize
            for feature in self.spec.observation + self.spec.action + self.spec.action
        )
        return 2 * raw + 64 * 1024

    def features_json(self, video_info: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """info.json's `features`; insertion order is column order. video_info: stream facts by camera."""
        features: dict[str, Any] = {}
        for feature in self.cameras:
            features[feature.name] = {
                "dtype": "video",
                "shape": list(feature.shape),
                "names": ["height", "width", "channels"],
                "info": video_info[feature.name],
            }
        for column in self.columns:
            features[column.name] = {
                "dtype": column.dtype,
                "shape": list(column.shape),
                "names": list(column.names) or None,
            }
        return features


def first_difference(have: Definition, asked: Definition) -> str:
    """What differs first between two definitions of one name, for people; "" when they are equal."""
    for label, ours, theirs in (
        ("observation", have.spec.observation, asked.spec.observation),
        ("action", have.spec.action, asked.spec.action),
    ):
        for our, their in zip(ours, theirs, strict=False):
            if our != their:
                return f"{label} feature {our.name!r} is {our}, asked {their}"
        if len(ours) != len(theirs):
            return f"{label} has {len(ours)} features, asked {len(theirs)}"
    if have.spec.control_rate_hz != asked.spec.control_rate_hz:
        return f"control_rate_hz is {have.spec.control_rate_hz}, asked {asked.spec.control_rate_hz}"
    if have.spec.robot_type != asked.spec.robot_type:
        return f"robot_type is {have.spec.robot_type!r}, asked {asked.spec.robot_type!r}"
    if have.video != asked.video:
        return f"video is {have.video}, asked {asked.video}"
    return ""


def _column(feature: Feature, prefix: str = "") -> Column:
    return Column(name=prefix + feature.name, dtype=feature.dtype, shape=feature.shape, names=feature.element_names)


def _is_path_safe(name: str) -> bool:
    return name.isprintable() and name not in (".", "..") and "\\" not in name and len(name) < 200
