"""A request's bytes to a row that the model can run. Everything is checked here, before it can meet another robot's row.

In two halves: what is quick, on the event loop, and the pictures, which threads decode and resize side by side. Those let go
of the interpreter while they work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from manyhands import codec, stamps
from manyhands.common.v1 import common_pb2
from manyhands.errors import InvalidInput
from manyhands.inference.v1 import inference_pb2
from manyhands.spec import Feature, FeatureKind, Spec, check_in_order, decode_as

from .engine_port import Observed, Row
from .sessions import Fit
from .shared_pictures import SharedPictures

MAX_DEADLINE_S = 60.0
MAX_TASK_CHARACTERS = 4096
PREFIX_FIELD: Final = "committed_prefix"


Array = npt.NDArray[np.generic]
Decode = Callable[[common_pb2.Image], Array]


@dataclass(frozen=True, kw_only=True)
class SentSample:
    """An observation that is checked, but for what is inside its pictures.

    Attributes:
        arrays: By feature name, in order; None in the place of a picture.
        pictures: By feature name: makes one, in the model's size. On any thread; raises InvalidInput.
        quick_picture: Number of one that takes a fraction of a millisecond whatever is in it, so that the loop may make it;
            None where there is none.
        is_quick: All of the model's pictures are there, and each is such a one.
    """

    arrays: Mapping[str, Array | None]
    pictures: Mapping[str, Callable[[], Array]]
    task: str
    quick_picture: int | None = None
    is_quick: bool = False

    def observed(self, pictures: Sequence[Array]) -> Observed:
        """pictures: What self.pictures made, in their order."""
        made = dict(zip(self.pictures, pictures, strict=True))
        arrays = {name: made[name] if array is None else array for name, array in self.arrays.items()}
        return Observed(observation=arrays, task=self.task)


@dataclass(frozen=True, kw_only=True)
class SentRow:
    """A request that is checked, but for what is inside its pictures; the rest is as Row has it."""

    sample: SentSample
    prefix: npt.NDArray[np.float32] | None
    delay_steps: int
    execution_horizon: int
    seed: int

    def row(self, pictures: Sequence[Array]) -> Row:
        """pictures: As SentSample.observed() takes them."""
        return self._row(self.sample.observed(pictures))

    def without_pictures(self) -> Row:
        arrays = {name: array for name, array in self.sample.arrays.items() if array is not None}
        return self._row(Observed(observation=arrays, task=self.sample.task))

    def _row(self, observed: Observed) -> Row:
        return Row(
            sample=observed,
            prefix=self.prefix,
            delay_steps=self.delay_steps,
            execution_horizon=self.execution_horizon,
            seed=self.seed,
        )


def deadline_s(request: inference_pb2.ActRequest) -> float:
    """Seconds the robot gives, checked."""
    seconds = stamps.to_seconds(request.deadline) if request.HasField("deadline") else 0.0
    if not 0.0 < seconds <= MAX_DEADLINE_S:
        raise InvalidInput(f"is {seconds:g} s; it must be > 0 and at most {MAX_DEADLINE_S:g} s", field="deadline")
    return seconds


def check_row(
    request: inference_pb2.ActRequest,
    *,
    robot_fit: Fit,
    model_spec: Spec,
    horizon: int,
    model_action_size: int,
    default_execution_horizon: int,
    shared: SharedPictures | None = None,
) -> SentRow:
    """Checks one request and decodes all but its pictures.

    Args:
        shared: Where some of them may lie.

    Raises:
        InvalidInput: Names the field or feature, its value, the limit.
    """
    for field, value in (("delay_steps", request.delay_steps), ("execution_horizon", request.execution_horizon)):
        if not 0 <= value <= horizon:
            raise InvalidInput(f"is {value}; it must be 0 to {horizon}, the chunk's horizon", field=field)
    if len(request.ask_subtask_for) > MAX_TASK_CHARACTERS:
        raise InvalidInput(
            f"has {len(request.ask_subtask_for)} characters, at most {MAX_TASK_CHARACTERS}", field="ask_subtask_for"
        )
    if request.current_index < 0:
        raise InvalidInput(f"is {request.current_index}; it must not be negative", field="current_index")
    return SentRow(
        sample=check_sample(
            request.observation.values,
            request.task,
            robot_fit=robot_fit,
            model_spec=model_spec,
            shared=_lying(request, shared),
        ),
        prefix=_prefix(request, horizon, model_action_size),
        delay_steps=request.delay_steps,
        execution_horizon=request.execution_horizon or default_execution_horizon,
        seed=request.noise_seed,
    )


def prepare_sample(values: Sequence[common_pb2.NamedValue], task: str, *, robot_fit: Fit, model_spec: Spec) -> Observed:
    """The observation as the model's spec has it: pictures resized, vectors padded; cameras the robot lacks are absent.

    Raises:
        InvalidInput: Names the feature, its value, the limit.
    """
    sent = check_sample(values, task, robot_fit=robot_fit, model_spec=model_spec)
    return sent.observed([make() for make in sent.pictures.values()])


def check_sample(
    values: Sequence[common_pb2.NamedValue],
    task: str,
    *,
    robot_fit: Fit,
    model_spec: Spec,
    shared: Mapping[str, Decode] | None = None,
) -> SentSample:
    """prepare_sample() but for the pictures.

    Args:
        shared: By name, what reads the pictures that do not lie in the values.
    """
    if len(task) > MAX_TASK_CHARACTERS:
        raise InvalidInput(f"has {len(task)} characters, at most {MAX_TASK_CHARACTERS}", field="task")
    wanted = {feature.name: feature for feature in model_spec.observation}
    expected = _as_sent(values, robot_fit.required, wanted)
    check_in_order(values, expected)
    arrays: dict[str, Array | None] = {}
    pictures: dict[str, Callable[[], Array]] = {}
    quick: list[int] = []
    for value, feature in zip(values, expected, strict=True):
        elsewhere = shared.get(value.name) if shared else None
        make = functools.partial(_adapted, value, feature, wanted[feature.name], elsewhere)
        if feature.kind is FeatureKind.IMAGE:
            if feature.shape == wanted[feature.name].shape and codec.is_quick(value.image):
                quick.append(len(pictures))
            arrays[feature.name], pictures[feature.name] = None, make
        else:
            arrays[feature.name] = make()
    return SentSample(
        arrays=arrays,
        pictures=pictures,
        task=task,
        quick_picture=quick[0] if quick else None,
        is_quick=len(quick) == len(model_spec.images),
    )


def _as_sent(
    values: Sequence[common_pb2.NamedValue], required: Sequence[Feature], wanted: Mapping[str, Feature]
) -> list[Feature]:
    """The required features; a camera that the robot already resized to the model's size is expected in that size."""
    if len(values) != len(required):
        return list(required)  # check_in_order names what is wrong.
    expected: list[Feature] = []
    for value, feature in zip(values, required, strict=True):
        models = wanted[feature.name]
        resized = feature.kind is FeatureKind.IMAGE and (value.image.height, value.image.width) == models.shape[:2]
        expected.append(models if resized else feature)
    return expected


