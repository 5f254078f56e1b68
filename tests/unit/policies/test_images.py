"""Pictures as the large policies take them; what is no picture is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from manyhands.errors import InvalidInput
from policies import images
from policies.images import Padding

CAMERAS = ("observation.images.front", "observation.images.wrist", "observation.images.back")


def test_ratio_is_kept_and_bars_are_black_and_centred() -> None:
    prepared = images.prepare(torch.ones(1, 3, 20, 41), 20, 20)
    rows = (prepared[0, 0] == 1.0).all(dim=1)
    # 41 x 20 becomes 20 x 9: eleven rows are left over, five above and six below.
    assert rows.tolist() == [False] * 5 + [True] * 9 + [False] * 6
    assert (prepared[0, :, ~rows] == -1.0).all()


def test_padding_left_and_top() -> None:
    prepared = images.prepare(torch.ones(1, 3, 20, 41), 20, 20, padding=Padding.LEFT_TOP)
    assert (prepared[0, 0] == 1.0).all(dim=1).tolist() == [False] * 11 + [True] * 9


def test_a_picture_of_the_right_size_is_only_scaled() -> None:
    picture = torch.rand(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(images.prepare(picture, 8, 6), picture * 2 - 1)


def test_channels_last_is_the_same() -> None:
    picture = torch.rand(2, 3, 9, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(images.prepare(picture.permute(0, 2, 3, 1), 8, 8), images.prepare(picture, 8, 8))


def test_bytes_to_unit_range() -> None:
    picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
    floats = images.to_unit_range(picture, field="front")
    assert floats.shape == (1, 3, 2, 4)
    assert floats[0, 2, 1, 3] == picture[1, 3, 2] / np.float32(255)


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((4, 4, 3), dtype=np.float32),
        np.zeros((3, 4, 4), dtype=np.uint8),
        np.zeros((4, 4), dtype=np.uint8),
        np.zeros((4, 4, 4), dtype=np.uint8),
        np.zeros((0, 4, 3), dtype=np.uint8),
    ],
    ids=["floats", "channels first", "grey", "alpha", "empty"],
)
def test_what_is_no_camera_picture_is_refused(picture: np.ndarray) -> None:
    with pytest.raises(InvalidInput, match="front"):
        images.to_unit_range(picture, field="front")


@pytest.mark.parametrize(
    "picture",
    [
        torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
        torch.zeros(3, 4, 4),
        torch.zeros(1, 4, 4, 4),
        torch.full((1, 3, 4, 4), 1.01),
        torch.full((1, 3, 4, 4), -0.01),
        torch.full((1, 3, 4, 4), torch.nan),
        torch.zeros(1, 3, 0, 4),
    ],
    ids=["bytes", "no rows", "channels", "over 1", "under 0", "nan", "empty"],
)
def test_what_is_no_prepared_picture_is_refused(picture: torch.Tensor) -> None:
    with pytest.raises(InvalidInput, match="wrist"):
        images.prepare(picture, 8, 8, field="wrist")


def test_missing_cameras_come_last_and_only_so_many() -> None:
    given = {CAMERAS[1]: torch.zeros(2, 3, 8, 8)}
    everything = images.prepare_cameras(given, CAMERAS, 8, 8)
    assert everything.names == (CAMERAS[1], CAMERAS[0], CAMERAS[2])
    assert [valid.tolist() for valid in everything.valid] == [[True] * 2, [False] * 2, [False] * 2]
    assert images.prepare_cameras(given, CAMERAS, 8, 8, max_missing=1).names == (CAMERAS[1], CAMERAS[0])
    assert images.prepare_cameras(given, CAMERAS, 8, 8, max_missing=0).names == (CAMERAS[1],)


def test_cameras_that_do_not_fit_are_named() -> None:
    with pytest.raises(InvalidInput, match=r"observation\.images\.side"):
        images.prepare_cameras({"observation.images.side": torch.zeros(1, 3, 8, 8)}, CAMERAS, 8, 8)
    with pytest.raises(InvalidInput, match="lacks every camera"):
        images.prepare_cameras({}, CAMERAS, 8, 8)
    with pytest.raises(InvalidInput, match=r"\[1, 2\] rows"):
        images.prepare_cameras({CAMERAS[0]: torch.zeros(1, 3, 8, 8), CAMERAS[1]: torch.zeros(2, 3, 8, 8)}, CAMERAS, 8, 8)
