"""What a robot observes and is commanded with, in order; the handshake and every check of values rest on it.

Two sides that show the same digest agree on every name, order, shape, element, unit and the control rate
(docs/design/0001-common-contract.md has the canonical form).
"""

from __future__ import annotations

import enum
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from . import codec
from .common.v1 import common_pb2
from .errors import InvalidInput

# Of a whole spec; robots have some ten. What a stranger sends is compared with the model's feature by feature.
MAX_FEATURES = 256


class FeatureKind(enum.Enum):
    STATE = common_pb2.FEATURE_KIND_STATE
    IMAGE = common_pb2.FEATURE_KIND_IMAGE
    ACTION = common_pb2.FEATURE_KIND_ACTION


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One named entry of an observation or an action.

    Attributes:
        name: As in the dataset, "observation.state"; no "/".
        kind: STATE, IMAGE or ACTION.
        dtype: numpy name, "float32"; "uint8" for cameras.
        shape: (n,) for numbers, (height, width, 3) for cameras.
        element_names: One per element of a vector, in order.
        element_units: One per element: "rad", "m", "1".
    """

    name: str
    kind: FeatureKind
    dtype: str
    shape: tuple[int, ...]
    element_names: tuple[str, ...] = ()
    element_units: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise InvalidInput(f"feature name {self.name!r} must not be empty or hold '/'", field="feature.name")
        codec.data_type_of(self.dtype)
        num_extents = len(self.shape)  # First: a product of many is a number that takes minutes, and so does printing it.
        if num_extents != (3 if self.kind is FeatureKind.IMAGE else 1):
            kinds = "a camera is (height, width, 3), state and action are vectors"
            raise InvalidInput(f"shape has {num_extents} extents; {kinds}", field=self.name)
        if any(extent <= 0 for extent in self.shape):
            raise InvalidInput(f"shape {self.shape} must have positive extents", field=self.name)
        num_bytes = math.prod(self.shape) * self._numpy_dtype.itemsize
        if num_bytes > codec.MAX_VALUE_BYTES:
            raise InvalidInput(
                f"shape {self.shape} needs {num_bytes} bytes, over the limit of {codec.MAX_VALUE_BYTES}", field=self.name
            )
        if self.kind is FeatureKind.IMAGE and (self.shape[2] != 3 or self.dtype != "uint8"):
            raise InvalidInput(f"a camera is (height, width, 3) uint8, not {self.shape} {self.dtype}", field=self.name)
        for label, values in (("element_names", self.element_names), ("element_units", self.element_units)):
            if values and len(values) != self.shape[0]:
                raise InvalidInput(f"{label} has {len(values)} entries for {self.shape[0]} elements", field=self.name)

    @cached_property
    def _numpy_dtype(self) -> np.dtype[np.generic]:
        return np.dtype(self.dtype)

    def to_proto(self) -> common_pb2.Feature:
        return common_pb2.Feature(
            name=self.name,
            kind=self.kind.value,
            dtype=codec.data_type_of(self.dtype),
            shape=self.shape,
            element_names=self.element_names,
            element_units=self.element_units,
        )

    @classmethod
    def from_proto(cls, message: common_pb2.Feature) -> Feature:
        try:
            kind = FeatureKind(message.kind)
        except ValueError:
            raise InvalidInput(f"feature kind {message.kind} is not known", field=message.name) from None
        return cls(
            name=message.name,
            kind=kind,
            dtype=codec.numpy_dtype_of(message.dtype, field=message.name).name,
            shape=tuple(message.shape),
            element_names=tuple(message.element_names),
            element_units=tuple(message.element_units),
        )

    def check(self, value: npt.NDArray[np.generic]) -> None:
        """Raises InvalidInput, naming the feature, unless value has this dtype and shape and only finite numbers."""
        # A dtype's name is put together anew each time it is asked for; comparing is enough for all but other byte orders.
        if value.shape != self.shape or (value.dtype != self._numpy_dtype and value.dtype.name != self.dtype):
            raise InvalidInput(
                f"is {value.shape} {value.dtype.name}, the spec says {self.shape} {self.dtype}", field=self.name
            )
        if value.dtype.kind == "f":
            finite = np.isfinite(value)
            if not finite.all():
                index = int(np.argmin(finite))
                element = self.element_names[index] if self.element_names else str(index)
                raise InvalidInput(f"element {element} is {value.flat[index]}; it must be finite", field=self.name)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Ordered features and the control rate (Hz) of a robot or a model."""

    observation: tuple[Feature, ...]
    action: tuple[Feature, ...]
    control_rate_hz: float
    robot_type: str = ""

    def __post_init__(self) -> None:
        if not math.isfinite(self.control_rate_hz) or self.control_rate_hz <= 0:
            raise InvalidInput(f"control_rate_hz ({self.control_rate_hz}) must be > 0", field="spec.control_rate_hz")
        if not self.action:
            raise InvalidInput("a spec needs at least one action feature", field="spec.action")
        _check_count(len(self.observation) + len(self.action))
        names: set[str] = set()
        for feature in self.observation + self.action:
            if feature.name in names:
                raise InvalidInput("comes twice in the spec", field=feature.name)
            names.add(feature.name)
        for feature in self.action:
            if feature.kind is not FeatureKind.ACTION:
                raise InvalidInput(f"is {feature.kind.name} among the actions", field=feature.name)
        for feature in self.observation:
            if feature.kind is FeatureKind.ACTION:
                raise InvalidInput("is ACTION among the observations", field=feature.name)

    @property
    def states(self) -> tuple[Feature, ...]:
        return tuple(feature for feature in self.observation if feature.kind is FeatureKind.STATE)

    @property
    def images(self) -> tuple[Feature, ...]:
        return tuple(feature for feature in self.observation if feature.kind is FeatureKind.IMAGE)

    @cached_property
    def digest(self) -> bytes:
        """sha256 (32 bytes) of the canonical JSON form; robot_type is not part of it, a model may serve many types."""

        def rows(features: Iterable[Feature]) -> list[list[object]]:
            return [
                [f.name, f.kind.name, f.dtype, list(f.shape), list(f.element_names), list(f.element_units)] for f in features
            ]

        canonical = {
            "observation": rows(self.observation),
            "action": rows(self.action),
            "control_rate_hz": float(self.control_rate_hz),
        }
        text = json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).digest()

    def to_proto(self) -> common_pb2.Spec:
        return common_pb2.Spec(
            observation=[feature.to_proto() for feature in self.observation],
            action=[feature.to_proto() for feature in self.action],
            control_rate_hz=self.control_rate_hz,
            robot_type=self.robot_type,
            digest=self.digest,
        )

    @classmethod
    def from_proto(cls, message: common_pb2.Spec) -> Spec:
        """Raises InvalidInput for a spec that cannot be, or whose digest is not that of its content."""
        _check_count(len(message.observation) + len(message.action))  # Before each of them is looked at.
        spec = cls(
            observation=tuple(Feature.from_proto(feature) for feature in message.observation),
            action=tuple(Feature.from_proto(feature) for feature in message.action),
            control_rate_hz=message.control_rate_hz,
            robot_type=message.robot_type,
        )
        if message.digest != spec.digest:
            raise InvalidInput(
                f"digest {message.digest.hex()[:16]} is not that of the features, {spec.digest.hex()[:16]}",
                field="spec.digest",
            )
        return spec


