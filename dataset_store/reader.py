"""A published root as arrays: numeric columns in numpy, pictures by bounded, cached decoders.

Opens what this store published and other LeRobotDataset v3.0 roots with video cameras. Safe while the store goes on
publishing: the totals of info.json, read first, bound everything else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from manyhands.errors import Corrupt, InvalidInput, NotFound
from manyhands.spec import Feature, FeatureKind, Spec

from . import language
from .columns import Columns, from_table
from .language import LanguageRows
from .layout import INFO, STATS, TASKS
from .video import Pixels, ReaderCache

SUPPORTED_VERSION = "v3.0"


@dataclass(frozen=True, kw_only=True)
class VideoPlace:
    """Where an episode's frames are: path below the root, and the number of its first frame in that file."""

    path: str
    first_frame: int


@dataclass(frozen=True, kw_only=True)
class EpisodeRow:
    """One published episode.

    Attributes:
        from_index, to_index: Half-open range of its rows in the columns.
        videos: By camera.
        content_key: Changes whenever the content does; names derived views.
    """

    index: int
    from_index: int
    to_index: int
    tasks: tuple[str, ...]
    videos: Mapping[str, VideoPlace]
    uuid: str
    robot_id: str
    content_key: str

    @property
    def num_frames(self) -> int:
        return self.to_index - self.from_index


