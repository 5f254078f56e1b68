"""Does a published root keep the format's promises (FORMAT.md)? Every broken one is found, not only the first."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manyhands.errors import ManyhandsError

from .columns import Columns, from_table
from .definition import INDEX_COLUMNS
from .language import LANGUAGE_DTYPE
from .layout import EPISODES_PATTERN, INFO, REPLACED_FILES, STATS, TASKS, describe_file
from .reader import SUPPORTED_VERSION
from .video import packet_indices

_REQUIRED_INFO = (
    "codebase_version",
    "fps",
    "features",
    "total_episodes",
    "total_frames",
    "total_tasks",
    "chunks_size",
    "data_path",
)
_STATISTICS = ("min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99")


@dataclass(frozen=True, kw_only=True)
class Report:
    """problems: broken promises, each a sentence. notes: harmless, but worth knowing."""

    num_episodes: int
    num_frames: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass
class _Findings:
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, holds: bool | np.bool_, problem: str) -> None:
        if not holds:
            self.problems.append(problem)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What cannot even be read is a problem of its own, and the other parts are still looked at."""
        try:
            yield
        except (OSError, ValueError, KeyError, pa.ArrowException, ManyhandsError) as error:
            self.problems.append(f"{name}: {type(error).__name__}: {error}")


def verify(root: Path, *, videos: bool = True) -> Report:
    """Checks one published root. videos: also count the packets of every mp4 (nothing is decoded)."""
    found = _Findings()
    info: dict[str, Any] = {}
    with found.part(INFO):
        info = json.loads((root / INFO).read_text(encoding="utf-8"))
    missing = [key for key in _REQUIRED_INFO if key not in info]
    if missing:
        found.check(False, f"{INFO} lacks {', '.join(missing)}")
        return Report(num_episodes=0, num_frames=0, problems=tuple(found.problems), notes=tuple(found.notes))
    found.check(
        info["codebase_version"] == SUPPORTED_VERSION,
        f"codebase_version is {info['codebase_version']!r}, only {SUPPORTED_VERSION!r} is supported",
    )
    found.check(list(info["features"])[-5:] == list(INDEX_COLUMNS), f"the last features must be {', '.join(INDEX_COLUMNS)}")
    rows: list[dict[str, Any]] = []
    with found.part("meta/episodes"):
        rows = _check_episodes(root, info, found)
    with found.part("data"):
        columns = _check_data(root, info, rows, found)
        _check_columns(info, rows, columns, found)
    with found.part(TASKS):
        _check_tasks(root, info, rows, found)
    with found.part(STATS):
        _check_statistics(root, info, rows, found)
    if videos:
        for camera in _cameras(info):
            with found.part(f"videos/{camera}"):
                _check_videos(root, info, rows, camera, found)
    with found.part("catalogue"):
        _check_digests(root, found)
    return Report(
        num_episodes=info["total_episodes"],
        num_frames=info["total_frames"],
        problems=tuple(found.problems),
        notes=tuple(found.notes),
    )


def _check_episodes(root: Path, info: Mapping[str, Any], found: _Findings) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for path in sorted((root / "meta" / "episodes").glob("*/*.parquet")):
        for row in pq.read_table(path).to_pylist():
            place = EPISODES_PATTERN.format(
                chunk_index=row["meta/episodes/chunk_index"], file_index=row["meta/episodes/file_index"]
            )
            found.check(root / place == path, f"episode {row['episode_index']} says it is in {place}, it is in {path.name}")
            rows.append(row)
    total = info["total_episodes"]
    found.check(len(rows) >= total, f"meta/episodes has {len(rows)} rows, {INFO} counts {total}")
    if len(rows) > total:
        found.notes.append(f"{len(rows) - total} episodes are written and not yet counted; readers do not see them")
    rows = rows[:total]
    next_index = 0
    for number, row in enumerate(rows):
        found.check(row["episode_index"] == number, f"row {number} of meta/episodes is episode {row['episode_index']}")
        start, stop = row["dataset_from_index"], row["dataset_to_index"]
        found.check(
            start == next_index and stop - start == row["length"] > 0,
            f"episode {number} has rows {start} to {stop} and length {row['length']}, it must begin at {next_index}",
        )
        next_index = stop
    found.check(
        next_index == info["total_frames"], f"the episodes have {next_index} frames, {INFO} counts {info['total_frames']}"
    )
    return rows


