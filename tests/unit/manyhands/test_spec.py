"""A robot and a model that disagree hear which feature it is, before anything moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from manyhands import codec
from manyhands.common.v1 import common_pb2
from manyhands.errors import InvalidInput
from manyhands.spec import Feature, FeatureKind, Spec, decode_in_order

STATE = Feature(
    name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(2,), element_names=("shoulder", "elbow")
)
WRIST = Feature(name="observation.images.wrist", kind=FeatureKind.IMAGE, dtype="uint8", shape=(32, 48, 3))
TOP = Feature(name="observation.images.top", kind=FeatureKind.IMAGE, dtype="uint8", shape=(32, 48, 3))
ACTION = Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(2,))
FEATURES = (STATE, WRIST, TOP)

Values = list[common_pb2.NamedValue]


def _values() -> Values:
    picture = np.full((32, 48, 3), 90, np.uint8)
    return codec.encode_values({STATE.name: np.array([0.5, 1], np.float32), WRIST.name: picture, TOP.name: picture})


def test_values_in_order_are_decoded() -> None:
    arrays = decode_in_order(_values(), FEATURES)
    assert list(arrays) == [STATE.name, WRIST.name, TOP.name]
    np.testing.assert_array_equal(arrays[STATE.name], [0.5, 1])


def _swap_cameras(values: Values) -> Values:
    return [values[0], values[2], values[1]]


def _drop_state(values: Values) -> Values:
    return values[1:]


def _add(values: Values) -> Values:
    return [*values, common_pb2.NamedValue(name="observation.images.left", image=values[1].image)]


def _repeat(values: Values) -> Values:
    return [*values, values[2]]


def _not_a_number(values: Values) -> Values:
    return [*codec.encode_values({STATE.name: np.array([0, np.nan], np.float32)}), *values[1:]]


def _infinite(values: Values) -> Values:
    return [*codec.encode_values({STATE.name: np.array([-np.inf, 0], np.float32)}), *values[1:]]


def _long(values: Values) -> Values:
    return [*codec.encode_values({STATE.name: np.zeros(3, np.float32)}), *values[1:]]


def _double(values: Values) -> Values:
    return [*codec.encode_values({STATE.name: np.zeros(2, np.float64)}), *values[1:]]


def _small_camera(values: Values) -> Values:
    return [values[0], *codec.encode_values({WRIST.name: np.zeros((16, 24, 3), np.uint8)}), values[2]]


def _camera_as_tensor(values: Values) -> Values:
    tensor = codec.encode_tensor(np.zeros((32, 48, 3), np.uint8))
    return [values[0], common_pb2.NamedValue(name=WRIST.name, tensor=tensor), values[2]]


def _state_as_image(values: Values) -> Values:
    return [common_pb2.NamedValue(name=STATE.name, image=values[1].image), *values[1:]]


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        (_swap_cameras, TOP.name, "out of order"),
        (_drop_state, STATE.name, "missing"),
        (_add, "observation.images.left", "not expected"),
        (_repeat, TOP.name, "twice"),
        (_not_a_number, STATE.name, "element elbow is nan"),
        (_infinite, STATE.name, "element shoulder is -inf"),
        (_long, STATE.name, r"\(3,\).*\(2,\)"),
        (_double, STATE.name, "float64.*float32"),
        (_small_camera, WRIST.name, "16x24.*32x48"),
        (_camera_as_tensor, WRIST.name, "camera"),
        (_state_as_image, STATE.name, "shape"),
        (lambda values: [], STATE.name, "missing"),
    ],
)
def test_the_wrong_feature_is_named(change: Callable[[Values], Values], field: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        decode_in_order(change(_values()), FEATURES)
    assert caught.value.field == field


def test_a_camera_of_another_size_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    values = _small_camera(_values())
    monkeypatch.setattr(codec, "decode_image", lambda *_, **__: pytest.fail("a picture was decoded"))
    with pytest.raises(InvalidInput, match="16x24"):
        decode_in_order(values, FEATURES)


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: Spec(observation=FEATURES, action=(), control_rate_hz=30), "spec.action"),
        (lambda: Spec(observation=FEATURES, action=(ACTION,), control_rate_hz=0), "spec.control_rate_hz"),
        (lambda: Spec(observation=FEATURES, action=(ACTION,), control_rate_hz=float("nan")), "spec.control_rate_hz"),
        (lambda: Spec(observation=(STATE, STATE), action=(ACTION,), control_rate_hz=30), STATE.name),
        (
            lambda: Spec(
                observation=tuple(replace(STATE, name=str(n)) for n in range(256)), action=(ACTION,), control_rate_hz=30
            ),
            "spec",
        ),
        (lambda: Spec(observation=(ACTION,), action=(ACTION,), control_rate_hz=30), "action"),
        (lambda: Spec(observation=(), action=(STATE,), control_rate_hz=30), STATE.name),
        (lambda: Feature(name="a/b", kind=FeatureKind.STATE, dtype="float32", shape=(1,)), "feature.name"),
        (lambda: Feature(name="x", kind=FeatureKind.STATE, dtype="object", shape=(1,)), "dtype"),
        (lambda: Feature(name="x", kind=FeatureKind.STATE, dtype="float32", shape=(0,)), "x"),
        (lambda: Feature(name="x", kind=FeatureKind.IMAGE, dtype="float32", shape=(4, 4, 3)), "x"),
        (lambda: Feature(name="x", kind=FeatureKind.IMAGE, dtype="uint8", shape=(1 << 40, 1 << 40, 3)), "x"),
        (lambda: Feature(name="x", kind=FeatureKind.STATE, dtype="float32", shape=(1 << 62,) * 100_000), "x"),
        (lambda: Feature(name="x", kind=FeatureKind.IMAGE, dtype="uint8", shape=(1 << 62,) * 100_000), "x"),
        (lambda: Feature(name="x", kind=FeatureKind.STATE, dtype="float32", shape=()), "x"),
        (lambda: Feature(name="x", kind=FeatureKind.STATE, dtype="float64", shape=(codec.MAX_VALUE_BYTES // 8 + 1,)), "x"),
        (lambda: Feature(name="x", kind=FeatureKind.STATE, dtype="float32", shape=(2,), element_names=("a",)), "x"),
    ],
)
def test_a_spec_that_cannot_be_names_its_field(build: Callable[[], object], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        build()
    assert caught.value.field == field


def test_a_stranger_cannot_send_more_features_than_a_robot_has() -> None:
    spec = Spec(observation=FEATURES, action=(ACTION,), control_rate_hz=30).to_proto()
    assert Spec.from_proto(spec).observation == FEATURES
    for index in range(100_000):
        spec.observation.add(name=str(index))  # Nothing else is in order: what is read of each would be refused.
    with pytest.raises(InvalidInput, match="has 100004 features, at most 256"):
        Spec.from_proto(spec)


@pytest.mark.parametrize("kind", [0, 99])
def test_an_unknown_kind_from_the_wire_is_refused(kind: int) -> None:
    message = STATE.to_proto()
    message.kind = kind  # type: ignore[assignment]
    with pytest.raises(InvalidInput, match="kind"):
        Feature.from_proto(message)