class DatasetReader:
    """One published root at one moment. Any thread may read; each has its own decoders.

    Attributes:
        num_frames, num_episodes: As info.json said at opening.
        features: info.json's, by name.
        spec: Ordered features of observation and action, and the rate.
        episodes: In index order.
        columns: (num_frames, n) or (num_frames,) arrays by column name; language is not among them.
        has_language: It has language columns; see language_of().
        tasks: Row r is task_index r.

    Raises:
        NotFound: There is no published dataset below root.
        Corrupt: Its files contradict each other; the message says which and how.
        InvalidInput: A format version or column type that is not supported.
    """

    def __init__(self, root: Path, *, max_open_videos: int = 16) -> None:
        self.root = Path(root)
        self.info = _read_info(self.root)
        self.fps = int(self.info["fps"])
        self.num_frames = int(self.info["total_frames"])
        self.num_episodes = int(self.info["total_episodes"])
        self.features: dict[str, dict[str, Any]] = self.info["features"]
        self.cameras = tuple(name for name, feature in self.features.items() if feature["dtype"] == "video")
        self.has_language = language.has_language(self.features)
        self.spec = _spec(self.info, self.root)
        self.episodes = self._read_episodes()
        self.columns = self._read_columns()
        self.tasks = _read_tasks(self.root)
        self._videos = ReaderCache(fps=self.fps, max_open=max_open_videos)

    @cached_property
    def digest(self) -> bytes:
        """Over what was recorded of all episodes; language, which is written later, is not part of it."""
        lines = [json.dumps(self.features, sort_keys=True), *(episode.content_key for episode in self.episodes)]
        return hashlib.sha256("\n".join(lines).encode()).digest()

    @cached_property
    def statistics(self) -> dict[str, dict[str, npt.NDArray[np.float64]]]:
        """{feature: {min, max, mean, std, count, q01, q10, q50, q90, q99}}; vectors (n,), cameras (3, 1, 1) in [0, 1]."""
        content = json.loads((self.root / STATS).read_text(encoding="utf-8"))
        return {name: {key: np.asarray(v, np.float64) for key, v in entry.items()} for name, entry in content.items()}

    @cached_property
    def episode_starts(self) -> npt.NDArray[np.int64]:
        """(num_episodes + 1,): the first index of each episode, and num_frames."""
        return np.array([*(episode.from_index for episode in self.episodes), self.num_frames], np.int64)

    def episode_of(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Episode numbers of frame indices 0 .. num_frames - 1."""
        return np.searchsorted(self.episode_starts, indices, side="right") - 1

    def pictures(self, camera: str, episode: int, frames: Sequence[int] | None = None) -> Iterator[Pixels]:
        """(height, width, 3) uint8 RGB of ascending frame numbers of one episode, all of them by default.

        Decodes forward without seeking, so a whole episode costs one pass.
        """
        if camera not in self.cameras:
            raise InvalidInput(
                f"{camera!r} is no camera of this dataset; it has {', '.join(self.cameras) or 'none'}", field=camera
            )
        row = self.episodes[episode]
        place = row.videos[camera]
        wanted = range(row.num_frames) if frames is None else frames
        if wanted and not 0 <= min(wanted) <= max(wanted) < row.num_frames:
            raise InvalidInput(f"frames must be 0 to {row.num_frames - 1} in episode {episode}", field="frames")
        reader = self._videos.get(self.root / place.path)
        for _, pixels in reader.read([place.first_frame + frame for frame in wanted]):
            yield pixels

    def language_of(self, index: int) -> dict[str, list[language.Row]] | None:
        """{"persistent": rows of its episode, "events": its own} of frame index; None where the dataset has no language.

        The lists are shared between frames: not to be changed.
        """
        return self._language.of_frame(index) if self.has_language else None

    def event_frames(self) -> npt.NDArray[np.int64]:
        """Indices of the frames that have language events, ascending; reads that whole column."""
        return self._language.event_frames() if self.has_language else np.zeros(0, np.int64)

    @cached_property
    def _language(self) -> LanguageRows:
        return LanguageRows(self._data_files(), self.episode_starts)

    def _read_episodes(self) -> list[EpisodeRow]:
        rows: list[dict[str, Any]] = []
        for path in sorted((self.root / "meta" / "episodes").glob("*/*.parquet")):
            if len(rows) >= self.num_episodes:
                break
            names = [name for name in pq.read_schema(path).names if not name.startswith("stats/")]
            rows += pq.read_table(path, columns=names).to_pylist()
        if len(rows) < self.num_episodes:
            raise Corrupt(
                f"meta/episodes has {len(rows)} rows, info.json counts {self.num_episodes}; run 'manyhands dataset verify'"
            )
        return [self._episode(number, row) for number, row in enumerate(rows[: self.num_episodes])]

    def _episode(self, number: int, row: Mapping[str, Any]) -> EpisodeRow:
        if row["episode_index"] != number:
            raise Corrupt(f"row {number} of meta/episodes is episode {row['episode_index']}; rows must be in order")
        videos = {}
        for camera in self.cameras:
            path = self.info["video_path"].format(
                video_key=camera,
                chunk_index=row[f"videos/{camera}/chunk_index"],
                file_index=row[f"videos/{camera}/file_index"],
            )
            videos[camera] = VideoPlace(path=path, first_frame=round(row[f"videos/{camera}/from_timestamp"] * self.fps))
        key = row.get("x/content_sha256") or f"{number}:{row['dataset_from_index']}:{sorted(videos.items())}"
        return EpisodeRow(
            index=number,
            from_index=row["dataset_from_index"],
            to_index=row["dataset_to_index"],
            tasks=tuple(row["tasks"]),
            videos=videos,
            uuid=row.get("x/episode_uuid", ""),
            robot_id=row.get("x/robot_id", ""),
            content_key=hashlib.sha256(key.encode()).hexdigest(),
        )

    def _read_columns(self) -> Columns:
        aside = ("video", language.LANGUAGE_DTYPE)
        names = [name for name, feature in self.features.items() if feature["dtype"] not in aside]
        tables: list[pa.Table] = []
        num_rows = 0
        for path in self._data_files():
            if num_rows >= self.num_frames:
                break
            tables.append(pq.read_table(path, columns=names))
            num_rows += tables[-1].num_rows
        if num_rows < self.num_frames:
            raise Corrupt(f"data has {num_rows} rows, info.json counts {self.num_frames}; run 'manyhands dataset verify'")
        columns = from_table(pa.concat_tables(tables).slice(0, self.num_frames))
        if not np.array_equal(columns["index"], np.arange(self.num_frames)):
            raise Corrupt("column index is not 0, 1, 2, ...: a file is missing, misplaced or not of this dataset")
        return columns

    def _data_files(self) -> list[Path]:
        return sorted((self.root / "data").glob("*/*.parquet"))


def _read_info(root: Path) -> dict[str, Any]:
    try:
        info: dict[str, Any] = json.loads((root / INFO).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"there is no published dataset in {root}: it has no {INFO}", field="root") from None
    except ValueError as error:
        raise Corrupt(f"{INFO} is no JSON: {error}") from None
    version = info.get("codebase_version")
    if version != SUPPORTED_VERSION:
        raise InvalidInput(
            f"format version {version!r} is not supported, only {SUPPORTED_VERSION!r}", field="codebase_version"
        )
    return info


def _read_tasks(root: Path) -> list[str]:
    table = pq.read_table(root / TASKS)
    name = "task" if "task" in table.column_names else "__index_level_0__"
    if name not in table.column_names:
        raise Corrupt(f"{TASKS} has no column task, only {', '.join(table.column_names)}")
    if table["task_index"].to_pylist() != list(range(table.num_rows)):
        raise Corrupt(f"{TASKS} is not in the order of task_index")
    return [str(task) for task in table[name].to_pylist()]


def _spec(info: Mapping[str, Any], root: Path) -> Spec:
    features = info["features"]
    block = info.get("x_store", {})
    units = block.get("element_units", {})
    observation = block.get("observation") or [name for name in features if name.startswith("observation")]
    action = block.get("action") or [name for name in features if name == "action" or name.startswith("action.")]

    def feature(name: str, kind: FeatureKind) -> Feature:
        entry = features[name]
        if entry["dtype"] == "video":
            return Feature(name=name, kind=FeatureKind.IMAGE, dtype="uint8", shape=tuple(entry["shape"]))
        names = entry.get("names")
        return Feature(
            name=name,
            kind=kind,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            element_names=tuple(names) if isinstance(names, list) and len(names) == entry["shape"][0] else (),
            element_units=tuple(units.get(name, ())),
        )

    missing = [name for name in (*observation, *action) if name not in features]
    if missing:
        raise Corrupt(
            f"{INFO} in {root} lists {missing[0]!r} as part of the spec and not among the features", field=missing[0]
        )
    return Spec(
        observation=tuple(feature(name, FeatureKind.STATE) for name in observation),
        action=tuple(feature(name, FeatureKind.ACTION) for name in action),
        control_rate_hz=float(info["fps"]),
        robot_type=info.get("robot_type") or "",
    )
