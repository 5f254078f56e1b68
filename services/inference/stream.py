"""One robot's stream: requests in, chunks out. Lives on the event loop; decoding and the model run on other threads.

Of one robot at most three observations are in memory: the newest that waits, one being decoded, one in the engine's line; of
one that is alone also its last request. A request that is refused leaves the stream open.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

from manyhands import stamps
from manyhands.errors import (
    Conflict,
    InternalError,
    InvalidInput,
    ManyhandsError,
    NotFound,
    Unreachable,
)
from manyhands.inference.v1 import inference_pb2

from . import responses
from .engine_port import Answer, EnginePort, Job, Model, Outcome, Rehearsal, Row, Superseded
from .next_request import NextRequest
from .operator_notes import OperatorNotes
from .pace import Pace
from .prepare import Array, SentRow, check_row, deadline_s
from .sessions import Session, Sessions
from .side_by_side import side_by_side
from .subtask_question import SubtaskQuestion

logger = logging.getLogger(__name__)

# Answers a client may leave unread before its next requests are left unread too.
MAX_UNREAD = 32
# Requests that are read at once of a robot that was silent, whatever its pace.
MAX_BURST = 64


class Desk(Protocol):
    """What streams share."""

    sessions: Sessions
    engine: EnginePort
    notes: OperatorNotes
    max_requests_hz: float

    @property
    def models(self) -> Mapping[str, Model]: ...

    @property
    def decoders(self) -> Executor: ...

    @property
    def num_in_flight(self) -> int: ...

    @property
    def num_streams(self) -> int: ...

    def max_request_bytes(self, session: Session) -> int: ...

    def replan_interval_steps(self, session: Session) -> int: ...


@dataclass(frozen=True, kw_only=True)
class _Asked:
    session: Session
    request: inference_pb2.ActRequest
    received_s: float
    deadline_s: float


class RobotStream:
    """Serves one Act call.

    Args:
        session_id: From the call's metadata, when the client said which session this stream is for; else the first request
            says it.
        number: Its client's, which grows over the streams of a session; 0: it does not say.
    """

    def __init__(self, desk: Desk, session_id: str, clock: Callable[[], float] = time.monotonic, *, number: int = 0) -> None:
        self._desk = desk
        self._number = number
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._session: Session | None = None
        self._outbox: asyncio.Queue[inference_pb2.ActResponse | None] = asyncio.Queue()
        self._read_by_client = asyncio.Event()
        self._loop_thread = threading.get_ident()
        self._decoding = False
        # Of the request that is being decoded.
        self._gate = 0
        # Its last request was answered: the device may wait for the pictures of the next.
        self._is_trusted = False
        self._next: _Asked | None = None
        self._is_over = False
        self._last_answered: _Asked | None = None
        self._next_request = NextRequest(self._rehearse_next, clock)
        self._in_flight: dict[int, _Asked] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._ending: ManyhandsError | None = None
        self._pace = Pace(desk.max_requests_hz, MAX_BURST)
        self._said_too_fast = False
        self._subtask = SubtaskQuestion(desk.engine, self._outbox.put_nowait, clock, traces=desk.notes.traces)
        if session_id:
            try:
                self._attach(desk.sessions.get(session_id))
            except (NotFound, Conflict):
                pass  # The first request is answered with it, by its id.

    @property
    def num_in_flight(self) -> int:
        """Requests that wait for their answer."""
        return len(self._in_flight)

    async def responses(self, requests: AsyncIterator[inference_pb2.ActRequest]) -> AsyncIterator[inference_pb2.ActResponse]:
        """Answers until the client has ended its side and nothing is in flight, or finish() or end() says so."""
        reading = asyncio.create_task(self._read(requests))
        try:
            while (response := await self._outbox.get()) is not None:
                self._read_by_client.set()
                yield response
            if self._ending is not None:
                raise self._ending
        finally:
            self._is_over = True
            self._give_up_gate()
            self._next_request.stop()
            reading.cancel()
            self._subtask.stop()
            # A stream that another one took over from may end much later, on a dead link: what is asked is the other's then.
            if self._session is not None and self._session.stream is self:
                self._desk.sessions.detach(self._session, self, self._clock())
                self._desk.engine.withdraw(self._session.session_id)
            # Last: who is cancelled here, or waits for a reader that does not end, has let go of its name.
            await asyncio.gather(reading, return_exceptions=True)

    def drain(self, reconnect_after_s: float, reason: str) -> None:
        """Tells the client to go elsewhere."""
        drain = inference_pb2.Drain(reconnect_after=stamps.to_duration(reconnect_after_s), reason=reason)
        session_id = self._session.session_id if self._session else ""
        self._outbox.put_nowait(inference_pb2.ActResponse(session_id=session_id, drain=drain))

    async def finish(self, timeout_s: float) -> None:
        """Ends the stream when nothing is in flight; what still is after timeout_s is refused."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            for asked in tuple(self._in_flight.values()):
                self._settle(
                    asked, Unreachable("the server goes away before this chunk was made; open a session again"), 0.0
                )
        self._outbox.put_nowait(None)

    def end(self, error: ManyhandsError | None) -> None:
        """Ends the stream now, with error or well."""
        self._ending = error
        self._outbox.put_nowait(None)

    async def _read(self, requests: AsyncIterator[inference_pb2.ActRequest]) -> None:
        try:
            async for request in requests:
                while self._outbox.qsize() >= MAX_UNREAD:
                    self._read_by_client.clear()
                    await self._read_by_client.wait()
                received_s = self._clock()
                if (wait_s := self._pace.take(received_s)) > 0.0:
                    self._say_too_fast()
                    await asyncio.sleep(wait_s)
                self._next_request.came(received_s)
                try:
                    asked = self._take(request, received_s)
                except ManyhandsError as error:
                    self._refuse(request, error, {"total": self._clock() - received_s})
                    continue
                if not self._decoding:
                    self._prepare(asked)
                    continue
                if self._next is not None:
                    self._settle(self._next, Superseded(), 0.0)
                self._next = asked
            await self._idle.wait()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            # A stream that is gone cancels this task; what raises here is bytes that are no request.
            logger.info("a stream ends on bytes that cannot be read: %s", error)
            self._ending = InvalidInput("a message is no ActRequest", field="act_request")
        self._outbox.put_nowait(None)

    def _say_too_fast(self) -> None:
        if not self._said_too_fast:
            self._said_too_fast = True
            robot = self._session.robot_id if self._session is not None else "a robot without a session"
            most = self._desk.max_requests_hz
            logger.warning("%s sends more than %g requests a second (--max-requests-hz): they wait to be read", robot, most)

    def _take(self, request: inference_pb2.ActRequest, received_s: float) -> _Asked:
        """Checks that need no decoding."""
        session = self._session
        if session is None or session.session_id != request.session_id:
            asked_for = self._desk.sessions.get(request.session_id)
            if session is not None:
                raise InvalidInput("this stream is another session's; open a stream for each", field="session_id")
            self._attach(asked_for)
            session = asked_for
        else:
            self._desk.sessions.get(request.session_id)  # It may have been closed under the stream.
        if request.request_id <= session.last_request_id:
            raise Conflict(
                f"is {request.request_id}; ids grow, the last one was {session.last_request_id}", field="request_id"
            )
        session.last_request_id = request.request_id
        limit = self._desk.max_request_bytes(session)
        if request.ByteSize() > limit:
            raise InvalidInput(
                f"has {request.ByteSize()} bytes, this session's limit is {limit}; send only required_observations, in the "
                "robot's own or the model's size",
                field="observation",
            )
        asked = _Asked(session=session, request=request, received_s=received_s, deadline_s=received_s + deadline_s(request))
        self._in_flight[request.request_id] = asked
        self._idle.clear()
        return asked

    def _attach(self, session: Session) -> None:
        """Takes over from the session's stream, unless that was opened later: one that its robot has left may be heard of
        after the next one."""
        serving = session.stream
        if isinstance(serving, RobotStream) and serving is not self and 0 < self._number < serving._number:
            raise Conflict("another stream of this session took over", field="session_id")
        self._session = session
        older = self._desk.sessions.attach(session, self)
        if isinstance(older, RobotStream):
            older.end(Conflict("another stream of this session took over", field="session_id"))

    def _prepare(self, asked: _Asked) -> None:
        """Checks a request, tells the engine of it and has its pictures decoded: straight through, for each task that it
        would be handed to on its way is a turn of the loop."""
        self._decoding = True
        started_s, session = self._clock(), asked.session
        try:
            sent = self._checked(asked)
            if sent.prefix is not None:
                session.delay_steps = sent.delay_steps
            # First: what the engine makes of it takes longer than the pictures.
            if sent.sample.pictures:
                with_gate = self._is_trusted and sent.sample.is_quick
                self._gate = self._desk.engine.expect(session.model, sent.without_pictures(), with_gate=with_gate)
            side_by_side(
                self._desk.decoders,
                tuple(sent.sample.pictures.values()),
                lambda pictures: self._decoded(asked, sent, pictures, started_s),
                # Others would wait for it; alone, a robot waits for less.
                here=sent.sample.quick_picture if self._desk.num_in_flight <= 1 else None,
            )
        except Exception as error:
            self._failed(asked, error, started_s)

    def _decoded(self, asked: _Asked, sent: SentRow, pictures: list[Array] | BaseException, started_s: float) -> None:
        if self._is_over:
            self._give_up_gate()
            return
        if isinstance(pictures, BaseException):
            self._failed(asked, pictures, started_s)
            return
        decode_s = self._clock() - started_s
        try:
            if self._next is not None:
                self._settle(asked, Superseded(), decode_s)
            else:
                row = sent.row(pictures)
                self._submit(asked, row, decode_s)
                if asked.request.ask_subtask_for:
                    self._subtask.ask(asked.session, asked.request, row.sample)
        except Exception as error:  # The loop calls this: what comes out would leave the stream where it is.
            self._failed(asked, error, started_s)
            return
        self._prepare_next()

    def _failed(self, asked: _Asked, error: BaseException, started_s: float) -> None:
        if not isinstance(error, InvalidInput):
            logger.error("request %d of %s failed", asked.request.request_id, asked.session.robot_id, exc_info=error)
            error = InternalError("the server failed on this request")
        self._settle(asked, error, self._clock() - started_s)
        self._prepare_next()

    def _prepare_next(self) -> None:
        self._give_up_gate()
        self._decoding = False
        asked, self._next = self._next, None
        if asked is not None:
            self._prepare(asked)

    def _give_up_gate(self) -> None:
        """Where no row came to it: the device is not kept waiting."""
        gate, self._gate = self._gate, 0
        self._desk.engine.give_up(gate)

    def _checked(self, asked: _Asked) -> SentRow:
        session = asked.session
        served = self._desk.models[session.model]
        return check_row(
            asked.request,
            robot_fit=session.fit,
            model_spec=served.used_spec,
            horizon=served.horizon,
            model_action_size=served.model_action_size,
            # The session's own, not what load makes of it: a chunk depends on nothing but its request.
            default_execution_horizon=session.asked_interval_steps,
            shared=session.pictures,
        )

    def _rehearse_next(self) -> None:
        """Goes the way of the request that is about to come, with the last one, which was found good.

        Only for a robot that is alone: others keep everything warm, and would wait for it.
        """
        last = self._last_answered
        if last is None or self._is_over or self._desk.num_streams != 1 or self._desk.num_in_flight:
            return
        model, sent = last.session.model, self._checked(last)

        def decoded(pictures: list[Array] | BaseException) -> None:
            if not isinstance(pictures, BaseException) and not self._desk.num_in_flight:
                self._desk.engine.rehearse(model, sent.row(pictures))

        side_by_side(
            self._desk.decoders, tuple(sent.sample.pictures.values()), decoded, here=sent.sample.quick_picture
        )  # fmt: skip

    def _submit(self, asked: _Asked, row: Row, decode_s: float) -> None:
        def done(outcome: Outcome) -> None:
            if threading.get_ident() == self._loop_thread:
                self._settle(asked, outcome, decode_s)
                return
            try:
                self._loop.call_soon_threadsafe(self._settle, asked, outcome, decode_s)
            except RuntimeError:  # The loop is closed: nobody listens any more.
                logger.debug("request %d has no listener", asked.request.request_id)

        def rehearse(rehearsal: Rehearsal) -> None:
            if threading.get_ident() == self._loop_thread and asked.request.request_id in self._in_flight:
                self._response(asked, rehearsal.answer, self._stage_s(asked, rehearsal.answer, decode_s)).SerializeToString()

        self._desk.engine.submit(
            owner=asked.session.session_id,
            request_id=asked.request.request_id,
            arrived_s=self._clock(),
            deadline_s=asked.deadline_s,
            job=Job(model=asked.session.model, row=row, done=done, rehearse=rehearse, gate=self._gate),
        )
        self._gate = 0

    def _settle(self, asked: _Asked, outcome: Outcome, decode_s: float) -> None:
        """Answers a request, once."""
        if self._in_flight.pop(asked.request.request_id, None) is None:
            return
        if isinstance(outcome, Answer):
            self._answer(asked, outcome, decode_s)
            self._last_answered = asked if self._desk.num_streams == 1 else None
            self._loop.call_soon(self._next_request.answered)
        else:
            self._refuse(asked.request, outcome, {"decode": decode_s, "total": self._clock() - asked.received_s})
        if not self._in_flight:
            self._idle.set()

    def _answer(self, asked: _Asked, answer: Answer, decode_s: float) -> None:
        self._is_trusted = True
        stage_s = self._stage_s(asked, answer, decode_s)
        # Sent also when late: it costs nothing any more, and the robot judges its age.
        self._outbox.put_nowait(self._response(asked, answer, stage_s))
        is_late = asked.received_s + stage_s["total"] > asked.deadline_s
        # Behind the answer, which the stream sends in its next step: nobody waits for what operators read.
        self._loop.call_soon(self._note, asked.session, asked, answer, stage_s, is_late)

    def _stage_s(self, asked: _Asked, answer: Answer, decode_s: float) -> dict[str, float]:
        return {
            "decode": decode_s,
            "queue": answer.queue_s,
            "prefix": answer.prefix_s,
            "sample": answer.sample_s,
            "postprocess": answer.postprocess_s,
            "total": self._clock() - asked.received_s,
        }

    def _response(self, asked: _Asked, answer: Answer, stage_s: Mapping[str, float]) -> inference_pb2.ActResponse:
        return responses.answered(
            asked.request,
            answer,
            stage_s,
            action_size=asked.session.fit.action_size,
            replan_interval_steps=self._desk.replan_interval_steps(asked.session),
        )

    def _note(self, session: Session, asked: _Asked, answer: Answer, stage_s: Mapping[str, float], is_late: bool) -> None:
        self._desk.notes.answered(session, asked.request, answer, stage_s, is_late=is_late)

    def _refuse(
        self, request: inference_pb2.ActRequest, why: ManyhandsError | Superseded, stage_s: Mapping[str, float]
    ) -> None:
        self._is_trusted = False
        refusal, session = responses.refusal(why), self._session
        self._desk.notes.refused(session, request, refusal, stage_s, self._clock())
        version = self._desk.models[session.model].version if session is not None else None
        self._outbox.put_nowait(responses.refused(request, refusal, version))