def _lying(request: inference_pb2.ActRequest, shared: SharedPictures | None) -> Mapping[str, Decode]:
    """By name, what reads the pictures of a request that lie in shared memory."""
    if not request.shared_pictures:
        return {}
    if shared is None:
        raise InvalidInput(
            "this session has no shared memory; send pictures in the observation, or ask for it (wants_shared_memory) from "
            "the server's machine",
            field="shared_pictures",
        )
    if len(request.shared_pictures) > len(request.observation.values):
        raise InvalidInput(
            f"are {len(request.shared_pictures)}, the observation has {len(request.observation.values)} values",
            field="shared_pictures",
        )
    sent = {value.name for value in request.observation.values}
    for picture in request.shared_pictures:
        if picture.name not in sent:
            raise InvalidInput("lies in shared memory twice, or is no value of the observation", field=picture.name)
        sent.discard(picture.name)
    return {
        picture.name: functools.partial(shared.picture, offset=picture.offset, field=picture.name)
        for picture in request.shared_pictures
    }


def _adapted(value: common_pb2.NamedValue, sent: Feature, wanted: Feature, elsewhere: Decode | None = None) -> Array:
    # What lies elsewhere is of the size that the value says, and that was looked at.
    array = decode_as(value, sent) if elsewhere is None else elsewhere(value.image)
    if array.shape == wanted.shape:
        return array
    if wanted.kind is FeatureKind.IMAGE:
        return letterbox(array.view(np.uint8), wanted.shape[0], wanted.shape[1])
    padded = np.zeros(wanted.shape, dtype=array.dtype)
    padded[: array.shape[0]] = array
    return padded


def letterbox(pixels: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """(height, width, 3): pixels scaled with its ratio kept, centred on black; an odd pixel goes to the bottom or right."""
    ratio = max(pixels.shape[0] / height, pixels.shape[1] / width)
    inner_height = min(height, max(1, int(pixels.shape[0] / ratio)))
    inner_width = min(width, max(1, int(pixels.shape[1] / ratio)))
    # Averaging over areas when shrinking: no aliasing.
    how = cv2.INTER_AREA if ratio > 1 else cv2.INTER_LINEAR
    resized = cv2.resize(pixels, (inner_width, inner_height), interpolation=how)
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    canvas[top : top + inner_height, left : left + inner_width] = resized
    return canvas


def _prefix(request: inference_pb2.ActRequest, horizon: int, model_action_size: int) -> npt.NDArray[np.float32] | None:
    if not request.HasField(PREFIX_FIELD) or 0 in request.committed_prefix.shape:
        return None
    shape = tuple(request.committed_prefix.shape)
    dtype = request.committed_prefix.dtype
    if len(shape) != 2 or shape[0] > horizon or shape[1] != model_action_size or dtype != common_pb2.DATA_TYPE_FLOAT32:
        raise InvalidInput(
            f"has shape {shape} and data type {dtype}; it must be (1 to {horizon}, {model_action_size}) float32: the last "
            "chunk's model_actions from current_index on",
            field=PREFIX_FIELD,
        )
    prefix = codec.decode_tensor(request.committed_prefix, field=PREFIX_FIELD).astype(np.float32, copy=False)
    if not np.isfinite(prefix).all():
        raise InvalidInput("holds values that are not finite", field=PREFIX_FIELD)
    return prefix
