"""Checks a servo arm's calibration before it is believed: order, range, wrap-around.

A servo reports an encoder count in 0 .. counts_per_turn - 1. Calibration says which servo is which joint, between which
counts it may move, and which count is the joint's zero. The usual accidents: two joints swapped on the bus, a range that
crosses the encoder's end (so that a small motion reads as a whole turn), a zero outside the range, a direction reversed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from manyhands.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class JointCalibration:
    """One joint: counts are encoder counts; direction is 1 or -1; zero_count is the count at 0 rad."""

    name: str
    motor_id: int
    low_count: int
    high_count: int
    zero_count: int
    direction: int = 1

    def to_rad(self, count: int, counts_per_turn: int) -> float:
        return self.direction * (count - self.zero_count) * math.tau / counts_per_turn


def check_calibration(
    joints: Sequence[JointCalibration], *, element_names: Sequence[str], motor_ids: Sequence[int], counts_per_turn: int
) -> None:
    """Raises InvalidInput for the first joint that cannot be right.

    Args:
        element_names: The spec's elements, in order; "elbow.pos" belongs to joint "elbow".
        motor_ids: Motors that answered on the bus.
        counts_per_turn: Of the encoder, 4096 for an STS3215.
    """
    expected = [name.rpartition(".")[0] or name for name in element_names]
    names = [joint.name for joint in joints]
    if names != expected:
        raise InvalidInput(
            f"the calibration has {', '.join(names)}, the spec says {', '.join(expected)}, in this order",
            field="calibration",
        )
    seen: dict[int, str] = {}
    for joint in joints:
        if joint.motor_id in seen:
            raise InvalidInput(f"motor {joint.motor_id} is also {seen[joint.motor_id]}'s", field=joint.name)
        if joint.motor_id not in motor_ids:
            raise InvalidInput(f"motor {joint.motor_id} does not answer; there are {sorted(motor_ids)}", field=joint.name)
        seen[joint.motor_id] = joint.name
        if joint.direction not in (1, -1):
            raise InvalidInput(f"direction ({joint.direction}) must be 1 or -1", field=joint.name)
        if not 0 <= joint.low_count < counts_per_turn or not 0 <= joint.high_count < counts_per_turn:
            raise InvalidInput(
                f"range {joint.low_count} .. {joint.high_count} is not within 0 .. {counts_per_turn - 1}", field=joint.name
            )
        if joint.low_count >= joint.high_count:
            raise InvalidInput(
                f"range {joint.low_count} .. {joint.high_count} crosses the encoder's end: mount the horn half a turn "
                "further, or move the servo's own offset, and calibrate again",
                field=joint.name,
            )
        if not joint.low_count <= joint.zero_count <= joint.high_count:
            raise InvalidInput(
                f"zero at {joint.zero_count} is outside {joint.low_count} .. {joint.high_count}", field=joint.name
            )


def check_position(joint: JointCalibration, count: int, *, counts_per_turn: int, margin_counts: int = 20) -> None:
    """Before power: raises InvalidInput when a joint is where its calibration says it cannot be.

    A count about a turn away from the range is named as what it is, since driving from there would go the long way round.
    """
    if joint.low_count - margin_counts <= count <= joint.high_count + margin_counts:
        return
    for turn in (-counts_per_turn, counts_per_turn):
        if joint.low_count - margin_counts <= count + turn <= joint.high_count + margin_counts:
            raise InvalidInput(
                f"count {count} is one turn away from its range: its encoder wrapped; calibrate again", field=joint.name
            )
    raise InvalidInput(
        f"count {count} is outside {joint.low_count} .. {joint.high_count}: joints swapped, or calibrated on another arm",
        field=joint.name,
    )
