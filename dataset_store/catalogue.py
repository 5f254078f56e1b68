"""Which episodes are safe, which have their number, and what is published: one SQLite file, every change one transaction.

An episode is in flight while only its log exists, then SEALED (a row here), NUMBERED (its index and files are decided) and
PUBLISHED (readers see it). It never goes back.
"""

from __future__ import annotations

import contextlib
import enum
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyhands.common.v1 import common_pb2
from manyhands.dataset.v1 import dataset_pb2
from manyhands.errors import AlreadyExists, NotFound, Overloaded

from .definition import Definition, first_difference
from .layout import FileNumber, PublishedFile

_SCHEMA = """
CREATE TABLE IF NOT EXISTS datasets (name TEXT PRIMARY KEY, definition BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS episodes (
  seal_order INTEGER PRIMARY KEY AUTOINCREMENT,
  dataset TEXT NOT NULL, uuid TEXT NOT NULL, state INTEGER NOT NULL,
  frame_count INTEGER NOT NULL, sha256 BLOB NOT NULL, reason INTEGER NOT NULL, robot_id TEXT NOT NULL,
  tasks TEXT NOT NULL, versions TEXT NOT NULL,
  batch INTEGER, episode_index INTEGER, first_frame INTEGER, histograms BLOB,
  UNIQUE (dataset, uuid), UNIQUE (dataset, episode_index));
CREATE INDEX IF NOT EXISTS episodes_by_state ON episodes (dataset, state);
CREATE INDEX IF NOT EXISTS episodes_by_batch ON episodes (dataset, batch);
CREATE TABLE IF NOT EXISTS tasks (
  dataset TEXT NOT NULL, task_index INTEGER NOT NULL, task TEXT NOT NULL,
  PRIMARY KEY (dataset, task_index), UNIQUE (dataset, task));
CREATE TABLE IF NOT EXISTS files (
  dataset TEXT NOT NULL, path TEXT NOT NULL, size_bytes INTEGER NOT NULL, sha256 BLOB NOT NULL, PRIMARY KEY (dataset, path));
"""
_COLUMNS = (
    "seal_order, uuid, state, frame_count, sha256, reason, robot_id, tasks, versions, batch, episode_index, first_frame"
)


class EpisodeState(enum.IntEnum):
    SEALED = 1
    NUMBERED = 2
    PUBLISHED = 3


@dataclass(frozen=True, kw_only=True)
class SealedEpisode:
    """What is known of an episode once its frames are complete.

    Attributes:
        uuid: Chosen by the recorder.
        frame_count: At least 1.
        sha256: Over the serialised frames.
        reason: dataset_pb2.EpisodeEnd.
        tasks: Distinct instructions, in order of first use.
        versions: Distinct policy versions, in order of first use.
    """

    uuid: str
    frame_count: int
    sha256: bytes
    reason: int
    robot_id: str
    tasks: tuple[str, ...]
    versions: tuple[common_pb2.PolicyVersion, ...]


