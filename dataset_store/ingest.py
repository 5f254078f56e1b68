"""One recorder's stream: what AppendEpisode's messages do to the store. Blocking, without gRPC, on a worker thread."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from manyhands import metrics
from manyhands.dataset.v1 import dataset_pb2
from manyhands.errors import Corrupt, InvalidInput, ManyhandsError, Overloaded, Refused
from manyhands.spec import decode_in_order

from .definition import Definition
from .store import LiveEpisode, Store

Response = dataset_pb2.AppendEpisodeResponse


class AppendSession:
    """The state of one stream. One thread at a time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._episode_uuid = ""
        self._live: LiveEpisode | None = None
        self._sealed_frame_count: int | None = None
        self._has_undurable = False

    def process(self, requests: Sequence[dataset_pb2.AppendEpisodeRequest]) -> tuple[list[Response], Exception | None]:
        """Takes what has arrived; one sync covers all its frames. The error, if any, ends the stream after the responses."""
        responses: list[Response] = []
        error: Exception | None = None
        try:
            self._store.check_space()
            for request in requests:
                self._take(request, responses)
        except Exception as raised:
            error = raised
        try:
            self._acknowledge(responses)
        except Exception as raised:
            error = error or raised
        if error is not None:
            self._end(error)
        return responses, error

    def close(self) -> None:
        """The stream is gone; the episode can be gone on with by another."""
        if self._live is not None:
            self._store.release(self, self._live)
            self._live = None

    def _take(self, request: dataset_pb2.AppendEpisodeRequest, responses: list[Response]) -> None:
        part = request.WhichOneof("part")
        if part == "begin":
            self._acknowledge(responses)
            responses.append(self._begin(request.begin))
            return
        if not self._episode_uuid:
            raise Refused(f"{part or 'an empty message'} came before Begin", field="part")
        if part == "frame":
            if self._live is not None:
                self._append(self._live, request.frame)
        elif part == "end":
            self._acknowledge(responses)
            responses.append(self._seal(request.end))
        elif part == "discard":
            responses.append(self._discard())
        else:
            raise InvalidInput("neither begin, frame, end nor discard is set", field="part")

    def _begin(self, begin: dataset_pb2.Begin) -> Response:
        self.close()
        self._sealed_frame_count = None
        found = self._store.begin(self, begin)
        self._episode_uuid = begin.episode_uuid
        if isinstance(found, LiveEpisode):
            self._live = found
            next_sequence = found.log.take_over(self)
            return self._response(resume=dataset_pb2.Resume(next_sequence=next_sequence))
        self._sealed_frame_count = found.frame_count
        return self._response(sealed=dataset_pb2.Sealed(frame_count=found.frame_count))

    def _append(self, live: LiveEpisode, frame: dataset_pb2.Frame) -> None:
        if frame.sequence < live.log.next_sequence:
            self._has_undurable = True  # Its acknowledgement may have been lost: it is given again.
            return
        live.log.check_sequence(frame.sequence)
        arrays = check_frame(frame, live.definition, self._store.limits.max_episode_frames)
        if live.log.append(self, frame):
            live.encoder.offer(frame.sequence, arrays)
        self._has_undurable = True

    def _seal(self, end: dataset_pb2.End) -> Response:
        if self._live is not None:
            episode = self._live.log.sealed_as(self, end)
            self._store.seal(self._live, episode)
            self._live = None
            self._sealed_frame_count = episode.frame_count
        assert self._sealed_frame_count is not None
        return self._response(sealed=dataset_pb2.Sealed(frame_count=self._sealed_frame_count))

    def _discard(self) -> Response:
        if self._live is None:
            raise Refused(
                f"episode {self._episode_uuid} is sealed and stays; deleting published episodes makes a new dataset",
                field="episode_uuid",
            )
        self._live.log.check_owner(self)
        self._store.discard(self._live)
        self._live = None
        self._has_undurable = False
        response = self._response(discarded=dataset_pb2.Discarded())
        self._episode_uuid = ""
        return response

    def _acknowledge(self, responses: list[Response]) -> None:
        if self._live is None or not self._has_undurable:
            return
        with metrics.timed_stage("store", "sync"):
            durable = self._live.log.sync(self)
        self._has_undurable = False
        responses.append(self._response(ack=dataset_pb2.Ack(durable_sequence=durable)))

    def _end(self, error: Exception) -> None:
        if self._live is None:
            return
        if isinstance(error, ManyhandsError) and not isinstance(error, Overloaded | Corrupt):
            self.close()
            return
        # The disk failed: what memory knows of the episode may be more than what is on disk.
        self._store.drop(self._live)
        self._live = None

    def _response(
        self,
        *,
        resume: dataset_pb2.Resume | None = None,
        ack: dataset_pb2.Ack | None = None,
        sealed: dataset_pb2.Sealed | None = None,
        discarded: dataset_pb2.Discarded | None = None,
    ) -> Response:
        return Response(episode_uuid=self._episode_uuid, resume=resume, ack=ack, sealed=sealed, discarded=discarded)


def check_frame(frame: dataset_pb2.Frame, definition: Definition, max_frames: int) -> dict[str, npt.NDArray[np.generic]]:
    """The observation's arrays of a frame that fits the dataset; InvalidInput names what does not."""
    num_bytes = frame.ByteSize()
    if num_bytes > definition.max_frame_bytes:
        raise InvalidInput(f"{num_bytes} bytes are over this dataset's {definition.max_frame_bytes}", field="frame")
    if frame.sequence >= max_frames:
        raise InvalidInput(
            f"({frame.sequence}) reaches the limit of {max_frames} frames an episode; end it and begin another",
            field="frame.sequence",
        )
    if frame.source not in dataset_pb2.ActionSource.values() or not frame.source:
        raise InvalidInput(f"{frame.source} must be one of ActionSource's", field="frame.source")
    if frame.source == dataset_pb2.ACTION_SOURCE_POLICY and not frame.HasField("version"):
        raise InvalidInput("must be set where the source is POLICY", field="frame.version")
    arrays = decode_in_order(frame.observation, definition.spec.observation)
    decode_in_order(frame.action, definition.spec.action)
    if frame.proposed_action:
        decode_in_order(frame.proposed_action, definition.spec.action)
    return arrays
