"""Names of published files and the only way a file gets one: written aside, made durable, renamed (FORMAT.md)."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from manyhands.errors import InvalidInput, Overloaded, Refused
from manyhands.framelog import fsync_directory

INFO = "meta/info.json"
STATS = "meta/stats.json"
TASKS = "meta/tasks.parquet"
# Replaced by every publishing; all other published files never change.
REPLACED_FILES = (TASKS, STATS, INFO)

DATA_PATTERN = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
EPISODES_PATTERN = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATTERN = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
CHUNKS_SIZE = 1000
# Readers sort paths as text: chunk-1000 would come before chunk-999.
MAX_BATCHES = 1000 * CHUNKS_SIZE

_DATASET_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\Z")
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\Z")


@dataclass(frozen=True, kw_only=True)
class FileNumber:
    """One batch of episodes is one file of each kind, all with the same number."""

    chunk_index: int
    file_index: int

    @classmethod
    def of_batch(cls, batch: int) -> FileNumber:
        if not 0 <= batch < MAX_BATCHES:
            raise Refused(
                f"batch {batch} is over the format's {MAX_BATCHES} files; merge the dataset into a new one", field="dataset"
            )
        return cls(chunk_index=batch // CHUNKS_SIZE, file_index=batch % CHUNKS_SIZE)

    @property
    def data(self) -> str:
        return DATA_PATTERN.format(chunk_index=self.chunk_index, file_index=self.file_index)

    @property
    def episodes(self) -> str:
        return EPISODES_PATTERN.format(chunk_index=self.chunk_index, file_index=self.file_index)

    def video(self, key: str) -> str:
        return VIDEO_PATTERN.format(video_key=key, chunk_index=self.chunk_index, file_index=self.file_index)


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """path is relative to the dataset's root."""

    path: str
    size_bytes: int
    sha256: bytes


def check_dataset_name(name: str) -> str:
    """Names are folders too: nothing but this pattern gets near a path."""
    if not _DATASET_NAME.match(name):
        raise InvalidInput(f"dataset name {name!r} must match [a-z0-9][a-z0-9_-]{{0,63}}", field="dataset")
    return name


def check_episode_uuid(episode_uuid: str) -> str:
    if not _UUID.match(episode_uuid):
        raise InvalidInput(f"episode_uuid {episode_uuid!r} must be an RFC 4122 uuid in lower case", field="episode_uuid")
    return episode_uuid


def make_directory(path: Path) -> None:
    """mkdir -p whose names survive a power loss."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        fsync_directory(directory.parent)


def put_file(root: Path, path: str, write: Callable[[Path], None], *, replace: bool = False) -> PublishedFile:
    """Gives `path` its content, all or nothing.

    write fills the temporary file that it is handed. Without replace, a file that is there already is left as it is: it got
    its name only after it was whole, and a reader may hold it.
    """
    final = root / path
    if replace or not final.exists():
        make_directory(final.parent)
        temporary = final.with_name(final.name + ".tmp")
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.rename(final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_directory(final.parent)
    return describe_file(root, path)


def describe_file(root: Path, path: str) -> PublishedFile:
    with (root / path).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").digest()
        return PublishedFile(path=path, size_bytes=os.fstat(file.fileno()).st_size, sha256=sha256)


def snapshot_digest(files: list[PublishedFile]) -> bytes:
    """Over the sorted list of files: equal digests are equal datasets."""
    lines = sorted(f"{file.path}\0{file.size_bytes}\0{file.sha256.hex()}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).digest()


def as_overloaded(error: OSError) -> Exception:
    """What a failed write means to who asked for it: a full disk is a state that passes, anything else is not."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Overloaded(
            f"the store's disk is full ({error.strerror}); nothing acknowledged is lost, go on when there is space",
            retry_after_s=5.0,
        )
    return error
