"""A robot's question for its next subtask, asked beside its chunks: one at a time, judged here, and never waited for.

Lives on the event loop. Nothing of it outlives the stream that asked: what a robot acts on is in its requests (rule 4).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from manyhands import subtasks
from manyhands.errors import ManyhandsError, Refused, TooLate
from manyhands.inference.v1 import inference_pb2

from . import operator_metrics
from .engine_port import EnginePort, Observed, Question, TextEnd
from .sessions import Session
from .text_watch import TextWatch
from .tracing import Traces

logger = logging.getLogger(__name__)

# A subtask for what was seen longer ago is not worth having; the robot asks again.
DEADLINE_S = 5.0
# An engine says by itself that a text is late; one that says nothing must not keep the robot from asking again.
GRACE_S = 1.0
# What is shown of an answer that is no instruction.
SHOWN_CHARACTERS = 80


class SubtaskQuestion:
    """The question that one stream has in progress, if any.

    Args:
        tell: Takes each answer, on the loop.
        clock: That session.question_rate counts by.
        traces: Where questions are traced to, if anywhere.
    """

    def __init__(
        self,
        engine: EnginePort,
        tell: Callable[[inference_pb2.ActResponse], None],
        clock: Callable[[], float] = time.monotonic,
        *,
        traces: Traces | None = None,
    ) -> None:
        self._engine = engine
        self._traces = traces
        self._tell = tell
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        # The answer to be, without what holds pictures.
        self._asking: inference_pb2.ActResponse | None = None
        self._pieces: list[str] = []
        self._watch: TextWatch | None = None
        self._stop_listening: Callable[[], None] = _nothing
        self._give_up: asyncio.TimerHandle | None = None
        self._said_dropped = False

    def ask(self, session: Session, request: inference_pb2.ActRequest, observed: Observed) -> None:
        """Asks about what the request's chunk was asked from.

        Args:
            observed: The request's observation, decoded; its task is what the chunk acts on.
        """
        if self._asking is not None:
            if not self._said_dropped:
                self._said_dropped = True
                logger.info(
                    "%s asks for a subtask while its last question is in progress: dropped, as others will be; it should "
                    "ask less often",
                    session.robot_id,
                )
            return
        model = self._engine.models[session.model]
        self._asking = asking = inference_pb2.ActResponse(
            session_id=session.session_id, request_id=request.request_id, request_sent=request.sent
        )
        self._pieces = []
        self._watch = TextWatch(session, inference_pb2.TEXT_KIND_SUBTASK, str(request.request_id), self._traces)
        if not model.has_text_head:
            self._finish(session, TextEnd(error=Refused(f"{model.name!r} has no text head", field="ask_subtask_for")))
            return
        last_subtask = request.task if request.task != request.ask_subtask_for else ""
        question = Question(
            model=model.name,
            owner=session.session_id,
            sample=Observed(observation=observed.observation, task=request.ask_subtask_for),
            kind=inference_pb2.TEXT_KIND_SUBTASK,
            user_text="",
            previous_text=last_subtask,
            max_new_tokens=0,
            temperature=0.0,
            top_p=0.0,
            until_s=time.monotonic() + DEADLINE_S,
            allowed_s=DEADLINE_S,
        )

        def hear(piece: str | TextEnd) -> None:
            try:
                self._loop.call_soon_threadsafe(self._hear, session, asking, piece)
            except RuntimeError:  # The loop is closed: nobody listens any more.
                logger.debug("the subtask of request %d has no listener", request.request_id)

        late = TextEnd(error=TooLate(f"no subtask came within {DEADLINE_S:g} s", field="deadline"))
        self._give_up = self._loop.call_later(DEADLINE_S + GRACE_S, self._hear, session, asking, late)
        self._stop_listening = self._engine.ask(question, hear)

    def stop(self) -> None:
        """The stream is over: nobody hears of its question."""
        self._end()

    def _hear(self, session: Session, asking: inference_pb2.ActResponse, piece: str | TextEnd) -> None:
        if self._asking is not asking:
            return
        if isinstance(piece, TextEnd):
            self._finish(session, piece)
        else:
            if not self._pieces:  # Not before: one that the engine refuses takes nothing of the device.
                session.question_rate.asked(self._clock())
            session.question_rate.heard(self._clock())
            self._pieces.append(piece)
            assert self._watch is not None
            self._watch.token()

    def _finish(self, session: Session, end: TextEnd) -> None:
        answer = self._asking
        assert answer is not None
        assert self._watch is not None
        if end.error is None:
            self._watch.whole()
        subtask = judged("".join(self._pieces), end.error)
        answer.subtask.CopyFrom(subtask)
        answer.version.CopyFrom(end.version or self._engine.models[session.model].version)
        self._end(end.error)
        if subtask.accepted:
            session.subtask_count += 1
            session.last_subtask = subtask.text
        else:
            session.refused_subtask_count += 1
            operator_metrics.of_model(session.model).subtask_refused()
            logger.info("subtask for request %d of %s is refused: %s", answer.request_id, session.robot_id, subtask.reason)
        self._tell(answer)

    def _end(self, why: ManyhandsError | None = None) -> None:
        self._asking = None
        if self._watch is not None:
            self._watch.end(why)
            self._watch = None
        stop_listening, self._stop_listening = self._stop_listening, _nothing
        stop_listening()
        if self._give_up is not None:
            self._give_up.cancel()
            self._give_up = None


def judged(answer: str, error: ManyhandsError | None) -> inference_pb2.Subtask:
    """What a robot is told of an answer; noise is quoted in the reason only, where nothing acts on it."""
    if error is not None:
        return inference_pb2.Subtask(reason=str(error))
    text = subtasks.instruction(answer)
    if text is None:
        return inference_pb2.Subtask(reason=f"no instruction: {answer[:SHOWN_CHARACTERS]!r}")
    return inference_pb2.Subtask(text=text, accepted=True)


def _nothing() -> None:
    pass