def _check_data(root: Path, info: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], found: _Findings) -> Columns:
    expected = [name for name, feature in info["features"].items() if feature["dtype"] != "video"]
    by_path: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        path = info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
        by_path[path].append(row["length"])
    tables: list[pa.Table] = []
    paths = sorted(str(path.relative_to(root)) for path in (root / "data").glob("*/*.parquet"))
    for path in by_path:
        found.check(path in paths, f"{path} is missing")
    for path in paths:
        if path not in by_path:
            if by_path and path < max(by_path):
                found.check(False, f"{path} belongs to no episode and sorts among others: readers take its rows for theirs")
            else:
                found.notes.append(f"{path} is written and not yet counted; readers do not see its episodes")
            continue
        file = pq.ParquetFile(root / path)
        names = file.schema_arrow.names
        found.check(names == expected, f"{path} has columns {', '.join(names)}; the features are {', '.join(expected)}")
        groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        found.check(groups == by_path[path], f"{path} has row groups of {groups} rows, its episodes have {by_path[path]}")
        table = file.read()
        if tables:
            found.check(table.schema.equals(tables[0].schema), f"{path} has another schema than the first data file")
        tables.append(table)
    # Language is rows of text, not numbers.
    rows_of_text = {name for name, feature in info["features"].items() if feature["dtype"] == LANGUAGE_DTYPE}
    tables = [table.select([name for name in table.column_names if name not in rows_of_text]) for table in tables]
    return from_table(pa.concat_tables(tables)) if tables else {}


def _check_columns(info: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], columns: Columns, found: _Findings) -> None:
    num_frames = sum(row["length"] for row in rows)
    if not columns or len(columns["index"]) < num_frames:
        found.check(not num_frames, f"data has {len(columns.get('index', ()))} rows, the episodes {num_frames}")
        return
    lengths = np.array([row["length"] for row in rows], np.int64)
    frame_index = np.concatenate([np.arange(length) for length in lengths])
    expected = {
        "index": np.arange(num_frames),
        "episode_index": np.repeat(np.arange(len(lengths)), lengths),
        "frame_index": frame_index,
        "timestamp": (frame_index / info["fps"]).astype(np.float32),
    }
    for name, values in expected.items():
        wrong = np.flatnonzero(columns[name][:num_frames] != values)
        if wrong.size:
            row = int(wrong[0])
            found.check(
                False, f"{name} of row {row} is {columns[name][row]}, it must be {values[row]} ({wrong.size} rows differ)"
            )
    tasks = columns["task_index"][:num_frames]
    found.check(
        tasks.min() >= 0 and tasks.max() < info["total_tasks"],
        f"task_index goes from {tasks.min()} to {tasks.max()}, there are {info['total_tasks']} tasks",
    )
    for name, values in columns.items():
        if values.dtype.kind == "f":
            bad = np.flatnonzero(~np.isfinite(values[:num_frames]).reshape(num_frames, -1).all(axis=1))
            found.check(not bad.size, f"{name} is not finite in row {bad[0] if bad.size else 0} ({bad.size} rows)")


def _check_tasks(root: Path, info: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], found: _Findings) -> None:
    table = pq.read_table(root / TASKS)
    pandas = json.loads((table.schema.metadata or {}).get(b"pandas", b"{}"))
    found.check(
        pandas.get("index_columns") == ["task"],
        f"{TASKS} does not declare task as pandas' index: readers take row numbers for the tasks",
    )
    found.check(table["task_index"].to_pylist() == list(range(table.num_rows)), f"{TASKS} is not in the order of task_index")
    found.check(
        table.num_rows >= info["total_tasks"], f"{TASKS} has {table.num_rows} tasks, {INFO} counts {info['total_tasks']}"
    )
    known = set(table["task"].to_pylist())
    for row in rows:
        unknown = [task for task in row["tasks"] if task not in known]
        found.check(not unknown, f"episode {row['episode_index']} has tasks that {TASKS} does not: {unknown}")


