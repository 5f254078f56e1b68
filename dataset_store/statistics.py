"""Statistics of episodes and of whole datasets, as meta/episodes and meta/stats.json hold them.

Counts of pictures are frames, never pixels. Means and deviations of a dataset are merged exactly from its episodes';
quantiles are computed again from the values (or every stride-th frame of a large dataset), never merged from quantiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
# One frame in four: neighbours at control rate hardly differ.
PICTURE_STRIDE = 4
_LONG_SIDE_PIXELS = 150
_MAX_QUANTILE_ROWS = 100_000

Summary = dict[str, npt.NDArray[Any]]


@dataclass
class PictureHistogram:
    """How often each value occurs in each channel of the sampled frames; exact to merge.

    Attributes:
        counts: (3, 256) int64.
        num_frames: Frames sampled.
    """

    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((3, 256), np.int64))
    num_frames: int = 0

    def add(self, frame_index: int, pixels: npt.NDArray[np.uint8]) -> None:
        """pixels: (height, width, 3) uint8 RGB; every PICTURE_STRIDE-th is taken, thinned to about 150 pixels a side."""
        if frame_index % PICTURE_STRIDE:
            return
        stride = max(1, max(pixels.shape[:2]) // _LONG_SIDE_PIXELS)
        thinned = pixels[::stride, ::stride]
        for channel in range(3):
            self.counts[channel] += np.bincount(thinned[:, :, channel].ravel(), minlength=256)
        self.num_frames += 1

    def merge(self, other: PictureHistogram) -> None:
        self.counts += other.counts
        self.num_frames += other.num_frames

    def summary(self) -> Summary:
        """Values in [0, 1], shape (3, 1, 1); count is frames."""
        values = np.arange(256) / 255.0
        total = self.counts.sum(axis=1, keepdims=True)
        mean = (self.counts * values).sum(axis=1, keepdims=True) / total
        variance = (self.counts * (values - mean) ** 2).sum(axis=1, keepdims=True) / total
        cumulative = np.cumsum(self.counts, axis=1) / total
        summary: Summary = {
            "min": np.array([[values[np.flatnonzero(row)[0]]] for row in self.counts]),
            "max": np.array([[values[np.flatnonzero(row)[-1]]] for row in self.counts]),
            "mean": mean,
            "std": np.sqrt(variance),
        }
        for name, quantile in QUANTILES.items():
            # The smallest value that so large a share of the pixels does not exceed.
            summary[name] = np.array([[values[np.searchsorted(row, quantile - 1e-12)]] for row in cumulative])
        return {name: value.reshape(3, 1, 1) for name, value in summary.items()} | {"count": np.array([self.num_frames])}

    def to_json(self) -> dict[str, Any]:
        return {"num_frames": self.num_frames, "counts": self.counts.tolist()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> PictureHistogram:
        return cls(counts=np.array(content["counts"], np.int64), num_frames=content["num_frames"])


def summarise(values: npt.NDArray[Any]) -> Summary:
    """Of one column of one episode, (n, d) or (n,); each entry (d,), count (1,)."""
    rows = values.reshape(len(values), -1).astype(np.float64)
    return {
        "min": rows.min(axis=0),
        "max": rows.max(axis=0),
        "mean": rows.mean(axis=0),
        "std": rows.std(axis=0),
        "count": np.array([len(rows)]),
        **quantiles(rows),
    }


def quantiles(rows: npt.NDArray[Any]) -> Summary:
    levels = np.quantile(rows, list(QUANTILES.values()), axis=0)
    return dict(zip(QUANTILES, levels, strict=True))


class Moments:
    """Count, mean, deviation, minimum and maximum of one feature, merged exactly episode by episode."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: npt.NDArray[np.float64] = np.zeros(0)
        self._squares: npt.NDArray[np.float64] = np.zeros(0)
        self._min: npt.NDArray[np.float64] = np.zeros(0)
        self._max: npt.NDArray[np.float64] = np.zeros(0)

    def merge(self, summary: Mapping[str, npt.NDArray[Any]]) -> None:
        count = int(summary["count"][0])
        mean = np.asarray(summary["mean"], np.float64)
        squares = np.asarray(summary["std"], np.float64) ** 2 * count
        if not self.count:
            self.count, self._mean, self._squares = count, mean, squares
            self._min, self._max = summary["min"], summary["max"]
            return
        total = self.count + count
        delta = mean - self._mean
        self._squares = self._squares + squares + delta**2 * (self.count * count / total)
        self._mean = self._mean + delta * (count / total)
        self._min = np.minimum(self._min, summary["min"])
        self._max = np.maximum(self._max, summary["max"])
        self.count = total

    def summary(self) -> Summary:
        return {
            "min": self._min,
            "max": self._max,
            "mean": self._mean,
            "std": np.sqrt(self._squares / self.count),
            "count": np.array([self.count]),
        }


class QuantileRows:
    """The frames that a dataset's quantiles are computed from: those whose index is a multiple of a power of two.

    All of them up to 100,000 frames; then every second, fourth, ... so that at least 50,000 stay. Which ones is a function
    of the dataset alone, not of how it was published.
    """

    def __init__(self, *, max_rows: int = _MAX_QUANTILE_ROWS) -> None:
        self._max_rows = max_rows
        self.stride = 1
        self._indices: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._rows: dict[str, npt.NDArray[Any]] = {}

    def add(self, columns: Mapping[str, npt.NDArray[Any]]) -> None:
        """columns: (n, ...) arrays by name, `index` among them."""
        indices = columns["index"]
        keep = indices % self.stride == 0
        self._indices = np.concatenate([self._indices, indices[keep]])
        for name, values in columns.items():
            rows = values.reshape(len(values), -1)[keep]
            self._rows[name] = np.concatenate([self._rows[name], rows]) if name in self._rows else rows
        while len(self._indices) > self._max_rows:
            self.stride *= 2
            keep = self._indices % self.stride == 0
            self._indices = self._indices[keep]
            self._rows = {name: rows[keep] for name, rows in self._rows.items()}

    def quantiles(self) -> dict[str, Summary]:
        return {name: quantiles(rows.astype(np.float64)) for name, rows in self._rows.items()}


class DatasetStatistics:
    """Everything meta/stats.json is made of."""

    def __init__(self) -> None:
        self._moments: dict[str, Moments] = {}
        self._rows = QuantileRows()
        self._histograms: dict[str, PictureHistogram] = {}

    def add_episode_summary(self, summaries: Mapping[str, Mapping[str, npt.NDArray[Any]]]) -> None:
        """summaries of the numeric columns of one episode."""
        for name, summary in summaries.items():
            self._moments.setdefault(name, Moments()).merge(summary)

    def add_rows(self, columns: Mapping[str, npt.NDArray[Any]]) -> None:
        self._rows.add(columns)

    def add_histograms(self, histograms: Mapping[str, PictureHistogram]) -> None:
        for name, histogram in histograms.items():
            self._histograms.setdefault(name, PictureHistogram()).merge(histogram)

    def to_json(self, order: Sequence[str]) -> dict[str, Any]:
        """{feature: {statistic: nested lists}} in the order of the features."""
        levels = self._rows.quantiles()
        content: dict[str, Any] = {}
        for name in order:
            if name in self._histograms:
                summary = self._histograms[name].summary()
            else:
                summary = self._moments[name].summary() | levels[name]
            content[name] = {key: value.tolist() for key, value in summary.items()}
        return content
