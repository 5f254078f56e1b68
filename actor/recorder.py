"""From the control loop to the spool without making the loop wait for a disk."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from manyhands import errors
from manyhands.dataset.v1 import dataset_pb2

from .spool import EpisodeLog, EpisodeMeta, Spool

logger = logging.getLogger(__name__)

# Two seconds at 100 Hz. A disk that is further behind will not catch up.
QUEUE_FRAMES = 200
SYNC_INTERVAL_S = 1.0
FLUSH_TIMEOUT_S = 30.0


class Recorder:
    """One episode at a time: begin(), frame() every tick, then end() or discard().

    frame() only queues; a thread writes. What goes wrong there is raised by the next frame() or end(), before more is
    recorded. begin(), end() and discard() may take some milliseconds: they are called between episodes.
    """

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._log: EpisodeLog | None = None
        self._frames: queue.Queue[dataset_pb2.Frame | None] = queue.Queue(maxsize=QUEUE_FRAMES)
        self._error: errors.ManyhandsError | None = None
        self._thread = threading.Thread(target=self._write, name="recorder", daemon=True)
        self._thread.start()

    def check_room(self) -> None:
        """Raises Overloaded when not even an empty episode would fit."""
        self._spool.check_room(0)

    def begin(self, meta: EpisodeMeta) -> None:
        """Raises Overloaded when the spool has no room."""
        assert self._log is None, "an episode is being recorded"
        self._error = None
        try:
            self._log = self._spool.begin(meta)
        except OSError as error:
            raise _disk_error(error) from error

    def frame(self, frame: dataset_pb2.Frame) -> None:
        """Never waits.

        Raises:
            Overloaded: The spool is full, the disk is, or it is slower than the robot. The frame is not recorded; those
                before it are.
        """
        if self._error is not None:
            raise self._error
        try:
            self._frames.put_nowait(frame)
        except queue.Full:
            raise errors.Overloaded(
                f"the spool's disk is {QUEUE_FRAMES} frames behind; use a faster disk, fewer pixels or a lower rate",
                field="spool",
            ) from None

    def flush(self) -> None:
        """Returns when every frame so far is in the log; raises what went wrong with one of them."""
        deadline_s = time.monotonic() + FLUSH_TIMEOUT_S
        with self._frames.all_tasks_done:
            while self._frames.unfinished_tasks:
                if not self._frames.all_tasks_done.wait(deadline_s - time.monotonic()):
                    raise errors.Overloaded(f"the spool's disk took over {FLUSH_TIMEOUT_S} s for an episode", field="spool")
        if self._error is not None:
            raise self._error

    def end(self, reason: dataset_pb2.EpisodeEnd.ValueType) -> int:
        """Ends the episode with the frames that were written; returns how many. Does nothing without an episode."""
        return self._finish(lambda log: log.end(reason))

    def discard(self, reason: str) -> None:
        self._finish(lambda log: log.discard(reason))

    def close(self) -> None:
        self._frames.put(None)
        self._thread.join(timeout=5.0)

    def _finish(self, finish: Callable[[EpisodeLog], None]) -> int:
        log = self._log
        if log is None:
            return 0
        try:
            self.flush()
        except errors.ManyhandsError as error:
            logger.error("episode %s ends early: %s", log.meta.episode_uuid, error)
        self._log = None
        try:
            finish(log)
        except OSError as error:
            # The log stays as it is; the next start of the actor ends it.
            raise _disk_error(error) from error
        return log.frame_count

    def _write(self) -> None:
        last_sync_s = time.monotonic()
        while (frame := self._frames.get()) is not None:
            try:
                log = self._log
                if log is not None and self._error is None:
                    self._spool.check_room(frame.ByteSize())
                    log.append_frame(frame)
                    if time.monotonic() - last_sync_s > SYNC_INTERVAL_S:
                        log.sync()
                        last_sync_s = time.monotonic()
            except OSError as error:
                self._error = _disk_error(error)
            except errors.ManyhandsError as error:
                self._error = error
            finally:
                self._frames.task_done()


def _disk_error(error: OSError) -> errors.ManyhandsError:
    return errors.Overloaded(f"cannot write to the spool: {error.strerror or error}; see its disk", field="spool")
