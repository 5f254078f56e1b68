"""Numbers to model space and back, with the formulas and constants of lerobot's normalizer, so that its statistics fit ours.

    MEAN_STD    (x - mean) / (std + 1e-8)               back: y * std + mean
    MIN_MAX     2 (x - min) / (max - min) - 1           back: (y + 1) / 2 * (max - min) + min
    QUANTILES   as MIN_MAX with q01 and q99
    QUANTILE10  as MIN_MAX with q10 and q90
    IDENTITY    x

A range of zero counts as 1e-8. Nothing is clipped. Tensors and NumPy arrays go through the same formulas and come out the
same bits; for a single observation NumPy is several times faster, and does not let go of the interpreter in between.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from manyhands.errors import InvalidInput

EPSILON = 1e-8
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}

Statistics = Mapping[str, npt.NDArray[np.float64]]
# float32, either kind.
Numbers = TypeVar("Numbers", torch.Tensor, npt.NDArray[np.float32])


class Normalization(enum.Enum):
    IDENTITY = "identity"
    MEAN_STD = "mean_std"
    MIN_MAX = "min_max"
    QUANTILES = "quantiles"
    QUANTILE10 = "quantile10"


USED = {
    Normalization.MEAN_STD: ("mean", "std"),
    Normalization.MIN_MAX: ("min", "max"),
    Normalization.QUANTILES: ("q01", "q99"),
    Normalization.QUANTILE10: ("q10", "q90"),
}


class Normalizer(nn.Module):
    """(..., size) float32 vectors. Its two rows of statistics are buffers, part of the state dict.

    Until set() it changes nothing (mean 0 and std 1, or -1 to 1).
    """

    first: torch.Tensor
    second: torch.Tensor

    def __init__(self, normalization: Normalization, size: int) -> None:
        super().__init__()
        self.normalization = normalization
        if normalization is not Normalization.IDENTITY:
            is_mean_std = normalization is Normalization.MEAN_STD
            self.register_buffer("first", torch.full((size,), 0.0 if is_mean_std else -1.0))
            self.register_buffer("second", torch.ones(size))

    def set(self, statistics: Statistics, *, field: str) -> None:
        """Takes {"mean": (size,), ...}; InvalidInput names what is missing, misshapen or not finite."""
        if self.normalization is Normalization.IDENTITY:
            return
        for name, buffer in zip(USED[self.normalization], (self.first, self.second), strict=True):
            if name not in statistics:
                raise InvalidInput(f"statistics lack {name!r}, which {self.normalization.value} needs", field=field)
            value = np.asarray(statistics[name], dtype=np.float32)
            if value.shape != tuple(buffer.shape) or not np.isfinite(value).all():
                raise InvalidInput(
                    f"statistic {name!r} has shape {value.shape}, expected {tuple(buffer.shape)} of finite numbers",
                    field=field,
                )
            buffer.copy_(torch.from_numpy(value))

    def statistics(self) -> dict[str, torch.Tensor]:
        """As set() takes them, on the CPU; {} while it changes nothing."""
        if self.normalization is Normalization.IDENTITY:
            return {}
        usual = Normalizer(self.normalization, len(self.first))
        found = (self.first.cpu(), self.second.cpu())
        if torch.equal(found[0], usual.first) and torch.equal(found[1], usual.second):
            return {}
        return dict(zip(USED[self.normalization], found, strict=True))

    def normalize(self, x: Numbers) -> Numbers:
        if self.normalization is Normalization.IDENTITY:
            return x
        first, second = self._like(x)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            if self.normalization is Normalization.MEAN_STD:
                return (x - first) / (second + EPSILON)
            return 2.0 * (x - first) / _range(first, second) - 1.0

    def unnormalize(self, y: Numbers) -> Numbers:
        if self.normalization is Normalization.IDENTITY:
            return y
        first, second = self._like(y)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            if self.normalization is Normalization.MEAN_STD:
                return y * second + first
            return (y + 1.0) / 2.0 * _range(first, second) + first

    def _like(self, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """The statistics as numbers are; of a policy on a device, NumPy's are fetched each time."""
        if isinstance(numbers, torch.Tensor):
            return self.first, self.second
        return self.first.numpy(force=True), self.second.numpy(force=True)


def _range(first: Numbers, second: Numbers) -> Numbers:
    width = second - first
    if isinstance(width, torch.Tensor):
        return torch.where(width == 0, EPSILON, width)
    return np.where(width == 0, np.float32(EPSILON), width)


def compute_statistics(values: npt.NDArray[np.generic]) -> dict[str, npt.NDArray[np.float64]]:
    """{mean, std, min, max, q01, q10, q50, q90, q99, count} over all rows of (..., size) numbers."""
    rows = np.asarray(values, dtype=np.float64).reshape(-1, values.shape[-1])
    if not len(rows):
        raise InvalidInput("statistics need at least one row", field="statistics")
    statistics = {"mean": rows.mean(0), "std": rows.std(0), "min": rows.min(0), "max": rows.max(0)}
    for name, value in zip(QUANTILES, np.quantile(rows, list(QUANTILES.values()), axis=0), strict=True):
        statistics[name] = value
    statistics["count"] = np.array([len(rows)], dtype=np.float64)
    return statistics


def relative_mask(size: int, names: Sequence[str] | None, exclude: Sequence[str]) -> npt.NDArray[np.bool_]:
    """(size,) True where an action is relative: all but those whose name holds one of exclude, in any case.

    names: Of the actions, in order; those beyond its end, or all where it is None, have no name to go by.
    """
    parts = [part.lower() for part in exclude]
    mask = np.ones(size, dtype=np.bool_)
    for index, name in enumerate((names or ())[:size]):
        mask[index] = not any(part in name.lower() for part in parts)
    return mask


def to_relative(actions: Numbers, state: Numbers, mask: Any) -> Numbers:
    """(B, H, R) actions minus (B, R) state where mask (R,); before normalisation. The mask is of the same kind, bool."""
    moved: Numbers = actions - state[:, None, :] * mask
    return moved


def to_absolute(actions: Numbers, state: Numbers, mask: Any) -> Numbers:
    """Undoes to_relative(); after un-normalisation, with the same raw state."""
    moved: Numbers = actions + state[:, None, :] * mask
    return moved
