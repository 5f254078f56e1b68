"""One store on one local folder: episodes in flight, sealed, published. docs/design/0005-dataset-contract.md

<root>/lock                              one process at a time
<root>/catalogue.sqlite                  what is sealed, numbered, published
<root>/ingest/<dataset>/<uuid>.log       frames as they came; gone once published
<root>/staging/<dataset>/<uuid>/         videos of one episode; gone once published
<root>/datasets/<dataset>/               the published root, in LeRobotDataset v3.0 (FORMAT.md)
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import shutil
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from manyhands import metrics
from manyhands.dataset.v1 import dataset_pb2
from manyhands.errors import Corrupt, InvalidInput, ManyhandsError, Overloaded, Refused
from manyhands.framelog import truncate_torn

from .catalogue import Catalogue, CataloguedEpisode, EpisodeState, SealedEpisode
from .definition import Definition
from .encoder import EncodedEpisode, EncoderPool, EpisodeEncoder
from .episode_log import EpisodeLog, read_begin
from .layout import as_overloaded, check_episode_uuid, make_directory
from .publisher import Publisher

logger = logging.getLogger(__name__)

Key = tuple[str, str]  # (dataset, episode uuid)


@dataclass(frozen=True, kw_only=True)
class StoreLimits:
    """What the store takes before it says no.

    Attributes:
        min_free_mib: New frames are refused while the disk has less: publishing and the catalogue need room too.
        max_live_episodes: Open at once; idle ones make room and go on from their log later.
        max_episode_frames: Of one episode.
        publish_delay_s: Sealed episodes wait so long for others before they are published together; fewer, larger files.
        encoder_threads: Threads that encode video, at low priority.
    """

    min_free_mib: int = 256
    max_live_episodes: int = 256
    max_episode_frames: int = 500_000
    publish_delay_s: float = 5.0
    encoder_threads: int = max(1, (os.cpu_count() or 2) // 2)


@dataclass(kw_only=True)
class LiveEpisode:
    """An episode in flight, open in this process. owner is the stream that sends it, None while none does."""

    definition: Definition
    log: EpisodeLog
    encoder: EpisodeEncoder
    owner: object | None = None


class Store:
    """Any thread may call. Opening finishes whatever a killed process left.

    Raises:
        Refused: Another process has the folder open.
    """

    def __init__(self, root: Path, limits: StoreLimits | None = None) -> None:
        self.root = root
        self.limits = limits or StoreLimits()
        root.mkdir(parents=True, exist_ok=True)
        self._lock_file = _lock(root / "lock")
        self.catalogue = Catalogue(root / "catalogue.sqlite")
        self._pool = EncoderPool(num_threads=self.limits.encoder_threads)
        self._lock = threading.Lock()
        # Taken before _lock, never after it.
        self._guards = [threading.Lock() for _ in range(64)]
        self._live: dict[Key, LiveEpisode] = {}
        self._definitions: dict[str, Definition] = {}
        self._encoded: dict[Key, Future[EncodedEpisode]] = {}
        self._publishers: dict[str, tuple[Publisher, threading.Lock]] = {}
        self._sealed_at: dict[str, float] = {}
        self._wake = threading.Event()
        self._is_closing = False
        self._recover()
        self._publishing = threading.Thread(target=self._publish_in_background, name="publish", daemon=True)
        self._publishing.start()

    def interrupt(self) -> None:
        """Encoding and publishing stop at the next frame or file; calls that wait for them get Cancelled."""
        self._is_closing = True
        self._wake.set()
        self._pool.interrupt()

    def close(self) -> None:
        """Everything acknowledged is on disk already; what is under way goes on at the next start."""
        self.interrupt()
        self._pool.close()
        self._publishing.join(timeout=3.0)
        with self._lock:
            for live in self._live.values():
                live.log.close()
            self._live.clear()
        self.catalogue.close()
        self._lock_file.close()

    # Datasets

    def create_dataset(self, definition: Definition) -> dataset_pb2.DatasetInfo:
        self.catalogue.create_dataset(definition)
        make_directory(self._ingest(definition.name))
        make_directory(self.published_root(definition.name))
        return self.info(definition.name)

    def definition(self, dataset: str) -> Definition:
        """NotFound where there is none. Definitions never change, so they are read once."""
        if dataset not in self._definitions:
            self._definitions[dataset] = self.catalogue.definition(dataset)
        return self._definitions[dataset]

    def info(self, dataset: str) -> dataset_pb2.DatasetInfo:
        definition = self.definition(dataset)
        counts = self.catalogue.counts(dataset)
        num_logs = sum(1 for _ in self._ingest(dataset).glob("*.log"))
        return dataset_pb2.DatasetInfo(
            definition=definition.to_proto(),
            episode_count=counts.episodes,
            frame_count=counts.frames,
            sealed_count=counts.sealed,
            recording_count=max(0, num_logs - counts.sealed),
            root_path=str(self.published_root(dataset).resolve()),
            size_bytes=counts.size_bytes,
        )

    def published_root(self, dataset: str) -> Path:
        return self.root / "datasets" / dataset

    # Episodes in flight

    def begin(self, owner: object, begin: dataset_pb2.Begin) -> LiveEpisode | CataloguedEpisode:
        """The episode to append to, now owned by owner; or the sealed one, which takes no more."""
        definition = self.definition(begin.dataset)
        check_episode_uuid(begin.episode_uuid)
        if begin.spec_digest != definition.spec.digest:
            raise InvalidInput(
                f"is {begin.spec_digest.hex()[:16]}, dataset {begin.dataset!r} has {definition.spec.digest.hex()[:16]}; "
                "features, units or rate differ: record into a dataset that was created with this robot's spec",
                field="begin.spec_digest",
            )
        key = (begin.dataset, begin.episode_uuid)
        with self._guard(key):
            sealed = self.catalogue.find(*key)
            if sealed is not None:
                return sealed
            self.check_space()
            with self._lock:
                live = self._live.get(key)
                if live is None:
                    self._make_room()
            if live is None:
                path = self._log(*key)
                make_directory(path.parent)
                live = LiveEpisode(
                    definition=definition,
                    log=EpisodeLog(path, begin),
                    encoder=EpisodeEncoder(self._pool, definition, self._staging(*key)),
                )
                with self._lock:
                    self._live[key] = live
            elif live.log.begin != begin:
                raise InvalidInput(
                    f"is in use by robot {live.log.begin.robot_id!r}; choose a new uuid", field="episode_uuid"
                )
            live.owner = owner
            return live

    def seal(self, live: LiveEpisode, episode: SealedEpisode) -> None:
        """The episode is safe when this returns; encoding and publishing follow."""
        dataset = live.definition.name
        key = (dataset, episode.uuid)
        with self._guard(key):
            self.catalogue.seal(dataset, episode)
            with self._lock:
                self._live.pop(key, None)
                self._sealed_at[dataset] = min(self._sealed_at.get(dataset, math.inf), time.monotonic())
                self._finish_encoding(key, live.encoder, episode.frame_count)
            live.log.close()
        self._wake.set()

    def discard(self, live: LiveEpisode) -> None:
        key = (live.definition.name, live.log.begin.episode_uuid)
        with self._guard(key):
            with self._lock:
                self._live.pop(key, None)
            live.log.close()
            live.log.path.unlink(missing_ok=True)
            live.encoder.abandon()

    def release(self, owner: object, live: LiveEpisode) -> None:
        """The stream ended; the episode waits for its recorder to begin it again."""
        with self._lock:
            if live.owner is owner:
                live.owner = None

    def drop(self, live: LiveEpisode) -> None:
        """After a failed write: forgets what memory says of the episode; the next begin reads the log again."""
        key = (live.definition.name, live.log.begin.episode_uuid)
        with self._guard(key):
            with self._lock:
                if self._live.get(key) is not live:
                    return
                del self._live[key]
            live.log.close()
            live.encoder.abandon()

    def check_space(self) -> None:
        free_mib = shutil.disk_usage(self.root).free / 2**20
        if free_mib < self.limits.min_free_mib:
            raise Overloaded(
                f"the store's disk has {free_mib:.0f} MiB left, under the limit of {self.limits.min_free_mib} MiB "
                "(--min-free-mib); free space, recording goes on from the last acknowledged frame",
                retry_after_s=5.0,
            )

    # Publishing

    def publish(self, dataset: str) -> dataset_pb2.DatasetInfo:
        """Returns when readers see every episode that was sealed before the call; Overloaded while the disk is full."""
        try:
            self._publish(dataset, wait_for_encoding=True)
        except OSError as error:
            raise as_overloaded(error) from error
        return self.info(dataset)

    def _publish(self, dataset: str, *, wait_for_encoding: bool) -> int:
        definition = self.definition(dataset)
        with self._lock:
            if dataset not in self._publishers:
                self._publishers[dataset] = (self._make_publisher(definition), threading.Lock())
            publisher, lock = self._publishers[dataset]
        with lock:
            sealed = self.catalogue.in_state(dataset, EpisodeState.SEALED)
            if not wait_for_encoding:
                sealed = [e for e in sealed if self._encoding(dataset, e).done()]
            with metrics.timed_stage("store", "publish"):
                published = publisher.publish(sealed)
            with self._lock:
                for episode in sealed:
                    self._encoded.pop((dataset, episode.uuid), None)
            return published

    def _make_publisher(self, definition: Definition) -> Publisher:
        return Publisher(
            definition,
            self.catalogue,
            self.published_root(definition.name),
            log_of=lambda uuid: self._log(definition.name, uuid),
            encoded_of=lambda episode: self._wait_encoded(definition.name, episode),
        )

    def _publish_in_background(self) -> None:
        while not self._is_closing:
            self._wake.wait(timeout=0.5)
            self._wake.clear()
            with self._lock:
                now = time.monotonic()
                due = [name for name, since in self._sealed_at.items() if now - since >= self.limits.publish_delay_s]
            for dataset in due:
                if self._is_closing:
                    return
                with self._lock:
                    del self._sealed_at[dataset]
                try:
                    self._publish(dataset, wait_for_encoding=False)
                    retry_after_s = 0.0
                except Exception as error:
                    if self._is_closing:
                        return
                    # A full disk passes; a damaged episode stays damaged, the others were published.
                    retry_after_s = 300.0 if isinstance(error, Corrupt) else 5.0
                    is_expected = isinstance(error, OSError | ManyhandsError)
                    logger.error("%s: publishing failed, will retry: %s", dataset, error, exc_info=not is_expected)
                if self.catalogue.counts(dataset).sealed:
                    with self._lock:
                        self._sealed_at.setdefault(dataset, time.monotonic() + retry_after_s)
            if not due:
                time.sleep(0.05)  # A burst of wake-ups becomes one look.

    def _wait_encoded(self, dataset: str, episode: CataloguedEpisode) -> EncodedEpisode:
        return self._encoding(dataset, episode).result()

    def _encoding(self, dataset: str, episode: CataloguedEpisode) -> Future[EncodedEpisode]:
        key = (dataset, episode.uuid)
        with self._lock:
            future = self._encoded.get(key)
            # What failed before (a full disk, say) may work now.
            if future is None or (future.done() and future.exception() is not None):
                self._encoded.pop(key, None)
                encoder = EpisodeEncoder(self._pool, self.definition(dataset), self._staging(*key))
                self._finish_encoding(key, encoder, episode.frame_count)
            return self._encoded[key]

    def _finish_encoding(self, key: Key, encoder: EpisodeEncoder, frame_count: int) -> None:
        if key not in self._encoded:
            self._encoded[key] = self._pool.submit(encoder.finish, self._log(*key), frame_count)

    # Start

    def _recover(self) -> None:
        for definition in self.catalogue.datasets():
            dataset = definition.name
            make_directory(self._ingest(dataset))
            make_directory(self.published_root(dataset))
            staged = {path.name for path in (self.root / "staging" / dataset).glob("*")}
            in_flight: set[str] = set()
            for log in self._ingest(dataset).glob("*.log"):
                episode = self.catalogue.find(dataset, log.stem)
                if episode is None:
                    torn = truncate_torn(log)
                    if read_begin(log) is None:
                        log.unlink()  # Killed before the first record was whole: nothing was acknowledged.
                        continue
                    in_flight.add(log.stem)
                    logger.info("%s: episode %s is in flight (%d torn bytes cut)", dataset, log.stem, torn)
                elif episode.state is EpisodeState.PUBLISHED:
                    log.unlink()
                    shutil.rmtree(self._staging(dataset, log.stem), ignore_errors=True)
            waiting = [
                *self.catalogue.in_state(dataset, EpisodeState.NUMBERED),
                *self.catalogue.in_state(dataset, EpisodeState.SEALED),
            ]
            for uuid in staged - {episode.uuid for episode in waiting}:
                shutil.rmtree(self._staging(dataset, uuid), ignore_errors=True)
            for temporary in self.published_root(dataset).rglob("*.tmp"):
                temporary.unlink()
            for episode in waiting:
                self._encoding(dataset, episode)
            if waiting:
                logger.info("%s: %d sealed episodes are to be published", dataset, len(waiting))
                self._sealed_at[dataset] = time.monotonic() - self.limits.publish_delay_s

    def _make_room(self) -> None:
        if len(self._live) < self.limits.max_live_episodes:
            return
        for key, live in self._live.items():
            if live.owner is None:
                del self._live[key]
                live.log.close()
                live.encoder.abandon()
                return
        raise Overloaded(
            f"{len(self._live)} episodes are being recorded, the limit; end some or raise --max-live-episodes",
            retry_after_s=5.0,
        )

    def _guard(self, key: Key) -> threading.Lock:
        """Opening, sealing and deleting the files of one episode exclude each other; other episodes hardly wait."""
        return self._guards[hash(key) % len(self._guards)]

    def _ingest(self, dataset: str) -> Path:
        return self.root / "ingest" / dataset

    def _log(self, dataset: str, uuid: str) -> Path:
        return self._ingest(dataset) / f"{uuid}.log"

    def _staging(self, dataset: str, uuid: str) -> Path:
        return self.root / "staging" / dataset / uuid


def _lock(path: Path) -> TextIO:
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        with contextlib.suppress(OSError):
            file.close()
        raise Refused(f"another process has the store in {path.parent} open; stop it first", field="root") from None
    return file
