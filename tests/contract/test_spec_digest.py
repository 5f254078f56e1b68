"""The canonical form of a Spec is a contract too: every release must give these features this digest."""

from __future__ import annotations

import dataclasses

import pytest

from manyhands.errors import InvalidInput
from manyhands.spec import Feature, FeatureKind, Spec

SPEC = Spec(
    observation=(
        Feature(
            name="observation.state",
            kind=FeatureKind.STATE,
            dtype="float32",
            shape=(2,),
            element_names=("shoulder.pos", "gripper.pos"),
            element_units=("rad", "1"),
        ),
        Feature(name="observation.images.wrist", kind=FeatureKind.IMAGE, dtype="uint8", shape=(480, 640, 3)),
    ),
    action=(
        Feature(
            name="action",
            kind=FeatureKind.ACTION,
            dtype="float32",
            shape=(2,),
            element_names=("shoulder.pos", "gripper.pos"),
            element_units=("rad", "µm"),
        ),
    ),
    control_rate_hz=30,
    robot_type="so101",
)
RECORDED_DIGEST = "e27b111a9c9bd34a764260176368545747373c2234d3b00416f63762fe6db875"


def test_digest_is_the_recorded_one() -> None:
    assert SPEC.digest.hex() == RECORDED_DIGEST


def test_digest_crosses_the_wire() -> None:
    back = Spec.from_proto(SPEC.to_proto())
    assert back == SPEC
    assert back.digest.hex() == RECORDED_DIGEST


def test_robot_type_is_not_part_of_it() -> None:
    assert dataclasses.replace(SPEC, robot_type="").digest == SPEC.digest


@pytest.mark.parametrize(
    "change",
    [
        {"control_rate_hz": 31},
        {"observation": SPEC.observation[::-1]},
        {"observation": SPEC.observation[:1]},
        {"action": (dataclasses.replace(SPEC.action[0], name="action.arm"),)},
        {"action": (dataclasses.replace(SPEC.action[0], dtype="float64"),)},
        {"action": (dataclasses.replace(SPEC.action[0], element_names=("gripper.pos", "shoulder.pos")),)},
        {"action": (dataclasses.replace(SPEC.action[0], element_units=("rad", "m")),)},
    ],
    ids=["rate", "order", "fewer", "name", "dtype", "element order", "unit"],
)
def test_anything_that_would_mislead_a_robot_changes_it(change: dict[str, object]) -> None:
    assert dataclasses.replace(SPEC, **change).digest != SPEC.digest  # type: ignore[arg-type]


def test_a_digest_that_is_not_that_of_the_features_is_refused() -> None:
    message = SPEC.to_proto()
    message.observation[0].element_names[0] = "elbow.pos"
    with pytest.raises(InvalidInput, match="digest"):
        Spec.from_proto(message)
