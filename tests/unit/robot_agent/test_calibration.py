"""A calibration is checked for what goes wrong in practice, and the message names the joint."""

from __future__ import annotations

import dataclasses
import math

import pytest

from manyhands.errors import InvalidInput
from robot_agent.calibration import JointCalibration, check_calibration, check_position

PAN = JointCalibration(name="pan", motor_id=1, low_count=1000, high_count=3000, zero_count=2048)
TILT = JointCalibration(name="tilt", motor_id=2, low_count=500, high_count=2500, zero_count=1500, direction=-1)


def check(*joints, motor_ids=(1, 2)) -> None:
    check_calibration(joints, element_names=("pan.pos", "tilt.pos"), motor_ids=motor_ids, counts_per_turn=4096)


def test_a_good_calibration_passes_and_converts():
    check(PAN, TILT)
    assert PAN.to_rad(2048 + 1024, 4096) == pytest.approx(math.pi / 2)
    assert TILT.to_rad(1500 + 1024, 4096) == pytest.approx(-math.pi / 2)


def test_joints_in_another_order_are_refused():
    with pytest.raises(InvalidInput, match="in this order"):
        check(TILT, PAN)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"motor_id": 1}, "also pan's"),
        ({"motor_id": 7}, "does not answer"),
        ({"low_count": 3000, "high_count": 400}, "crosses the encoder's end"),
        ({"high_count": 4096}, "not within"),
        ({"low_count": -1}, "not within"),
        ({"zero_count": 400}, "outside"),
        ({"direction": 0}, "direction"),
    ],
)
def test_what_cannot_be_is_refused_by_joint(change, words):
    with pytest.raises(InvalidInput, match=words) as caught:
        check(PAN, dataclasses.replace(TILT, **change))
    assert caught.value.field == "tilt"


@pytest.mark.parametrize("count", [980, 1000, 3000, 3020])
def test_a_joint_within_its_range_may_be_powered(count):
    check_position(PAN, count, counts_per_turn=4096)


@pytest.mark.parametrize(
    ("count", "words"), [(979, "outside"), (3021, "outside"), (2000 + 4096, "wrapped"), (2000 - 4096, "wrapped")]
)
def test_a_joint_where_it_cannot_be_is_not_powered(count, words):
    with pytest.raises(InvalidInput, match=words):
        check_position(PAN, count, counts_per_turn=4096)
