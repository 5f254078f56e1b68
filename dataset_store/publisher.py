"""Numbered episodes to files that readers see. Only new paths, in an order that is safe for a reader at any moment.

A batch is one file of each kind: data, episodes, and one video per camera. Videos come first, then episodes, data, tasks,
statistics and last info.json, whose totals make the batch visible. Killed anywhere, the same batch is written again to the
same names.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manyhands.errors import Corrupt

from .catalogue import Catalogue, CataloguedEpisode, EpisodeState
from .columns import Columns, columns_of, data_schema, from_table, to_table
from .definition import Definition
from .encoder import EncodedEpisode
from .episode_log import count_frames, read_frames
from .layout import (
    CHUNKS_SIZE,
    DATA_PATTERN,
    INFO,
    STATS,
    TASKS,
    VIDEO_PATTERN,
    FileNumber,
    PublishedFile,
    put_file,
)
from .statistics import DatasetStatistics, PictureHistogram, Summary, summarise
from .video import check_video, join_videos, probe

logger = logging.getLogger(__name__)

DATA_FILES_SIZE_IN_MB = 100
VIDEO_FILES_SIZE_IN_MB = 200
_MAX_BATCH_EPISODES = 1000


def next_batch(sealed: Sequence[tuple[CataloguedEpisode, EncodedEpisode]], definition: Definition) -> int:
    """How many of the first episodes make the next batch: as many as fit one file of each kind, at least one."""
    row_bytes = sum(int(np.prod(c.shape)) * np.dtype(c.dtype).itemsize for c in definition.columns)
    data_bytes = 0
    video_bytes = dict.fromkeys((f.name for f in definition.cameras), 0)
    for count, (episode, encoded) in enumerate(sealed):
        data_bytes += row_bytes * episode.frame_count
        for name in video_bytes:
            video_bytes[name] += encoded.size_bytes[name]
        too_large = (
            data_bytes >= DATA_FILES_SIZE_IN_MB * 2**20
            or max(video_bytes.values(), default=0) >= VIDEO_FILES_SIZE_IN_MB * 2**20
        )
        other_encoder = encoded.encoder != sealed[0][1].encoder
        if count and (too_large or other_encoder or count >= _MAX_BATCH_EPISODES):
            return count
    return len(sealed)


class Publisher:
    """Publishes one dataset. One thread at a time.

    Args:
        root: The dataset's published root.
        log_of: Path of an episode's log by uuid.
        encoded_of: Finished videos of an episode; blocks until they are there.
    """

    def __init__(
        self,
        definition: Definition,
        catalogue: Catalogue,
        root: Path,
        *,
        log_of: Callable[[str], Path],
        encoded_of: Callable[[CataloguedEpisode], EncodedEpisode],
    ) -> None:
        self._definition = definition
        self._catalogue = catalogue
        self._root = root
        self._log_of = log_of
        self._encoded_of = encoded_of
        self._statistics: DatasetStatistics | None = None

    def publish(self, ready: Sequence[CataloguedEpisode]) -> int:
        """Numbers and publishes these sealed episodes, after what an earlier attempt left numbered; returns how many.

        Raises OSError where the disk is full: the next call goes on with the same numbers; Corrupt, after everything else is
        published, where an episode's log lost frames.
        """
        name = self._definition.name
        published = 0
        numbered = self._catalogue.in_state(name, EpisodeState.NUMBERED)
        if numbered:
            self._publish_batch([(episode, self._encoded_of(episode)) for episode in numbered])
            published += len(numbered)
        waiting, damaged = self._take_whole(ready)
        while waiting:
            count = next_batch(waiting, self._definition)
            encoded = {episode.uuid: result for episode, result in waiting[:count]}
            batch = self._catalogue.number(name, [episode for episode, _ in waiting[:count]])
            self._publish_batch([(episode, encoded[episode.uuid]) for episode in batch])
            published += count
            waiting = waiting[count:]
        if damaged is not None:
            raise damaged
        return published

    def _take_whole(
        self, ready: Sequence[CataloguedEpisode]
    ) -> tuple[list[tuple[CataloguedEpisode, EncodedEpisode]], Exception | None]:
        """The episodes that can be published, and what is wrong with the first other one: it must not hold up the rest."""
        whole: list[tuple[CataloguedEpisode, EncodedEpisode]] = []
        damaged: Exception | None = None
        for episode in ready:
            if episode.state is not EpisodeState.SEALED:
                continue
            try:
                # Before it gets a number: a numbered episode is published or everything after it waits.
                found = count_frames(self._log_of(episode.uuid))
                if found != episode.frame_count:
                    raise Corrupt(
                        f"the log of episode {episode.uuid} holds {found} whole frames, {episode.frame_count} were sealed; "
                        "its disk lost data",
                        field="episode_uuid",
                    )
                whole.append((episode, self._encoded_of(episode)))
            except Exception as error:
                logger.error("%s: episode %s cannot be published: %s", self._definition.name, episode.uuid, error)
                damaged = damaged or error
        return whole, damaged

    def _publish_batch(self, batch: list[tuple[CataloguedEpisode, EncodedEpisode]]) -> None:
        definition, root = self._definition, self._root
        number = batch[0][0].files
        tasks = self._catalogue.tasks(definition.name)
        statistics = self._statistics or self._load_statistics()
        # Until the batch is through, a failure leaves the totals half merged: load them again then.
        self._statistics = None
        columns = [self._columns(episode, tasks) for episode, _ in batch]
        summaries = [{name: summarise(values) for name, values in episode.items()} for episode in columns]
        files = [self._put_video(number, f.name, [encoded for _, encoded in batch]) for f in definition.cameras]
        rows = self._episode_rows(batch, summaries, number)
        files.append(put_file(root, number.episodes, lambda path: pq.write_table(rows, path)))
        files.append(put_file(root, number.data, lambda path: self._write_data(path, columns)))
        for episode_columns, summary, (_, encoded) in zip(columns, summaries, batch, strict=True):
            statistics.add_rows(episode_columns)
            statistics.add_episode_summary(summary)
            statistics.add_histograms(encoded.histograms)
        files += self._put_meta(batch[-1][0], tasks, statistics)
        histograms = {episode.uuid: _histograms_bytes(encoded.histograms) for episode, encoded in batch}
        self._catalogue.mark_published(definition.name, histograms, files)
        self._statistics = statistics
        for episode, encoded in batch:
            self._log_of(episode.uuid).unlink(missing_ok=True)
            shutil.rmtree(encoded.folder, ignore_errors=True)
        logger.info("%s: published %d episodes as batch %d", definition.name, len(batch), batch[0][0].batch)

    def _columns(self, episode: CataloguedEpisode, tasks: Sequence[str]) -> Columns:
        assert episode.episode_index is not None
        assert episode.first_frame is not None
        return columns_of(
            read_frames(self._log_of(episode.uuid)),
            self._definition,
            episode_index=episode.episode_index,
            first_frame=episode.first_frame,
            task_indices={task: index for index, task in enumerate(tasks)},
        )

    def _put_video(self, number: FileNumber, camera: str, encoded: Sequence[EncodedEpisode]) -> PublishedFile:
        def write(path: Path) -> None:
            fps = self._definition.fps
            join_videos([episode.video(camera) for episode in encoded], path, fps=fps)
            check_video(path, fps=fps, num_frames=sum(episode.frame_count for episode in encoded))

        return put_file(self._root, number.video(camera), write)

    def _write_data(self, path: Path, columns: Sequence[Columns]) -> None:
        with pq.ParquetWriter(path, data_schema(self._definition), compression="snappy") as writer:
            for episode in columns:
                table = to_table(episode, self._definition)
                writer.write_table(table, row_group_size=table.num_rows)

    def _episode_rows(
        self,
        batch: Sequence[tuple[CataloguedEpisode, EncodedEpisode]],
        summaries: Sequence[Mapping[str, Summary]],
        number: FileNumber,
    ) -> pa.Table:
        fps = self._definition.fps
        rows: dict[str, list[Any]] = {}
        batch_frame = 0
        for (episode, encoded), summary in zip(batch, summaries, strict=True):
            assert episode.first_frame is not None
            row: dict[str, Any] = {
                "episode_index": episode.episode_index,
                "tasks": list(episode.tasks),
                "length": episode.frame_count,
                "data/chunk_index": number.chunk_index,
                "data/file_index": number.file_index,
                "dataset_from_index": episode.first_frame,
                "dataset_to_index": episode.first_frame + episode.frame_count,
            }
            for feature in self._definition.cameras:
                row |= {
                    f"videos/{feature.name}/chunk_index": number.chunk_index,
                    f"videos/{feature.name}/file_index": number.file_index,
                    # From whole frames: summing durations drifts.
                    f"videos/{feature.name}/from_timestamp": batch_frame / fps,
                    f"videos/{feature.name}/to_timestamp": (batch_frame + episode.frame_count) / fps,
                }
            pictures = {name: histogram.summary() for name, histogram in encoded.histograms.items()}
            for name, statistics in {**pictures, **summary}.items():
                for key, value in statistics.items():
                    row[f"stats/{name}/{key}"] = value.tolist()
            row |= {
                "x/episode_uuid": episode.uuid,
                "x/content_sha256": episode.sha256.hex(),
                "x/robot_id": episode.robot_id,
                "x/end_reason": episode.reason,
                "x/policy_versions": [f"{v.model}:{v.number}:{v.digest.hex()}" for v in episode.versions],
                "meta/episodes/chunk_index": number.chunk_index,
                "meta/episodes/file_index": number.file_index,
            }
            for key, value in row.items():
                rows.setdefault(key, []).append(value)
            batch_frame += episode.frame_count
        return pa.table({key: pa.array(values, type=_episode_type(key, values)) for key, values in rows.items()})

    def _put_meta(
        self, last: CataloguedEpisode, tasks: Sequence[str], statistics: DatasetStatistics
    ) -> Iterator[PublishedFile]:
        definition, root = self._definition, self._root
        video_info = {
            f.name: probe(root / FileNumber.of_batch(0).video(f.name), definition.video) for f in definition.cameras
        }
        features = definition.features_json(video_info)
        assert last.episode_index is not None
        assert last.first_frame is not None
        info = {
            "codebase_version": "v3.0",
            "robot_type": definition.spec.robot_type or None,
            "total_episodes": last.episode_index + 1,
            "total_frames": last.first_frame + last.frame_count,
            "total_tasks": len(tasks),
            "chunks_size": CHUNKS_SIZE,
            "data_files_size_in_mb": DATA_FILES_SIZE_IN_MB,
            "video_files_size_in_mb": VIDEO_FILES_SIZE_IN_MB,
            "fps": definition.fps,
            "splits": {"train": f"0:{last.episode_index + 1}"},
            "data_path": DATA_PATTERN,
            "video_path": VIDEO_PATTERN if definition.cameras else None,
            "features": features,
            "x_store": store_block(definition),
        }
        stats = statistics.to_json(list(features))
        yield put_file(root, TASKS, lambda path: pq.write_table(tasks_table(tasks), path), replace=True)
        yield put_file(root, STATS, lambda path: _write_json(path, stats), replace=True)
        yield put_file(root, INFO, lambda path: _write_json(path, info), replace=True)

    def _load_statistics(self) -> DatasetStatistics:
        """From what is published; the numbered batch is not among it."""
        statistics = DatasetStatistics()
        name = self._definition.name
        published = self._catalogue.published(name, 0, 2**31)
        columns = [column.name for column in self._definition.columns]
        for batch in sorted({episode.files for episode in published}, key=lambda n: (n.chunk_index, n.file_index)):
            statistics.add_rows(from_table(pq.read_table(self._root / batch.data)))
            rows = pq.read_table(self._root / batch.episodes).to_pylist()
            for row in rows:
                statistics.add_episode_summary(
                    {
                        name: {key: np.array(row[f"stats/{name}/{key}"]) for key in ("min", "max", "mean", "std", "count")}
                        for name in columns
                    }
                )
        for content in self._catalogue.histograms(name):
            statistics.add_histograms(
                {camera: PictureHistogram.from_json(value) for camera, value in json.loads(content).items()}
            )
        return statistics


def store_block(definition: Definition) -> dict[str, Any]:
    """What the format has no place for: units, order of observations, the spec's digest. Other readers pass over it."""
    spec = definition.spec
    return {
        "dataset": definition.name,
        "spec_digest": spec.digest.hex(),
        "observation": [feature.name for feature in spec.observation],
        "action": [feature.name for feature in spec.action],
        "element_units": {feature.name: list(feature.element_units) for feature in spec.observation + spec.action},
    }


