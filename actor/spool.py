"""Episodes on disk until the store has sealed them. The spool is what makes recording survive any crash and any absence.

One append log per episode, `<number>-<episode uuid>.log`: a first record with what Begin needs, then the very messages that
go to the store (AppendEpisodeRequest: frames, then end or discard). Numbers give the order; a log is deleted when the
store answered Sealed or Discarded, and kept under refused/ when the store says that it can never take it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from manyhands import errors, framelog
from manyhands.dataset.v1 import dataset_pb2

logger = logging.getLogger(__name__)

# Kept free on the disk besides the limit: a robot PC with a full root file system does not come up again.
MIN_FREE_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class EpisodeMeta:
    """First record of a log.

    Attributes:
        spec_digest: Hex.
        discard_incomplete: An episode that a crash cut short is discarded, not kept as interrupted.
    """

    dataset: str
    episode_uuid: str
    robot_id: str
    spec_digest: str
    discard_incomplete: bool

    def begin(self) -> dataset_pb2.AppendEpisodeRequest:
        return dataset_pb2.AppendEpisodeRequest(
            begin=dataset_pb2.Begin(
                dataset=self.dataset,
                episode_uuid=self.episode_uuid,
                robot_id=self.robot_id,
                spec_digest=bytes.fromhex(self.spec_digest),
            )
        )


class EpisodeLog:
    """One spooled episode: a writer appends, an uploader reads behind it. Thread-safe for one of each.

    Attributes:
        meta: What Begin says.
        frame_count: Whole frames in the log.
        ended: End or Discard is in the log: nothing more will come.
        acked_count: Frames that the store has on disk.
    """

    def __init__(self, path: Path, meta: EpisodeMeta | None = None) -> None:
        """Opens path for writing; a new log when meta is given. Raises Corrupt when an old one has no readable meta."""
        self.path = path
        self.frame_count = 0
        self.acked_count = 0
        self.ended = False
        self._hash = hashlib.sha256()
        self._records: list[tuple[int, int]] = []  # (offset of the payload, length) of each message, frames first.
        self._changed = threading.Condition()
        self._writer = framelog.LogWriter(path)
        self._reader: BinaryIO = path.open("rb")
        try:
            self.meta = self._create(meta) if meta is not None else self._load()
        except BaseException:
            self.close()
            raise

    @property
    def size_bytes(self) -> int:
        return self._writer.size_bytes

    @property
    def record_count(self) -> int:
        return len(self._records)

    def append_frame(self, frame: dataset_pb2.Frame) -> int:
        """Adds the next frame, whose sequence is set here; returns its size in bytes. Raises OSError: nothing was added."""
        frame.sequence = self.frame_count
        body = frame.SerializeToString(deterministic=True)
        size = self._append(dataset_pb2.AppendEpisodeRequest(frame=frame))
        self._hash.update(body)
        with self._changed:
            self.frame_count += 1
            self._changed.notify_all()
        return size

    def end(self, reason: dataset_pb2.EpisodeEnd.ValueType) -> None:
        """Ends the episode, durably. Without frames there is nothing to keep, and it is discarded."""
        if self.frame_count == 0:
            self.discard("no frames")
            return
        end = dataset_pb2.End(frame_count=self.frame_count, sha256=self._hash.digest(), reason=reason)
        self._finish(dataset_pb2.AppendEpisodeRequest(end=end))

    def discard(self, reason: str) -> None:
        self._finish(dataset_pb2.AppendEpisodeRequest(discard=dataset_pb2.Discard(reason=reason)))

    def sync(self) -> None:
        self._writer.sync()

    def read(self, index: int) -> bytes:
        """Serialised AppendEpisodeRequest: frame index, or the end where index is frame_count."""
        offset, length = self._records[index]
        return os.pread(self._reader.fileno(), length, offset)

    def wait_for_record(self, index: int, timeout_s: float) -> bool:
        """Whether record index is in the log, waiting for it at most timeout_s."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._records) > index, timeout=timeout_s)

    def close(self) -> None:
        self._writer.close()
        self._reader.close()

    def _create(self, meta: EpisodeMeta) -> EpisodeMeta:
        self._writer.append(json.dumps(asdict(meta)).encode())
        return meta

    def _load(self) -> EpisodeMeta:
        payloads, _ = framelog.read_log(self.path)
        offset = 0
        meta: EpisodeMeta | None = None
        for payload in payloads:
            offset += framelog.HEADER_BYTES
            if meta is None:
                try:
                    meta = EpisodeMeta(**json.loads(payload))
                except (ValueError, TypeError) as error:
                    raise errors.Corrupt(f"{self.path.name} does not begin with an episode's meta: {error}") from None
            else:
                self._records.append((offset, len(payload)))
                message = dataset_pb2.AppendEpisodeRequest.FromString(payload)
                if message.WhichOneof("part") == "frame":
                    self._hash.update(message.frame.SerializeToString(deterministic=True))
                    self.frame_count += 1
                else:
                    self.ended = True
            offset += len(payload)
        if meta is None:
            raise errors.Corrupt(f"{self.path.name} is empty")
        return meta

    def _append(self, message: dataset_pb2.AppendEpisodeRequest) -> int:
        payload = message.SerializeToString(deterministic=True)
        offset = self._writer.size_bytes + framelog.HEADER_BYTES
        self._writer.append(payload)
        with self._changed:
            self._records.append((offset, len(payload)))
            self._changed.notify_all()
        return len(payload)

    def _finish(self, message: dataset_pb2.AppendEpisodeRequest) -> None:
        self._append(message)
        self._writer.sync()
        with self._changed:
            self.ended = True
            self._changed.notify_all()


