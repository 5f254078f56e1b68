"""The recorder's end of DatasetService.AppendEpisode: one thread calls, acknowledgements arrive on another."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

import grpc

from .. import errors
from ..dataset.v1 import dataset_pb2, dataset_pb2_grpc
from ..errors import ManyhandsError, Refused, TooLate, Unreachable


class AppendStream:
    """One stream to the store, any number of episodes one after the other.

    begin(), send(), end() and discard() are for one thread; durable_sequence may be read from any. After an error (of any
    call; Unreachable when the link broke) the stream is dead: close it, open another and begin() again with the same
    episode_uuid, which answers where to go on. Frames after durable_sequence must be kept until then.

    Attributes:
        durable_sequence: The last frame of the present episode that the store can no longer lose; -1 before the first.
        is_sealed: The present episode is sealed: complete and safe. begin() may find it so.
    """

    def __init__(self, stub: dataset_pb2_grpc.DatasetServiceStub, *, max_queued_frames: int = 64) -> None:
        self.durable_sequence = -1
        self.is_sealed = False
        self.sealed_frame_count = 0
        self._requests: queue.Queue[dataset_pb2.AppendEpisodeRequest | None] = queue.Queue(max_queued_frames)
        self._changed = threading.Condition()
        self._episode_uuid = ""
        self._resume: int | None = None
        self._is_discarded = False
        self._error: ManyhandsError | None = None
        self._is_closed = False
        self._call = stub.AppendEpisode(self._outgoing())
        self._receiver = threading.Thread(target=self._receive, name="dataset-acks", daemon=True)
        self._receiver.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def begin(self, dataset: str, episode_uuid: str, *, robot_id: str, spec_digest: bytes, timeout_s: float = 10.0) -> int:
        """Starts an episode or goes on with it; returns the sequence of the frame to send next.

        When the store has the episode sealed already, is_sealed is True afterwards, the count of its frames is returned and
        nothing more must be sent.

        Raises:
            InvalidInput: Not the dataset's spec, or no RFC 4122 uuid.
            NotFound: No such dataset.
            Overloaded: The store takes no more now (disk full, too many episodes in flight); see retry_after_s.
        """
        with self._changed:
            self._episode_uuid = episode_uuid
            self._resume, self.durable_sequence, self.is_sealed, self._is_discarded = None, -1, False, False
        begin = dataset_pb2.Begin(dataset=dataset, episode_uuid=episode_uuid, robot_id=robot_id, spec_digest=spec_digest)
        self._put(dataset_pb2.AppendEpisodeRequest(begin=begin), timeout_s)
        self._wait(lambda: self._resume is not None or self.is_sealed, timeout_s, "Begin")
        if self.is_sealed:
            return self.sealed_frame_count
        assert self._resume is not None
        return self._resume

    def send(self, frame: dataset_pb2.Frame, *, timeout_s: float = 5.0) -> None:
        """Queues one frame. Blocks while the queue is full (the store is slower than the robot); TooLate after timeout_s,
        after which the same frame may be sent again."""
        self._put(dataset_pb2.AppendEpisodeRequest(frame=frame), timeout_s)

    def wait_durable(self, sequence: int, *, timeout_s: float = 10.0) -> None:
        """Returns when the store can no longer lose frame `sequence`; TooLate after timeout_s."""
        self._wait(lambda: self.durable_sequence >= sequence or self.is_sealed, timeout_s, f"frame {sequence}")

    def end(
        self,
        frame_count: int,
        sha256: bytes,
        reason: dataset_pb2.EpisodeEnd.ValueType,
        *,
        timeout_s: float = 30.0,
    ) -> int:
        """Seals the episode; returns its count of frames. OutOfOrder or Corrupt: count or digest are not the store's."""
        end = dataset_pb2.End(frame_count=frame_count, sha256=sha256, reason=reason)
        self._put(dataset_pb2.AppendEpisodeRequest(end=end), timeout_s)
        self._wait(lambda: self.is_sealed, timeout_s, "End")
        return self.sealed_frame_count

    def discard(self, reason: str, *, timeout_s: float = 10.0) -> None:
        """Drops the episode for good."""
        self._put(dataset_pb2.AppendEpisodeRequest(discard=dataset_pb2.Discard(reason=reason)), timeout_s)
        self._wait(lambda: self._is_discarded, timeout_s, "Discard")

    @property
    def error(self) -> ManyhandsError | None:
        """Why the stream is dead, or None while it lives."""
        return self._error

    def close(self) -> None:
        """Ends the stream; what was not acknowledged may or may not have arrived."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        try:
            self._requests.put_nowait(None)
        except queue.Full:
            pass
        self._call.cancel()
        self._receiver.join(timeout=5.0)

    def _outgoing(self) -> Iterator[dataset_pb2.AppendEpisodeRequest]:
        while (request := self._requests.get()) is not None:
            yield request

    def _receive(self) -> None:
        try:
            for response in self._call:
                self._take(response)
            error: ManyhandsError = Unreachable("the store ended the stream; open another and begin again")
        except grpc.RpcError as rpc_error:
            error = errors.from_rpc_error(rpc_error)
        with self._changed:
            self._error = error
            self._changed.notify_all()
        # The thread that feeds gRPC waits in get(); what is queued will never be sent.
        try:
            self._requests.put_nowait(None)
        except queue.Full:
            pass

    def _take(self, response: dataset_pb2.AppendEpisodeResponse) -> None:
        with self._changed:
            if response.episode_uuid != self._episode_uuid:
                return
            part = response.WhichOneof("part")
            if part == "resume":
                self._resume = response.resume.next_sequence
                self.durable_sequence = self._resume - 1
            elif part == "ack":
                self.durable_sequence = max(self.durable_sequence, response.ack.durable_sequence)
            elif part == "sealed":
                self.is_sealed = True
                self.sealed_frame_count = response.sealed.frame_count
                self.durable_sequence = self.sealed_frame_count - 1
            elif part == "discarded":
                self._is_discarded = True
            self._changed.notify_all()

    def _put(self, request: dataset_pb2.AppendEpisodeRequest, timeout_s: float) -> None:
        self._check_alive()
        try:
            self._requests.put(request, timeout=timeout_s)
        except queue.Full:
            self._check_alive()
            raise TooLate(f"the store took no frame for {timeout_s} s; it is overloaded or the link is down") from None

    def _wait(self, is_done: Callable[[], bool], timeout_s: float, what: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: is_done() or self._error is not None or self._is_closed, timeout_s)
            if is_done():
                return
        self._check_alive()
        raise TooLate(f"the store did not answer {what} within {timeout_s} s")

    def _check_alive(self) -> None:
        if self._error is not None:
            raise self._error
        if self._is_closed:
            raise Refused("this stream is closed; open another")
