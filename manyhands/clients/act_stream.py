"""The stream of observations and chunks that an actor has with the inference service, and what its answers hold.

Needs numpy and grpc only. ActStream may be fed from the control loop, whose thread it never makes wait.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from .. import codec, errors, stamps
from ..common.v1 import common_pb2
from ..inference.v1 import inference_pb2, inference_pb2_grpc
from ..shared_memory import SharedMemory

logger = logging.getLogger(__name__)

# Metadata of Act: binds the stream to its session before the first observation, so a waiting robot keeps its session.
SESSION_KEY = "manyhands-session-id"
# Grows over the streams of a session: of two, the one with the higher number serves.
NUMBER_KEY = "manyhands-stream-number"

Arrays = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Actions for current_index, current_index + 1, ... of the request.

    Attributes:
        actions: (H, R) float32, the robot's units.
        model_actions: (H, A) float32, model space: its leftover is the next request's committed_prefix.
        replan_interval_steps: What the server now asks for.
    """

    actions: npt.NDArray[np.float32]
    model_actions: npt.NDArray[np.float32]
    replan_interval_steps: int


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why there is no chunk; the stream goes on. reason is lower case, as "superseded", "deadline", "unknown_session"."""

    reason: str
    field: str
    message: str
    retry_after_s: float


@dataclass(frozen=True, kw_only=True)
class Drain:
    """The server goes away: open a session elsewhere, or again after the wait. Pending chunks still come."""

    reconnect_after_s: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class SubtaskAnswer:
    """What the text head says to do next, for the request that asked with ask_subtask_for.

    Attributes:
        text: An instruction; "" when not accepted.
        accepted: False: no instruction came. Whatever is acted on stays in force.
        reason: Why not, for people.
    """

    text: str
    accepted: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer of the stream.

    Attributes:
        round_trip_s: From send() to here, on this process's clock; None where there is no request (Drain).
        stage_s: Seconds by stage: decode, queue, prefix, sample, postprocess, total.
        batch_size: Robots in the same pass of the model.
    """

    request_id: int
    version: common_pb2.PolicyVersion
    result: Chunk | Refusal | Drain | SubtaskAnswer
    round_trip_s: float | None
    stage_s: Mapping[str, float]
    batch_size: int