def _check_count(num_features: int) -> None:
    if num_features > MAX_FEATURES:
        raise InvalidInput(f"has {num_features} features, at most {MAX_FEATURES}", field="spec")


def decode_in_order(
    values: Sequence[common_pb2.NamedValue], features: Sequence[Feature]
) -> dict[str, npt.NDArray[np.generic]]:
    """Decodes values that must be exactly features, in their order, with their shapes and dtypes, all finite.

    Raises:
        InvalidInput: Names the first feature that is missing, misplaced, of a wrong shape or size, or not finite. Shapes and
            declared picture sizes are checked before anything is decoded.
    """
    check_in_order(values, features)
    return {feature.name: decode_as(value, feature) for value, feature in zip(values, features, strict=True)}


def decode_as(value: common_pb2.NamedValue, feature: Feature) -> npt.NDArray[np.generic]:
    """One value, which must be this feature; InvalidInput names it."""
    array = codec.decode_value(value)
    feature.check(array)
    return array


def check_in_order(values: Sequence[common_pb2.NamedValue], features: Sequence[Feature]) -> None:
    """All of decode_in_order() that can be said without decoding; InvalidInput likewise."""
    sent = [value.name for value in values]
    expected = [feature.name for feature in features]
    if sent != expected:
        for name in expected:
            if name not in sent:
                raise InvalidInput(f"is missing; expected in this order: {', '.join(expected)}", field=name)
        for name in sent:
            if name not in expected:
                raise InvalidInput(f"is not expected; expected in this order: {', '.join(expected)}", field=name)
        for name in expected:
            if sent.count(name) > 1:
                raise InvalidInput("comes twice", field=name)
        wrong = next(s for s, e in zip(sent, expected, strict=True) if s != e)
        raise InvalidInput(f"is out of order: got {', '.join(sent)}, expected {', '.join(expected)}", field=wrong)
    for value, feature in zip(values, features, strict=True):
        if feature.kind is FeatureKind.IMAGE:
            if value.WhichOneof("value") != "image":
                raise InvalidInput("is a camera and must come as an image", field=feature.name)
            if (value.image.height, value.image.width) != feature.shape[:2]:
                raise InvalidInput(
                    f"is {value.image.height}x{value.image.width}, the spec says {feature.shape[0]}x{feature.shape[1]}",
                    field=feature.name,
                )
        elif value.WhichOneof("value") != "tensor" or tuple(value.tensor.shape) != feature.shape:
            raise InvalidInput(f"has shape {tuple(value.tensor.shape)}, the spec says {feature.shape}", field=feature.name)