@dataclass(frozen=True, kw_only=True)
class CataloguedEpisode(SealedEpisode):
    """A sealed episode's place; batch, episode_index and first_frame (its first `index`) are None until it is numbered."""

    seal_order: int
    state: EpisodeState
    batch: int | None
    episode_index: int | None
    first_frame: int | None

    @property
    def files(self) -> FileNumber:
        assert self.batch is not None
        return FileNumber.of_batch(self.batch)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Published episodes and frames, episodes sealed and not yet published, bytes of the published files."""

    episodes: int
    frames: int
    sealed: int
    size_bytes: int


class Catalogue:
    """Any thread may call; each method is one transaction, durable when it returns.

    Raises:
        Overloaded: From any change, when the disk is full; nothing has changed then.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode=WAL")
        # FULL: a commit is on disk when it returns, also through a power loss.
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.executescript(_SCHEMA)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def create_dataset(self, definition: Definition) -> None:
        with self._change() as connection:
            row = connection.execute("SELECT definition FROM datasets WHERE name = ?", (definition.name,)).fetchone()
            if row is None:
                content = definition.to_proto().SerializeToString(deterministic=True)
                connection.execute("INSERT INTO datasets VALUES (?, ?)", (definition.name, content))
                return
        difference = first_difference(_definition(row[0]), definition)
        if difference:
            raise AlreadyExists(
                f"dataset {definition.name!r} is there with another definition: {difference}", field="dataset"
            )

    def datasets(self) -> list[Definition]:
        return [_definition(row[0]) for row in self._read("SELECT definition FROM datasets ORDER BY name")]

    def definition(self, dataset: str) -> Definition:
        rows = self._read("SELECT definition FROM datasets WHERE name = ?", dataset)
        if not rows:
            raise NotFound(f"there is no dataset {dataset!r}; CreateDataset makes one", field="dataset")
        return _definition(rows[0][0])

    def seal(self, dataset: str, episode: SealedEpisode) -> None:
        """From here on the episode cannot be lost. Sealing it again changes nothing."""
        with self._change() as connection:
            connection.execute(
                "INSERT INTO episodes (dataset, uuid, state, frame_count, sha256, reason, robot_id, tasks, versions) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (dataset, uuid) DO NOTHING",
                (
                    dataset,
                    episode.uuid,
                    EpisodeState.SEALED,
                    episode.frame_count,
                    episode.sha256,
                    episode.reason,
                    episode.robot_id,
                    json.dumps(episode.tasks),
                    json.dumps([version.SerializeToString(deterministic=True).hex() for version in episode.versions]),
                ),
            )

    def find(self, dataset: str, uuid: str) -> CataloguedEpisode | None:
        rows = self._read(f"SELECT {_COLUMNS} FROM episodes WHERE dataset = ? AND uuid = ?", dataset, uuid)
        return _episode(rows[0]) if rows else None

    def in_state(self, dataset: str, state: EpisodeState) -> list[CataloguedEpisode]:
        """In the order of sealing, which is that of numbering too."""
        rows = self._read(
            f"SELECT {_COLUMNS} FROM episodes WHERE dataset = ? AND state = ? ORDER BY seal_order",
            dataset,
            state,
        )
        return sorted((_episode(row) for row in rows), key=lambda e: (e.episode_index or 0, e.seal_order))

    def published(self, dataset: str, from_index: int, count: int) -> list[CataloguedEpisode]:
        rows = self._read(
            f"SELECT {_COLUMNS} FROM episodes WHERE dataset = ? AND state = ? AND episode_index >= ? "
            "ORDER BY episode_index LIMIT ?",
            dataset,
            EpisodeState.PUBLISHED,
            from_index,
            count,
        )
        return [_episode(row) for row in rows]

    def number(self, dataset: str, episodes: Sequence[CataloguedEpisode]) -> list[CataloguedEpisode]:
        """Decides indices, files and tasks of the next batch: whatever happens now, this batch gets exactly these."""
        with self._change() as connection:
            next_index, next_frame, batch = connection.execute(
                "SELECT COALESCE(MAX(episode_index), -1) + 1, COALESCE(MAX(first_frame + frame_count), 0), "
                "COALESCE(MAX(batch), -1) + 1 FROM episodes WHERE dataset = ?",
                (dataset,),
            ).fetchone()
            FileNumber.of_batch(batch)
            known = {row[0] for row in connection.execute("SELECT task FROM tasks WHERE dataset = ?", (dataset,))}
            for episode in episodes:
                connection.execute(
                    "UPDATE episodes SET state = ?, batch = ?, episode_index = ?, first_frame = ? WHERE seal_order = ?",
                    (EpisodeState.NUMBERED, batch, next_index, next_frame, episode.seal_order),
                )
                next_index += 1
                next_frame += episode.frame_count
                for task in episode.tasks:
                    if task not in known:
                        connection.execute("INSERT INTO tasks VALUES (?, ?, ?)", (dataset, len(known), task))
                        known.add(task)
        return self.in_state(dataset, EpisodeState.NUMBERED)

    def mark_published(self, dataset: str, histograms: dict[str, bytes], files: Sequence[PublishedFile]) -> None:
        """Closes the numbered batch. histograms: by uuid."""
        with self._change() as connection:
            for uuid, content in histograms.items():
                connection.execute(
                    "UPDATE episodes SET state = ?, histograms = ? WHERE dataset = ? AND uuid = ?",
                    (EpisodeState.PUBLISHED, content, dataset, uuid),
                )
            connection.executemany(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)",
                [(dataset, file.path, file.size_bytes, file.sha256) for file in files],
            )

    def histograms(self, dataset: str) -> list[bytes]:
        return [
            row[0]
            for row in self._read(
                "SELECT histograms FROM episodes WHERE dataset = ? AND state = ?", dataset, EpisodeState.PUBLISHED
            )
        ]

    def tasks(self, dataset: str) -> list[str]:
        """Row r is task_index r."""
        return [row[0] for row in self._read("SELECT task FROM tasks WHERE dataset = ? ORDER BY task_index", dataset)]

    def files(self, dataset: str) -> list[PublishedFile]:
        rows = self._read("SELECT path, size_bytes, sha256 FROM files WHERE dataset = ? ORDER BY path", dataset)
        return [PublishedFile(path=path, size_bytes=size, sha256=sha256) for path, size, sha256 in rows]

    def has_file(self, dataset: str, path: str) -> bool:
        return bool(self._read("SELECT 1 FROM files WHERE dataset = ? AND path = ?", dataset, path))

    def snapshot(self, dataset: str) -> tuple[list[PublishedFile], Counts]:
        """Files and counts of one moment."""
        with self._lock:
            return self.files(dataset), self.counts(dataset)

    def first_frame_of_batch(self, dataset: str, episode: CataloguedEpisode) -> int:
        rows = self._read("SELECT MIN(first_frame) FROM episodes WHERE dataset = ? AND batch = ?", dataset, episode.batch)
        return int(rows[0][0])

    def counts(self, dataset: str) -> Counts:
        episodes, frames, sealed = self._read(
            "SELECT COALESCE(SUM(state = 3), 0), COALESCE(SUM((state = 3) * frame_count), 0), COALESCE(SUM(state < 3), 0) "
            "FROM episodes WHERE dataset = ?",
            dataset,
        )[0]
        size = self._read("SELECT COALESCE(SUM(size_bytes), 0) FROM files WHERE dataset = ?", dataset)[0][0]
        return Counts(episodes=episodes, frames=frames, sealed=sealed, size_bytes=size)

    def _read(self, query: str, *arguments: object) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._connection.execute(query, arguments).fetchall()

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException as error:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError) and _is_out_of_space(error):
                    raise Overloaded(
                        f"the store cannot write its catalogue ({error}); free space on its disk", retry_after_s=5.0
                    ) from None
                raise


def _is_out_of_space(error: sqlite3.OperationalError) -> bool:
    return error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


def _definition(content: bytes) -> Definition:
    return Definition.from_proto(dataset_pb2.DatasetDefinition.FromString(content))


def _episode(row: Sequence[Any]) -> CataloguedEpisode:
    seal_order, uuid, state, count, sha256, reason, robot_id, tasks, versions, batch, index, first_frame = row
    return CataloguedEpisode(
        seal_order=seal_order,
        uuid=uuid,
        state=EpisodeState(state),
        frame_count=count,
        sha256=sha256,
        reason=reason,
        robot_id=robot_id,
        tasks=tuple(json.loads(tasks)),
        versions=tuple(common_pb2.PolicyVersion.FromString(bytes.fromhex(version)) for version in json.loads(versions)),
        batch=batch,
        episode_index=index,
        first_frame=first_frame,
    )
