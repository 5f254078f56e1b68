"""How long units of work take on a device that is simulated. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .units import EXPERT_SIZES, UnitKind


@dataclass(frozen=True, kw_only=True)
class UnitDurations:
    """How long a unit takes, in seconds by its size; between two sizes as long as a straight line says.

    Engines prepare some sizes (expert_sizes(); else sizes that double), and a unit runs as the next bigger one.

    Attributes:
        text_pictures_s, num_picture_slices: Of a question's prefix, what sees its pictures, and the units that this comes
            in: the first. Left out where the robot's last chunk saw the same.
        text_prefix_s, num_text_slices: The others.
        text_lag_s: From the end of a text unit to the first decision that knows of it: tokens come by way of the host, and
            what is next on the device is decided before the device is free.
        jitter: Standard deviation of all of them, as a share.
    """

    prefix_s: Mapping[int, float]
    expert_step_s: Mapping[int, float]
    text_prefix_s: float
    draft_check_s: float
    text_step_s: Mapping[int, float]
    text_pictures_s: float = 0.0
    num_picture_slices: int = 0
    num_text_slices: int = 1
    text_lag_s: float = 0.0
    jitter: float = 0.02

    @property
    def question_s(self) -> float:
        """The whole prefix of a question that sees its pictures."""
        return self.text_pictures_s + self.text_prefix_s

    @property
    def num_question_slices(self) -> int:
        return self.num_picture_slices + self.num_text_slices

    def slice_s(self, index: int) -> float:
        """Of a question's prefix."""
        if index < self.num_picture_slices:
            return self.text_pictures_s / self.num_picture_slices
        return self.text_prefix_s / self.num_text_slices

    def of(self, kind: UnitKind, size: int) -> float:
        """A slice of a question's prefix as the longest of them."""
        prepared = 1 << (size - 1).bit_length()
        if kind is UnitKind.EXPERT:
            return interpolate(self.expert_step_s, next((known for known in EXPERT_SIZES if known >= size), prepared))
        if kind is UnitKind.PREFIX:
            return interpolate(self.prefix_s, prepared)
        if kind is UnitKind.TEXT:
            return interpolate(self.text_step_s, prepared)
        if kind is UnitKind.DRAFT_CHECK:
            return self.draft_check_s
        return max(self.slice_s(0), self.slice_s(self.num_picture_slices))


def interpolate(seconds_by_size: Mapping[int, float], size: int) -> float:
    """Along straight lines; beyond the largest size in proportion."""
    if size in seconds_by_size:
        return seconds_by_size[size]
    smaller = [known for known in seconds_by_size if known < size]
    bigger = [known for known in seconds_by_size if known > size]
    if not smaller:
        return seconds_by_size[min(bigger)]
    low = max(smaller)
    if not bigger:
        return seconds_by_size[low] * size / low
    high = min(bigger)
    share = (size - low) / (high - low)
    return seconds_by_size[low] + share * (seconds_by_size[high] - seconds_by_size[low])
