"""One episode in flight: its append log, and what must be known of it when it is sealed. The first record is the Begin."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

from manyhands.common.v1 import common_pb2
from manyhands.dataset.v1 import dataset_pb2
from manyhands.errors import Conflict, Corrupt, InvalidInput, OutOfOrder
from manyhands.framelog import LogWriter, read_log

from .catalogue import SealedEpisode
from .layout import as_overloaded

MAX_TASK_CHARACTERS = 4096
MAX_DISTINCT = 1000


class EpisodeLog:
    """Frames of one episode, in order, exactly once. Any thread may call; the newest owner wins (a recorder reconnected).

    Raises (all methods):
        Overloaded: The disk is full; nothing that was durable is lost, and the same frame may be sent again later.
        Conflict: Another stream took the episode over.
    """

    def __init__(self, path: Path, begin: dataset_pb2.Begin) -> None:
        """Opens or creates the log. Raises InvalidInput where it belongs to another Begin."""
        self.path = path
        self.begin = begin
        self.lock = threading.Lock()
        self.next_sequence = 0
        self._owner: object | None = None
        self._sha256 = hashlib.sha256()
        self._tasks: dict[str, None] = {}
        self._versions: dict[bytes, None] = {}
        try:
            self._writer = LogWriter(path)
            if self._writer.num_records == 0:
                self._writer.append(begin.SerializeToString(deterministic=True))
        except OSError as error:
            raise as_overloaded(error) from error
        try:
            self._read_back()
        except BaseException:
            self._writer.close()
            raise

    def _read_back(self) -> None:
        payloads, _ = read_log(self.path)
        begin = dataset_pb2.Begin.FromString(next(payloads))
        if begin != self.begin:
            raise InvalidInput(
                f"was begun by robot {begin.robot_id!r}; the same uuid now comes from robot {self.begin.robot_id!r} or with "
                "another spec; choose a new uuid",
                field="episode_uuid",
            )
        for payload in payloads:
            self._account(dataset_pb2.Frame.FromString(payload), payload)

    def take_over(self, owner: object) -> int:
        """Makes owner the only one that may append; returns the next sequence it should send. All before that is durable."""
        with self.lock:
            self._owner = owner
            self._sync()
            return self.next_sequence

    def append(self, owner: object, frame: dataset_pb2.Frame) -> bool:
        """Adds a frame that was checked against the spec; durable after sync(). False for one that is here already."""
        with self.lock:
            self._check_owner(owner)
            if frame.sequence < self.next_sequence:
                return False
            self.check_sequence(frame.sequence)
            if len(frame.task) > MAX_TASK_CHARACTERS:
                raise InvalidInput(f"{len(frame.task)} characters are over {MAX_TASK_CHARACTERS}", field="frame.task")
            self._check_distinct(frame)
            payload = frame.SerializeToString(deterministic=True)
            try:
                self._writer.append(payload)
            except OSError as error:
                raise as_overloaded(error) from error
            self._account(frame, payload)
            return True

    def check_sequence(self, sequence: int) -> None:
        if sequence > self.next_sequence:
            raise OutOfOrder(
                f"frame {sequence} came, {self.next_sequence} is next; begin again and go on from the answer",
                field="frame.sequence",
            )

    def sync(self, owner: object) -> int:
        """Returns the sequence up to which all frames are durable, -1 for none."""
        with self.lock:
            self._check_owner(owner)
            durable = self.next_sequence - 1
        # Outside of the lock: several streams' syncs meet in one journal commit of the file system.
        self._sync()
        return durable

    def sealed_as(self, owner: object, end: dataset_pb2.End) -> SealedEpisode:
        """The complete episode, if End agrees with what is here; durable."""
        with self.lock:
            self._check_owner(owner)
            if end.frame_count != self.next_sequence:
                raise OutOfOrder(
                    f"End counts {end.frame_count} frames, {self.next_sequence} are here; send the rest first",
                    field="end.frame_count",
                )
            if not self.next_sequence:
                raise InvalidInput("an episode has at least one frame; discard this one", field="end.frame_count")
            if end.sha256 != self._sha256.digest():
                raise Corrupt(
                    f"the frames here have sha256 {self._sha256.hexdigest()[:16]}, End says {end.sha256.hex()[:16]}; "
                    "discard the episode and send it under a new uuid",
                    field="end.sha256",
                )
            if end.reason not in dataset_pb2.EpisodeEnd.values() or not end.reason:
                raise InvalidInput(f"reason {end.reason} must be one of EpisodeEnd's", field="end.reason")
            self._sync()
            return SealedEpisode(
                uuid=self.begin.episode_uuid,
                frame_count=self.next_sequence,
                sha256=end.sha256,
                reason=end.reason,
                robot_id=self.begin.robot_id,
                tasks=tuple(self._tasks),
                versions=tuple(common_pb2.PolicyVersion.FromString(version) for version in self._versions),
            )

    def check_owner(self, owner: object) -> None:
        with self.lock:
            self._check_owner(owner)

    def close(self) -> None:
        with self.lock:
            self._owner = None
            self._writer.close()

    def _account(self, frame: dataset_pb2.Frame, payload: bytes) -> None:
        self._sha256.update(payload)
        self._tasks[frame.task] = None
        if frame.HasField("version"):
            self._versions[frame.version.SerializeToString(deterministic=True)] = None
        self.next_sequence += 1

    def _check_distinct(self, frame: dataset_pb2.Frame) -> None:
        if len(self._tasks) >= MAX_DISTINCT and frame.task not in self._tasks:
            raise InvalidInput(f"over {MAX_DISTINCT} different tasks in one episode", field="frame.task")
        version = frame.version.SerializeToString(deterministic=True)
        if len(self._versions) >= MAX_DISTINCT and version not in self._versions:
            raise InvalidInput(f"over {MAX_DISTINCT} different policy versions in one episode", field="frame.version")

    def _sync(self) -> None:
        try:
            self._writer.sync()
        except OSError as error:
            raise as_overloaded(error) from error

    def _check_owner(self, owner: object) -> None:
        if owner is not self._owner:
            raise Conflict("another stream has begun this episode again; this one is over", field="episode_uuid")


def read_begin(log: Path) -> dataset_pb2.Begin | None:
    """Of a log on disk; None where not even that was written whole."""
    payloads, _ = read_log(log)
    first = next(payloads, None)
    return None if first is None else dataset_pb2.Begin.FromString(first)


def count_frames(log: Path) -> int:
    """Whole frames in a log on disk."""
    payloads, _ = read_log(log)
    return max(0, sum(1 for _ in payloads) - 1)


def read_frames(log: Path) -> Iterator[dataset_pb2.Frame]:
    """In order of sequence, 0, 1, 2, ..."""
    payloads, _ = read_log(log)
    next(payloads, None)
    for payload in payloads:
        yield dataset_pb2.Frame.FromString(payload)