class Spool:
    """The folder of one actor.

    Args:
        root: Made when missing. One process at a time: a second one is Refused.
        limit_bytes: Of all logs together; a frame over it is refused, nothing recorded is ever dropped.
        min_free_bytes: Left free on the disk.
    """

    def __init__(self, root: Path, *, limit_bytes: int, min_free_bytes: int = MIN_FREE_BYTES) -> None:
        self.root = root
        self.refused = root / "refused"
        self.refused.mkdir(parents=True, exist_ok=True)
        self._limit_bytes = limit_bytes
        self._min_free_bytes = min_free_bytes
        self._lock_file = (root / "lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.close()
            raise errors.Refused(
                f"spool {root} belongs to an actor that runs; give each actor a folder of its own", field="spool"
            ) from None
        self._changed = threading.Condition()
        self._logs: dict[str, EpisodeLog] = {}
        self._next_number = 1

    def recover(self, decided: Mapping[str, dataset_pb2.EpisodeEnd.ValueType] | None = None) -> list[EpisodeLog]:
        """Takes over what an earlier process left, and ends what it could not end.

        Args:
            decided: Ends, by episode uuid, that were decided after the last frame was written but may not be in the log.

        Returns:
            The episodes that were incomplete: now ended as decided, discarded, or interrupted with the frames that are
            whole.
        """
        mended = []
        for path in sorted(self.root.glob("*.log")):
            self._next_number = max(self._next_number, int(path.name.partition("-")[0]) + 1)
            try:
                log = EpisodeLog(path)
            except errors.Corrupt as error:
                if path.stat().st_size == 0:  # Cut back to its whole records: a crash before the first one.
                    path.unlink()
                else:
                    logger.error("%s; it is kept in %s", error, self.refused)
                    path.rename(self.refused / path.name)
                continue
            uuid = log.meta.episode_uuid
            if not log.ended:
                if decided and uuid in decided:
                    log.end(decided[uuid])
                elif log.meta.discard_incomplete:
                    log.discard("the recorder ended before the episode was a success")
                else:
                    log.end(dataset_pb2.EPISODE_END_INTERRUPTED)
                mended.append(log)
                logger.info("episode %s was cut short; %d whole frames", uuid, log.frame_count)
            self._logs[uuid] = log
        return mended

    def begin(self, meta: EpisodeMeta) -> EpisodeLog:
        """A new log. Raises Overloaded when there is no room for one, before anything moves."""
        self.check_room(0)
        path = self.root / f"{self._next_number:08d}-{meta.episode_uuid}.log"
        log = EpisodeLog(path, meta)
        with self._changed:
            self._next_number += 1
            self._logs[meta.episode_uuid] = log
            self._changed.notify_all()
        return log

    def check_room(self, num_bytes: int) -> None:
        """Raises Overloaded unless num_bytes more fit under the limit and on the disk."""
        used = self.size_bytes
        if used + num_bytes > self._limit_bytes:
            raise errors.Overloaded(
                f"the spool holds {used / 1e9:.2f} GB that the store has not taken, limit {self._limit_bytes / 1e9:.2f} GB; "
                "bring the store back or raise --spool-limit-gb",
                field="spool_limit_gb",
            )
        free = shutil.disk_usage(self.root).free
        if free - num_bytes < self._min_free_bytes:
            raise errors.Overloaded(
                f"the disk of {self.root} has {free / 1e9:.2f} GB free, {self._min_free_bytes / 1e9:.2f} GB must stay so; "
                "free some space or move --spool",
                field="spool",
            )

    @property
    def size_bytes(self) -> int:
        with self._changed:
            return sum(log.size_bytes for log in self._logs.values())

    @property
    def unacked_frame_count(self) -> int:
        """Frames recorded and not yet acknowledged by the store."""
        with self._changed:
            return sum(log.frame_count - log.acked_count for log in self._logs.values())

    def oldest(self, timeout_s: float) -> EpisodeLog | None:
        """The first episode that is still here, waiting at most timeout_s for one."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._logs), timeout=timeout_s)
            return next(iter(self._logs.values()), None)

    def wait_until_empty(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._logs, timeout=timeout_s)

    def remove(self, log: EpisodeLog) -> None:
        """The store has it."""
        log.path.unlink()
        self._forget(log)

    def refuse(self, log: EpisodeLog, reason: str) -> Path:
        """The store will never take it: out of the way, but not lost. Returns where it is now."""
        target = self.refused / log.path.name
        log.path.rename(target)
        target.with_suffix(".reason.txt").write_text(
            f"{reason}\nWhen that is mended, move the log back to {self.root} and start the actor again.\n", encoding="utf-8"
        )
        self._forget(log)
        return target

    def close(self) -> None:
        with self._changed:
            for log in self._logs.values():
                log.close()
        self._lock_file.close()

    def _forget(self, log: EpisodeLog) -> None:
        with self._changed:
            del self._logs[log.meta.episode_uuid]
            self._changed.notify_all()
        log.close()
