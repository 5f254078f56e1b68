"""What pictures were seen as is found by the robot that had them, and by nobody else."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from services.inference.fused.kept_vision import MOST_OF_AN_OWNER, KeptVision

SHAPE = (6, 4)


@pytest.fixture
def kept() -> KeptVision:
    return KeptVision(5, SHAPE, dtype=torch.float32, device=torch.device("cpu"))


def pictures(seed: int, *, lacks: int | None = None) -> list[npt.NDArray[np.uint8] | None]:
    random_numbers = np.random.default_rng(seed)
    made = [random_numbers.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in range(3)]
    return [None if camera == lacks else picture for camera, picture in enumerate(made)]


def tokens(number: float) -> torch.Tensor:
    return torch.full((3, 2, 4), number)


def found(kept: KeptVision, owner: str, seed: int, *, lacks: int | None = None) -> float | None:
    seen = kept.find(owner, pictures(seed, lacks=lacks))
    if seen is None:
        return None
    assert seen.shape == SHAPE
    return float(seen.unique().item())


def test_the_same_pictures_are_found_by_their_owner_alone(kept: KeptVision) -> None:
    kept.keep("left", pictures(1), tokens(1.0))
    kept.keep("right", pictures(2), tokens(2.0))
    assert found(kept, "left", 1) == 1.0
    assert found(kept, "right", 2) == 2.0
    assert found(kept, "left", 2) is None
    assert found(kept, "right", 1) is None


@pytest.mark.parametrize("camera", [0, 1, 2])
def test_a_picture_that_differs_in_one_byte_or_is_missing_is_another(kept: KeptVision, camera: int) -> None:
    kept.keep("left", pictures(1), tokens(1.0))
    changed = pictures(1)
    picture = changed[camera]
    assert picture is not None
    picture[-1, -1, -1] ^= 1
    assert kept.find("left", changed) is None
    assert found(kept, "left", 1, lacks=camera) is None
    kept.keep("left", pictures(1, lacks=camera), tokens(3.0))
    assert found(kept, "left", 1, lacks=camera) == 3.0
    assert found(kept, "left", 1) == 1.0


def test_what_is_kept_is_a_copy(kept: KeptVision) -> None:
    seen = tokens(1.0)
    kept.keep("left", pictures(1), seen)
    seen.zero_()
    assert found(kept, "left", 1) == 1.0


def test_nobodys_pictures_are_not_kept(kept: KeptVision) -> None:
    kept.keep("", pictures(1), tokens(1.0))
    assert found(kept, "", 1) is None


def test_an_owner_has_its_last_two_and_the_oldest_of_all_makes_room(kept: KeptVision) -> None:
    kept.keep("right", pictures(9), tokens(9.0))
    for seed in range(1, 10):
        kept.keep("left", pictures(seed), tokens(float(seed)))
    assert MOST_OF_AN_OWNER == 2
    assert [seed for seed in range(10) if found(kept, "left", seed) == float(seed)] == [8, 9]
    assert found(kept, "right", 9) == 9.0
    for number in range(3):
        kept.keep(f"other {number}", pictures(number), tokens(20.0 + number))
    assert found(kept, "right", 9) is None
    assert [found(kept, "left", seed) for seed in (8, 9)] == [8.0, 9.0]
    assert [found(kept, f"other {number}", number) for number in range(3)] == [20.0, 21.0, 22.0]


def test_nothing_is_found_after_new_weights(kept: KeptVision) -> None:
    for seed in range(5):
        kept.keep(f"robot {seed}", pictures(seed), tokens(float(seed)))
    kept.forget()
    assert found(kept, "robot 1", 1) is None
    kept.keep("robot 1", pictures(1), tokens(7.0))
    assert found(kept, "robot 1", 1) == 7.0