def _check_statistics(root: Path, info: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], found: _Findings) -> None:
    statistics = json.loads((root / STATS).read_text(encoding="utf-8"))
    for name, feature in info["features"].items():
        if feature["dtype"] in ("string", "language"):
            continue
        entry = statistics.get(name)
        if entry is None or any(key not in entry for key in _STATISTICS):
            found.check(False, f"{STATS} lacks statistics of {name}")
            continue
        finite = all(np.isfinite(np.asarray(entry[key], np.float64)).all() for key in _STATISTICS)
        found.check(finite, f"{STATS} has values of {name} that are not finite")
        shape = (3, 1, 1) if feature["dtype"] == "video" else tuple(feature["shape"])
        found.check(
            np.shape(entry["mean"]) == shape, f"{STATS}: mean of {name} is {np.shape(entry['mean'])}, must be {shape}"
        )
        count = entry["count"][0]
        # Of pictures a sample is counted, in frames; pixels would outnumber them a thousandfold.
        right = 0 < count <= info["total_frames"] if feature["dtype"] == "video" else count >= info["total_frames"]
        found.check(right, f"{STATS} counts {count} of {name} in {info['total_frames']} frames")
        if name == "index" and count > info["total_frames"]:
            found.notes.append(f"{STATS} is newer than {INFO}: the store is publishing, or was killed doing it")


def _check_videos(
    root: Path, info: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], camera: str, found: _Findings
) -> None:
    fps = info["fps"]
    spans: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for row in rows:
        path = info["video_path"].format(
            video_key=camera,
            chunk_index=row[f"videos/{camera}/chunk_index"],
            file_index=row[f"videos/{camera}/file_index"],
        )
        start, stop = row[f"videos/{camera}/from_timestamp"] * fps, row[f"videos/{camera}/to_timestamp"] * fps
        number = row["episode_index"]
        exact = abs(start - round(start)) < 1e-6 and round(stop) - round(start) == row["length"]
        found.check(exact, f"{path}: episode {number} spans {start} to {stop} frames, its length is {row['length']}")
        spans[path].append((round(start), round(stop), number))
    for path, episodes in spans.items():
        if not (root / path).exists():
            found.check(False, f"{path} is missing")
            continue
        indices, keyframes = packet_indices(root / path, fps=fps)
        expected = sum(stop - start for start, stop, _ in episodes)
        found.check(indices == list(range(len(indices))), f"{path} has frames that are not exactly at k/{fps} s")
        found.check(len(indices) == expected, f"{path} has {len(indices)} frames, its episodes {expected}")
        previous = 0
        for start, stop, number in sorted(episodes):
            found.check(start >= previous, f"{path}: episode {number} overlaps the one before")
            found.check(start in keyframes, f"{path}: episode {number} does not begin on a keyframe")
            previous = stop


def _check_digests(root: Path, found: _Findings) -> None:
    """Where the root is a store's own, its catalogue says what every file must be."""
    catalogue = root.parent.parent / "catalogue.sqlite"
    if root.parent.name != "datasets" or not catalogue.exists():
        return
    with contextlib.closing(sqlite3.connect(f"file:{catalogue}?mode=ro", uri=True)) as connection:
        files = connection.execute("SELECT path, sha256 FROM files WHERE dataset = ?", (root.name,)).fetchall()
    for path, sha256 in files:
        if not (root / path).exists():
            found.check(False, f"{path} was published and is gone")
        elif describe_file(root, path).sha256 != sha256:
            if path in REPLACED_FILES:  # Each publishing writes them anew before the catalogue knows.
                found.notes.append(f"{path} is newer than the catalogue: the store is publishing, or was killed doing it")
            else:
                found.check(False, f"{path} is not what was published: its digest differs")


def _cameras(info: Mapping[str, Any]) -> list[str]:
    return [name for name, feature in info["features"].items() if feature["dtype"] == "video"]
