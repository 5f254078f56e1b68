"""The control loop's window on the inference service: ask without waiting, pick answers up later.

One thread keeps a session and its stream alive for as long as the run goes on: after a restart, a drain or a cut link it
tries again for ever, with back-off, under the same robot_id and client_id. One request is in flight at most, and a request
that could not be sent is dropped with a reason: the next observation is better than an old one (rule 2).
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from manyhands import codec, errors, stamps
from manyhands.clients.act_stream import ActStream, Chunk, Drain, Refusal, Reply, SubtaskAnswer
from manyhands.clients.inference import InferenceClient, Session
from manyhands.common.v1 import common_pb2
from manyhands.inference.v1 import inference_pb2
from manyhands.spec import Spec

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.1
LONGEST_BACKOFF_S = 2.0
# A stream that lived this long was a good one: the next one is opened without a wait.
STABLE_S = 2.0
# The server answers a late request with a refusal; only a dead link leaves us without any answer this much after.
ANSWER_GRACE_S = 1.0
HANDSHAKE_TIMEOUT_S = 10.0
# Of later attempts: a link that swallows packets must not keep a run from ending.
REOPEN_TIMEOUT_S = 2.0
# Questions for a subtask that may still be answered: the service drops what comes while it has one in progress.
MOST_QUESTIONS = 8
# After kill -9 of an actor the server needs a moment to see that the old stream is gone.
NAME_TAKEN_PATIENCE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class ChunkRequest:
    """One observation on its way to a chunk.

    Attributes:
        generation: Counts episodes and hand-overs; the loop drops answers to requests from before one.
        period: Control period of the run in which it was asked, holds counted.
        observation: Values the model asked for, in its order.
        tick: Of the observation.
        committed_prefix: (steps, A) float32 or None.
        observed_s: Monotonic, when the observation was asked for.
        task: What the chunk acts on.
        ask_subtask_for: The task that the text head is asked about; "" for none.
        capture_s: How long the robot took to read, render and encode it.
    """

    generation: int
    period: int
    observation: common_pb2.Observation
    task: str
    tick: int
    committed_prefix: npt.NDArray[np.float32] | None
    delay_steps: int
    execution_horizon: int
    noise_seed: int
    observed_s: float
    capture_s: float
    ask_subtask_for: str = ""


@dataclass(frozen=True, kw_only=True)
class ChunkAnswer:
    """What became of a request: reply with a chunk, or refusal says why not. arrived_s is monotonic."""

    request: ChunkRequest
    request_id: int
    reply: Reply | None
    refusal: str
    arrived_s: float

    @property
    def generation(self) -> int:
        return self.request.generation

    @property
    def chunk(self) -> Chunk | None:
        return self.reply.result if self.reply is not None and isinstance(self.reply.result, Chunk) else None


@dataclass(frozen=True, kw_only=True)
class SubtaskHeard:
    """What the text head said to the request that asked; generation is that request's.

    Attributes:
        answer: None where the stream broke first.
    """

    generation: int
    request_id: int
    answer: SubtaskAnswer | None


@dataclass(frozen=True, kw_only=True)
class SessionPlan:
    """What a session is opened with, again and again over the life of a run."""

    robot_id: str
    client_id: str
    model: str
    spec: Spec
    replan_interval_steps: int


class Backoff:
    """How long to wait before the next attempt at a stream: at once the first time and after one that lived, else longer and
    longer, with jitter, since robots that lost the same server must not all come back in the same instant."""

    def __init__(self) -> None:
        self._step_s = 0.0
        self._opened_s: float | None = None

    def opened(self, now_s: float) -> None:
        self._opened_s = now_s

    def next_s(self, now_s: float) -> float:
        if self._opened_s is not None and now_s - self._opened_s > STABLE_S:
            self._step_s = 0.0
        self._opened_s = None
        wait_s = self._step_s * random.uniform(0.5, 1.0)
        self._step_s = min(max(2 * self._step_s, FIRST_BACKOFF_S), LONGEST_BACKOFF_S)
        return wait_s


class InferenceStream:
    """A session that mends itself.

    Args:
        client: Of the service; closed by close().
        plan: Opened with.
        deadline_s: Time a request is worth waiting for.
    """

    def __init__(self, client: InferenceClient, plan: SessionPlan, *, deadline_s: float) -> None:
        self._client = client
        self._plan = plan
        self._deadline_s = deadline_s
        self._changed = threading.Condition()
        self._answers: deque[ChunkAnswer | SubtaskHeard] = deque()
        self._questions: deque[tuple[int, int]] = deque(maxlen=MOST_QUESTIONS)  # Request id, generation.
        self._waiting: ChunkRequest | None = None  # Not sent yet.
        self._pending: tuple[int, ChunkRequest, float] | None = None  # Request id, request, give up at.
        self._session: Session | None = None
        self._first_session: Session | None = None
        self._stream: ActStream | None = None
        self._drain_s: float | None = None
        self._not_before_s = 0.0  # A refusal's retry time.
        self._detail = ""
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    def handshake(self) -> Session:
        """Opens the session, before any motion. Raises what the service refuses with; see InferenceClient.open_session."""
        give_up_s = time.monotonic() + NAME_TAKEN_PATIENCE_S
        while True:
            try:
                self._session = self._first_session = self._open_session(HANDSHAKE_TIMEOUT_S)
                return self._session
            except errors.AlreadyExists as error:
                wait_s = min(error.retry_after_s or 0.5, 1.0)
                if time.monotonic() + wait_s > give_up_s:
                    raise
                time.sleep(wait_s)

    def start(self) -> None:
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether ask() would be sent at once."""
        with self._changed:
            idle = self._waiting is None and self._pending is None and self._drain_s is None
            return self._stream is not None and idle and time.monotonic() >= self._not_before_s

    @property
    def detail(self) -> str:
        """Why there is no stream; empty when there is one."""
        return self._detail

    def ask(self, request: ChunkRequest) -> None:
        """Never waits. A request that is still waiting to be sent is replaced."""
        with self._changed:
            if self._waiting is not None:
                self._fail_locked(self._waiting, 0, "superseded: a newer observation came first")
            self._waiting = request
            self._changed.notify_all()

    def answers(self) -> list[ChunkAnswer | SubtaskHeard]:
        """What arrived since the last call, oldest first. Never waits."""
        with self._changed:
            taken = list(self._answers)
            self._answers.clear()
        return taken

    def close(self) -> None:
        """Ends stream and session, and with it the claim on the robot_id."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout=REOPEN_TIMEOUT_S + 0.5)
        if self._session is not None:
            try:
                self._client.close_session(self._session.session_id, timeout_s=1.0)
            except errors.ManyhandsError as error:
                logger.info("session not closed: %s", error)
        self._client.close()

    def _run(self) -> None:
        backoff, retry_after_s = Backoff(), 0.0
        while not self._closing:
            if self._stream is not None:
                self._serve_once()
                continue
            self._sleep(max(backoff.next_s(time.monotonic()), retry_after_s))
            try:
                self._connect()
                backoff.opened(time.monotonic())
                retry_after_s = 0.0
            except errors.ManyhandsError as error:
                self._disconnect(f"{self._plan.model}: {error}")
                retry_after_s = error.retry_after_s or 0.0
        self._disconnect("closed")

    def _serve_once(self) -> None:
        """Waits for something to do on a live stream, and does it."""
        with self._changed:
            self._changed.wait_for(self._has_work, timeout=0.1)
            stream = self._stream
            if stream is None or self._closing:
                return
            if self._drain_s is not None and self._pending is None:
                wait_s, self._drain_s = self._drain_s, None
            elif self._pending is not None and time.monotonic() > self._pending[2]:
                wait_s = 0.0
                self._detail = f"no answer within {self._deadline_s + ANSWER_GRACE_S:.1f} s"
            elif self._waiting is not None and self._pending is None:
                request, self._waiting = self._waiting, None
                try:
                    self._send_locked(stream, request)
                    return
                except errors.ManyhandsError as error:
                    self._fail_locked(request, 0, str(error))
                    wait_s, self._detail = 0.0, str(error)
            else:
                return
        self._disconnect(self._detail or "the service drains")
        self._sleep(wait_s)

    def _has_work(self) -> bool:
        if self._closing or self._stream is None:
            return True
        if self._pending is not None:
            return time.monotonic() > self._pending[2]
        return self._waiting is not None or self._drain_s is not None

    def _send_locked(self, stream: ActStream, request: ChunkRequest) -> None:
        message = inference_pb2.ActRequest(
            observation=request.observation,
            task=request.task,
            current_index=request.tick,
            delay_steps=request.delay_steps,
            deadline=stamps.to_duration(self._deadline_s),
            noise_seed=request.noise_seed,
            execution_horizon=request.execution_horizon,
            ask_subtask_for=request.ask_subtask_for,
        )
        if request.committed_prefix is not None and len(request.committed_prefix):
            message.committed_prefix.CopyFrom(codec.encode_tensor(request.committed_prefix))
        # The lock is held: the answer cannot be looked at before the request is known as pending.
        request_id = stream.send_message(message)
        self._pending = (request_id, request, time.monotonic() + self._deadline_s + ANSWER_GRACE_S)
        if request.ask_subtask_for:
            self._questions.append((request_id, request.generation))

    def _connect(self) -> None:
        if self._session is None:
            session = self._open_session(REOPEN_TIMEOUT_S)
            first = self._first_session
            if first is not None and _shape(session) != _shape(first):
                raise errors.Refused(
                    f"model {self._plan.model!r} is served with another spec or horizon than at the start of the run; "
                    "stop the run and start it again to accept it",
                    field="model",
                )
            self._session = session
        stream_of: Callable[..., ActStream] = self._client.act_stream
        stream = stream_of(self._session.session_id, on_reply=self._received, on_broken=self._broken)
        with self._changed:
            self._stream = stream
            self._detail = ""
            self._changed.notify_all()

    def _open_session(self, timeout_s: float) -> Session:
        plan = self._plan
        return self._client.open_session(
            robot_id=plan.robot_id,
            client_id=plan.client_id,
            model=plan.model,
            spec=plan.spec,
            replan_interval_steps=plan.replan_interval_steps,
            timeout_s=timeout_s,
        )

    def _received(self, reply: Reply) -> None:
        with self._changed:
            if isinstance(reply.result, Drain):
                logger.info("the inference service drains: %s", reply.result.reason)
                self._drain_s = reply.result.reconnect_after_s
            elif isinstance(reply.result, SubtaskAnswer):
                self._hear_locked(reply.request_id, reply.result)
            elif self._pending is not None and self._pending[0] == reply.request_id:
                request_id, request, _ = self._pending
                self._pending = None
                refusal = ""
                if isinstance(reply.result, Refusal):
                    self._not_before_s = time.monotonic() + reply.result.retry_after_s
                    refusal = f"{reply.result.reason}: {reply.result.field} {reply.result.message}".replace(":  ", ": ")
                    if reply.result.reason == "unknown_session":
                        self._drain_s = 0.0
                self._append_locked(request, request_id, reply, refusal)
            self._changed.notify_all()

    def _hear_locked(self, request_id: int, answer: SubtaskAnswer) -> None:
        while self._questions and self._questions[0][0] <= request_id:
            asked_id, generation = self._questions.popleft()
            if asked_id == request_id:
                self._answers.append(SubtaskHeard(generation=generation, request_id=request_id, answer=answer))

    def _broken(self, error: errors.ManyhandsError) -> None:
        self._disconnect(str(error))

    def _disconnect(self, detail: str) -> None:
        with self._changed:
            if detail != self._detail and not self._closing:
                logger.warning("no chunks: %s", detail)
            stream, self._stream = self._stream, None
            self._detail = detail
            self._drain_s = None
            while self._questions:
                request_id, generation = self._questions.popleft()
                self._answers.append(SubtaskHeard(generation=generation, request_id=request_id, answer=None))
            if self._pending is not None:
                request_id, request, _ = self._pending
                self._pending = None
                self._fail_locked(request, request_id, detail)
            if self._waiting is not None:
                request, self._waiting = self._waiting, None
                self._fail_locked(request, 0, detail)
            if not self._closing:
                # Asking for the session again is idempotent and also covers a server that forgot it.
                self._session = None
            self._changed.notify_all()
        if stream is not None:
            stream.close(timeout_s=1.0)

    def _fail_locked(self, request: ChunkRequest, request_id: int, refusal: str) -> None:
        self._append_locked(request, request_id, None, refusal)

    def _append_locked(self, request: ChunkRequest, request_id: int, reply: Reply | None, refusal: str) -> None:
        answer = ChunkAnswer(
            request=request, request_id=request_id, reply=reply, refusal=refusal, arrived_s=time.monotonic()
        )
        self._answers.append(answer)

    def _sleep(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing, timeout=seconds)


def _shape(session: Session) -> tuple[bytes, int]:
    return session.model_spec.digest, session.chunk_horizon