def tasks_table(tasks: Sequence[str]) -> pa.Table:
    """With pandas' footer that makes `task` the index: without it readers take row numbers for the tasks."""
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [
            {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
        ],
        "columns": [
            {
                "name": "task_index",
                "field_name": "task_index",
                "pandas_type": "int64",
                "numpy_type": "int64",
                "metadata": None,
            },
            {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object", "metadata": None},
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(list(tasks), pa.string())})
    return table.replace_schema_metadata({b"pandas": json.dumps(pandas).encode()})


def _episode_type(key: str, values: Sequence[Any]) -> pa.DataType:
    if key in ("tasks", "x/policy_versions"):
        return pa.list_(pa.string())
    if key.startswith("stats/"):
        if key.endswith("/count"):
            return pa.list_(pa.int64())
        is_picture = isinstance(values[0][0], list)
        return pa.list_(pa.list_(pa.list_(pa.float64()))) if is_picture else pa.list_(pa.float64())
    if key.endswith("_timestamp"):
        return pa.float64()
    return pa.string() if isinstance(values[0], str) else pa.int64()


def _histograms_bytes(histograms: Mapping[str, PictureHistogram]) -> bytes:
    return json.dumps({name: histogram.to_json() for name, histogram in histograms.items()}).encode()


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False), encoding="utf-8")