class ActStream:
    """The stream of one session. Made by InferenceClient.act_stream().

    Replies go to on_reply on the stream's own thread when one was given, else they wait for receive(). When the stream
    breaks, on_broken is called once with the error, and send() and receive() raise it: Unreachable when the server or the
    link is gone. Open a new stream with the same session then, or a new session when it answers "unknown_session".

    Args:
        request_ids: Of the session, which go on over its streams.
        number: Of this stream in the session; grows.
    """

    def __init__(
        self,
        stub: inference_pb2_grpc.InferenceServiceStub,
        session_id: str,
        request_ids: Iterator[int],
        *,
        number: int,
        on_reply: Callable[[Reply], None] | None = None,
        on_broken: Callable[[errors.ManyhandsError], None] | None = None,
        shared_memory: SharedMemory | None = None,
    ) -> None:
        self.session_id = session_id
        self._shared = shared_memory if shared_memory is not None and shared_memory.take() else None
        self._request_ids = request_ids
        self._on_reply = on_reply
        self._on_broken = on_broken
        self._changed = threading.Condition()
        self._unsent: inference_pb2.ActRequest | None = None
        self._closing = False
        self._error: errors.ManyhandsError | None = None
        self._replies: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        self._call = stub.Act(self._requests(), metadata=((SESSION_KEY, session_id), (NUMBER_KEY, str(number))))
        self._reader = threading.Thread(target=self._read, name=f"act-{session_id[:8]}", daemon=True)
        self._reader.start()

    def send(
        self,
        *,
        observation: Arrays,
        task: str,
        noise_seed: int,
        deadline_s: float,
        tick: int = 0,
        captured: common_pb2.Stamp | None = None,
        current_index: int = 0,
        committed_prefix: npt.NDArray[np.float32] | None = None,
        delay_steps: int = 0,
        execution_horizon: int = 0,
        ask_subtask_for: str = "",
        image_encoding: common_pb2.ImageEncoding.ValueType | None = None,
    ) -> int:
        """Asks for a chunk and returns the request's id; encoding of pictures is done on the caller's thread.

        Args:
            task: What the chunk acts on: the robot's own task or the subtask in force.
            observation: Arrays by name, in the order of Session.required_observations; cameras (H, W, 3) uint8 RGB.
            deadline_s: Seconds from now after which the chunk is useless; at most 60.
            committed_prefix: (steps, A) float32, model space, what is left of the last chunk from current_index on.
            delay_steps: Actions that will have been executed when the answer arrives.
            noise_seed: Same request, same seed, same version: same chunk.
            image_encoding: Of pictures; None: as they are where they go through shared memory, else JPEG.
            ask_subtask_for: The robot's own task, to be told what to do next for it: a SubtaskAnswer with this request's id
                follows in its own time, unless an earlier question is in progress. Only for a session with a text head.

        Raises:
            Unreachable: The stream is broken or closed.
        """
        request = inference_pb2.ActRequest(
            observation=common_pb2.Observation(
                values=codec.encode_values(observation, image_encoding=image_encoding or self._image_encoding),
                captured=captured,
                tick=tick,
            ),
            task=task,
            current_index=current_index,
            delay_steps=delay_steps,
            deadline=stamps.to_duration(deadline_s),
            noise_seed=noise_seed,
            execution_horizon=execution_horizon,
            ask_subtask_for=ask_subtask_for,
        )
        if committed_prefix is not None and len(committed_prefix):
            request.committed_prefix.CopyFrom(codec.encode_tensor(committed_prefix))
        return self.send_message(request)

    @property
    def _image_encoding(self) -> common_pb2.ImageEncoding.ValueType:
        return common_pb2.IMAGE_ENCODING_JPEG if self._shared is None else common_pb2.IMAGE_ENCODING_RAW_RGB8

    def send_message(self, request: inference_pb2.ActRequest) -> int:
        """As send(), for an encoded request; session, stamp and, where it has none, the id are filled in here."""
        request.session_id = self.session_id
        if not request.request_id:
            request.request_id = next(self._request_ids)
        request.sent.CopyFrom(stamps.now())
        with self._changed:
            if self._error is not None:
                raise self._error
            if self._closing:
                raise errors.Unreachable("the stream is closed; open a new one")
            replaced, self._unsent = self._unsent, request
            self._changed.notify()
        if replaced is not None:
            self._deliver(
                inference_pb2.ActResponse(
                    session_id=self.session_id,
                    request_id=replaced.request_id,
                    request_sent=replaced.sent,
                    refusal=inference_pb2.Refusal(
                        reason=inference_pb2.REFUSAL_REASON_SUPERSEDED,
                        message="a newer observation was ready before this one was sent",
                    ),
                )
            )
        return request.request_id

    def receive(self, timeout_s: float) -> Reply | None:
        """The next reply, or None after timeout_s. Only without on_reply."""
        if self._on_reply is not None:
            raise RuntimeError("this stream delivers its replies to on_reply")
        try:
            reply = self._replies.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if reply is None:  # The end; put it back for whoever asks next.
            self._replies.put(None)
            raise self._error or errors.Unreachable("the stream is closed; open a new one")
        return reply

    def __iter__(self) -> Iterator[Reply]:
        """Replies until close(); raises what broke the stream."""
        while True:
            try:
                reply = self.receive(timeout_s=3600.0)
            except errors.ManyhandsError:
                if self._error is None:
                    return
                raise
            if reply is not None:
                yield reply

    @property
    def broken(self) -> errors.ManyhandsError | None:
        """What ended the stream, or None while it lives."""
        return self._error

    def close(self, timeout_s: float = 2.0) -> None:
        """Ends the stream; pending replies are dropped. The session stays for its idle timeout."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._call.cancel()
        if threading.current_thread() is not self._reader:
            self._reader.join(timeout_s)

    def __enter__(self) -> ActStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _requests(self) -> Iterator[inference_pb2.ActRequest]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unsent is not None or self._closing)
                if self._closing:
                    return
                request, self._unsent = self._unsent, None
            assert request is not None
            yield self._placed(request)

    def _placed(self, request: inference_pb2.ActRequest) -> inference_pb2.ActRequest:
        """As it travels."""
        shared = self._shared
        return request if shared is None else shared.place(request)

    def _read(self) -> None:
        error: errors.ManyhandsError
        try:
            for response in self._call:
                self._deliver(response)
            error = errors.Unreachable("the server ended the stream; open a new one")
        except grpc.RpcError as rpc_error:
            error = errors.from_rpc_error(rpc_error)
        except errors.ManyhandsError as bad_reply:
            error = bad_reply
            self._call.cancel()
        except Exception:  # on_reply's; without a reader the caller must learn that the stream is over.
            logger.exception("on_reply failed; stream of session %s ends", self.session_id)
            error = errors.InternalError("on_reply raised; this process's log has the traceback")
            self._call.cancel()
        with self._changed:
            expected = self._closing
            if not expected:
                self._error = error
            self._closing = True  # Ends _requests().
            self._changed.notify()
        self._let_go()
        self._replies.put(None)
        if not expected and self._on_broken is not None:
            self._on_broken(error)

    def _let_go(self) -> None:
        """Of the memory. Apart from _read(), whose frame lives on in the traceback of what ended the stream."""
        shared, self._shared = self._shared, None
        if shared is not None:
            shared.give_back()

    def _deliver(self, response: inference_pb2.ActResponse) -> None:
        reply = decode_reply(response)
        if self._shared is not None and isinstance(reply.result, Chunk | Refusal):
            self._shared.answered(reply.request_id)
        if self._on_reply is not None:
            self._on_reply(reply)
        else:
            self._replies.put(reply)


def decode_reply(response: inference_pb2.ActResponse) -> Reply:
    """Checked arrays of a response; InvalidInput when the server sent something that is no chunk."""
    result: Chunk | Refusal | Drain | SubtaskAnswer
    which = response.WhichOneof("result")
    if which == "chunk":
        result = Chunk(
            actions=_actions(response.chunk.actions, "chunk.actions"),
            model_actions=_actions(response.chunk.model_actions, "chunk.model_actions"),
            replan_interval_steps=response.chunk.replan_interval_steps,
        )
    elif which == "refusal":
        refusal = response.refusal
        result = Refusal(
            reason=short_name(inference_pb2.RefusalReason, refusal.reason),
            field=refusal.field,
            message=refusal.message,
            retry_after_s=stamps.to_seconds(refusal.retry_after),
        )
    elif which == "drain":
        result = Drain(reconnect_after_s=stamps.to_seconds(response.drain.reconnect_after), reason=response.drain.reason)
    elif which == "subtask":
        result = SubtaskAnswer(
            text=response.subtask.text, accepted=response.subtask.accepted, reason=response.subtask.reason
        )
    else:
        raise errors.InvalidInput("has neither chunk, refusal, drain nor subtask", field="act_response.result")
    times = response.times
    return Reply(
        request_id=response.request_id,
        version=response.version,
        result=result,
        round_trip_s=stamps.age_s(response.request_sent) if response.HasField("request_sent") else None,
        stage_s={
            stage: stamps.to_seconds(getattr(times, stage))
            for stage in ("decode", "queue", "prefix", "sample", "postprocess", "total")
        },
        batch_size=times.batch_size,
    )


def _actions(tensor: common_pb2.Tensor, field: str) -> npt.NDArray[np.float32]:
    actions = codec.decode_tensor(tensor, field=field)
    if actions.dtype != np.float32 or actions.ndim != 2:
        raise errors.InvalidInput(f"is {actions.shape} {actions.dtype.name}, not (steps, size) float32", field=field)
    # The safety core judges too, but what is not finite is never an action.
    if not np.isfinite(actions).all():
        raise errors.InvalidInput("holds values that are not finite", field=field)
    return actions.astype(np.float32, copy=False)


def short_name(kinds: Any, number: int) -> str:
    """REFUSAL_REASON_SUPERSEDED -> superseded, ADAPTATION_KIND_PADDED -> padded; a newer peer's own as its number."""
    if number not in kinds.values():
        return str(number)
    name: str = kinds.Name(number)
    return name.removeprefix("REFUSAL_REASON_").removeprefix("ADAPTATION_KIND_").lower()
