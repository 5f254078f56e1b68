"""The curve of a run: rank 0 appends points to a file, the learner and anyone else reads it as it grows.

A file and not a queue of Ray's: it is still there when the worker, Ray or the learner died.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["started", "metrics", "published", "note"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One line of the file.

    Attributes:
        kind: "started" by a worker's loop, "metrics", "published" or "note" (something for people to know).
        step: Optimiser steps done when it was written.
        metrics: As "train/loss".
        number, digest: Of the published version.
    """

    kind: Kind
    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    number: int = 0
    digest: str = ""
    note: str = ""

    def to_line(self) -> str:
        values: dict[str, Any] = {"kind": self.kind, "step": self.step}
        for name in ("metrics", "number", "digest", "note"):
            if value := getattr(self, name):
                values[name] = dict(value) if isinstance(value, Mapping) else value
        return json.dumps(values) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Point:
        return cls(**json.loads(line))


class ProgressWriter:
    """Appends whole lines; any thread."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        torn = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        self._file = path.open("a")
        if torn:  # A killed writer's last line: readers skip it once it has an end.
            self._file.write("\n")

    def write(self, point: Point) -> None:
        with self._lock:
            self._file.write(point.to_line())
            self._file.flush()

    def close(self) -> None:
        with self._lock:
            self._file.close()


class ProgressReader:
    """Reads what was added since the last call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read_new(self) -> list[Point]:
        """Points of the lines that are complete; a torn line is passed over."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        points = []
        for line in complete.decode(errors="replace").splitlines():
            try:
                points.append(Point.from_line(line))
            except (ValueError, TypeError):
                continue
        return points


def curve(points: Sequence[Point]) -> list[Point]:
    """The run's metrics in order of step: what a restarted worker did again counts once, as it was done last."""
    kept: list[Point] = []
    for point in points:
        if point.kind == "started":
            kept = [old for old in kept if old.step <= point.step]
        elif point.kind == "metrics":
            kept.append(point)
    return kept


def plot(points: Sequence[Point], path: Path) -> None:
    """The loss over steps as a PNG, a line at each published version."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    metrics = [point for point in curve(points) if "train/loss" in point.metrics]
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    axes.plot([point.step for point in metrics], [point.metrics["train/loss"] for point in metrics], linewidth=1)
    for point in points:
        if point.kind == "published":
            axes.axvline(point.metrics.get("publish/step", point.step), color="tab:green", alpha=0.4, linewidth=1)
            axes.text(point.metrics.get("publish/step", point.step), axes.get_ylim()[1], f"v{point.number}", fontsize=7)
    axes.set(xlabel="step", ylabel="train/loss", yscale="log" if metrics else "linear")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
