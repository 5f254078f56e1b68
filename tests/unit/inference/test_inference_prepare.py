"""From a request's values to what the model's spec says."""

from __future__ import annotations

import numpy as np
import pytest

from manyhands import codec
from manyhands.common.v1 import common_pb2
from manyhands.errors import InvalidInput
from manyhands.spec import Feature, FeatureKind, Spec
from services.inference.prepare import check_sample, letterbox, prepare_sample
from services.inference.sessions import fit

CAMERA = "observation.images.front"


def spec(state_size: int, height: int, width: int, *, ceiling: bool = False) -> Spec:
    cameras = [Feature(name=CAMERA, kind=FeatureKind.IMAGE, dtype="uint8", shape=(height, width, 3))]
    if ceiling:
        cameras.append(
            Feature(name="observation.images.ceiling", kind=FeatureKind.IMAGE, dtype="uint8", shape=(height, width, 3))
        )
    state = Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(state_size,))
    action = Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(2,))
    return Spec(observation=(state, *cameras), action=(action,), control_rate_hz=10.0)


@pytest.mark.parametrize(
    ("height", "width", "inside"),
    [
        (40, 80, (slice(5, 15), slice(0, 20))),
        (80, 40, (slice(0, 20), slice(5, 15))),
        (10, 10, (slice(0, 20), slice(0, 20))),
        (30, 31, (slice(0, 19), slice(0, 20))),  # The odd row goes to the bottom.
    ],
)
def test_a_picture_keeps_its_ratio_and_is_centred_on_black(height: int, width: int, inside: tuple[slice, slice]) -> None:
    white = np.full((height, width, 3), 255, dtype=np.uint8)
    fitted = letterbox(white, 20, 20)
    expected = np.zeros((20, 20, 3), dtype=np.uint8)
    expected[inside] = 255
    np.testing.assert_array_equal(fitted, expected)


def test_pictures_are_resized_and_vectors_padded_to_the_models_spec() -> None:
    robot, model = spec(3, 40, 80), spec(5, 20, 20)
    robot_fit = fit(robot, model, masks_cameras=False)
    pixels = np.full((40, 80, 3), 255, dtype=np.uint8)
    state = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    for picture in (pixels, letterbox(pixels, 20, 20)):  # The robot may resize by itself.
        values = codec.encode_values(
            {"observation.state": state, CAMERA: picture}, image_encoding=common_pb2.IMAGE_ENCODING_RAW_RGB8
        )
        sample = prepare_sample(values, "reach", robot_fit=robot_fit, model_spec=model)
        np.testing.assert_array_equal(sample.observation["observation.state"], [1, 2, 3, 0, 0])
        np.testing.assert_array_equal(sample.observation[CAMERA], letterbox(pixels, 20, 20))


def test_a_feature_that_need_not_be_sent_must_not_be_sent() -> None:
    robot, model = spec(3, 20, 20, ceiling=True), spec(3, 20, 20)
    robot_fit = fit(robot, model, masks_cameras=False)
    picture = np.zeros((20, 20, 3), dtype=np.uint8)
    values = codec.encode_values(
        {"observation.state": np.zeros(3, dtype=np.float32), CAMERA: picture, "observation.images.ceiling": picture}
    )
    with pytest.raises(InvalidInput, match="is not expected") as refused:
        prepare_sample(values, "reach", robot_fit=robot_fit, model_spec=model)
    assert refused.value.field == "observation.images.ceiling"
    prepare_sample(values[:2], "reach", robot_fit=robot_fit, model_spec=model)


def test_a_picture_is_quick_where_it_is_small_and_need_not_be_resized() -> None:
    robot, model = spec(3, 20, 20, ceiling=True), spec(3, 20, 20, ceiling=True)
    picture = np.zeros((20, 20, 3), dtype=np.uint8)
    arrays = {"observation.state": np.zeros(3, dtype=np.float32), CAMERA: picture, "observation.images.ceiling": picture}
    robot_fit = fit(robot, model, masks_cameras=False)
    png = codec.encode_values(arrays, image_encoding=common_pb2.IMAGE_ENCODING_PNG)
    jpeg = codec.encode_values(arrays)
    for values, quick in ((jpeg, 0), ([*png[:2], jpeg[2]], 1), (png, None)):
        assert check_sample(values, "reach", robot_fit=robot_fit, model_spec=model).quick_picture == quick
    larger = spec(3, 40, 40, ceiling=True)
    robot_fit = fit(robot, larger, masks_cameras=False)
    assert check_sample(jpeg, "reach", robot_fit=robot_fit, model_spec=larger).quick_picture is None
