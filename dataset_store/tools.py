"""manyhands dataset: look at published datasets on disk, without a running store."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from manyhands import config
from manyhands.errors import ManyhandsError, NotFound
from manyhands.knobs import POSITIONAL

from .reader import DatasetReader
from .verify import verify


class Settings(config.Settings):
    """verify ROOT checks every promise of the format; info ROOT describes one dataset; list STORE names a store's."""

    examples: ClassVar[tuple[str, ...]] = ("verify ~/manyhands-data/datasets/reach", "list ~/manyhands-data")

    action: Annotated[Literal["verify", "info", "list"], POSITIONAL] = Field(description="what to do")
    root: Annotated[Path, POSITIONAL] = Field(description="a published dataset's folder; for list a store's folder")
    videos: bool = Field(True, description="verify: also count the frames of every video file")


def main(settings: Settings) -> int:
    root = settings.root.expanduser()
    try:
        if settings.action == "verify":
            return _verify(root, videos=settings.videos)
        if settings.action == "info":
            return _info(root)
        return _list(root)
    except ManyhandsError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _verify(root: Path, *, videos: bool) -> int:
    report = verify(root, videos=videos)
    for note in report.notes:
        _say(f"note: {note}")
    for problem in report.problems:
        _say(f"PROBLEM: {problem}")
    state = "not conformant" if report.problems else "conformant"
    _say(f"{root}: {report.num_episodes} episodes, {report.num_frames} frames, {state}")
    return 1 if report.problems else 0


def _info(root: Path) -> int:
    reader = DatasetReader(root)
    duration_s = reader.num_frames / reader.fps
    _say(f"{root}: {reader.num_episodes} episodes, {reader.num_frames} frames at {reader.fps} Hz ({duration_s:.0f} s)")
    _say(f"robot type: {reader.info.get('robot_type') or 'any'}; content {reader.digest.hex()[:16]}")
    for label, features in (("observation", reader.spec.observation), ("action", reader.spec.action)):
        for feature in features:
            _say(f"{label}: {feature.name} {feature.dtype} {list(feature.shape)}")
    for index, task in enumerate(reader.tasks):
        count = sum(task in episode.tasks for episode in reader.episodes)
        _say(f"task {index}: {task!r}, {count} episodes")
    return 0


def _list(root: Path) -> int:
    folders = sorted(path for path in (root / "datasets").glob("*") if path.is_dir())
    if not folders:
        raise NotFound(f"{root} is no store's folder, or has no dataset yet", field="root")
    for folder in folders:
        try:
            reader = DatasetReader(folder)
            _say(f"{folder.name}: {reader.num_episodes} episodes, {reader.num_frames} frames")
        except NotFound:
            _say(f"{folder.name}: nothing published yet")
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
