"""From the spool to the store: oldest episode first, dropped only when the store has sealed it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from manyhands import errors
from manyhands.clients.dataset import AppendStream, DatasetClient
from manyhands.dataset.v1 import dataset_pb2

from .spool import EpisodeLog, Spool

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.1
LONGEST_BACKOFF_S = 5.0
# A store that seals waits for its disk, not for its encoder; a minute means that it is stuck and a new stream is better.
SEAL_TIMEOUT_S = 60.0

# Refusals of one episode that no retry will change: it goes out of the way of the others.
HOPELESS = (errors.InvalidInput, errors.NotFound, errors.Corrupt, errors.AlreadyExists)


class Uploader:
    """One thread, one stream; a broken stream is opened again for ever, with back-off, and goes on where the store says."""

    def __init__(self, spool: Spool, client: DatasetClient, *, on_change: Callable[[], None]) -> None:
        self._spool = spool
        self._client = client
        self._on_change = on_change
        self._closing = threading.Event()
        self.detail = ""
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stops; what is not sealed stays in the spool."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout=1.0)
        self._client.close()

    def _run(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while not self._closing.is_set():
            log = self._spool.oldest(timeout_s=0.2)
            if log is None:
                continue
            try:
                with self._client.open_append() as stream:
                    while log is not None and not self._closing.is_set():
                        self._upload(stream, log)
                        self._say("")
                        backoff_s = FIRST_BACKOFF_S
                        log = self._spool.oldest(timeout_s=0.2)
            except HOPELESS as error:
                assert log is not None
                if log.ended:
                    place = self._spool.refuse(log, str(error))
                    self._say(f"the store refuses episode {log.meta.episode_uuid}: {error}; kept as {place}")
                else:
                    # Still being recorded: it is complete on disk before it is put aside.
                    self._say(f"the store refuses episode {log.meta.episode_uuid}: {error}")
                    self._closing.wait(LONGEST_BACKOFF_S)
            except errors.ManyhandsError as error:
                self._say(f"the store takes no frames: {error}")
                self._closing.wait(max(backoff_s, min(error.retry_after_s or 0.0, 30.0)))
                backoff_s = min(backoff_s * 2, LONGEST_BACKOFF_S)

    def _upload(self, stream: AppendStream, log: EpisodeLog) -> None:
        meta = log.meta
        index = stream.begin(
            meta.dataset, meta.episode_uuid, robot_id=meta.robot_id, spec_digest=bytes.fromhex(meta.spec_digest)
        )
        if stream.is_sealed:
            self._spool.remove(log)
            return
        if index > log.frame_count:
            raise errors.Corrupt(f"the store has {index} frames of an episode that has {log.frame_count} in the spool")
        while not self._closing.is_set():
            log.acked_count = max(log.acked_count, stream.durable_sequence + 1)
            if stream.error is not None:
                raise stream.error
            if not log.wait_for_record(index, timeout_s=0.1):
                continue
            # The store must never have a frame that a power loss here can take back: it could not be resumed.
            available = log.record_count
            log.sync()
            while index < available:
                message = dataset_pb2.AppendEpisodeRequest.FromString(log.read(index))
                part = message.WhichOneof("part")
                if part == "frame":
                    stream.send(message.frame)
                    log.acked_count = max(log.acked_count, stream.durable_sequence + 1)
                    index += 1
                    continue
                if part == "end":
                    stream.end(message.end.frame_count, message.end.sha256, message.end.reason, timeout_s=SEAL_TIMEOUT_S)
                else:
                    stream.discard(message.discard.reason)
                self._spool.remove(log)
                return

    def _say(self, detail: str) -> None:
        if detail != self.detail:
            self.detail = detail
            self._on_change()
            if detail:
                logger.warning("%s", detail)
            else:
                logger.info("the store takes frames")
