"""Questions to a policy's language head: what clients ask, checked, and the answer token by token, beside the chunks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor

from manyhands import stamps
from manyhands.errors import InvalidInput, ManyhandsError, Overloaded, Refused, TooLate
from manyhands.inference.v1 import inference_pb2

from .engine_port import EnginePort, Model, Question, TextEnd
from .prepare import MAX_DEADLINE_S, prepare_sample
from .sessions import Session

MAX_TEXT_CHARACTERS = 8192
MAX_NEW_TOKENS = 1024
# Of one robot at once, each with its pictures.
MAX_QUESTIONS = 8
DEFAULT_DEADLINE_S = 10.0
# The engine says by itself that a text is late; one that hangs says nothing.
ENGINE_SLACK_S = 0.25

_KINDS = {
    kind: inference_pb2.TextKind.Name(kind).removeprefix("TEXT_KIND_").lower()
    for kind in inference_pb2.TextKind.values()
    if kind != inference_pb2.TEXT_KIND_UNSPECIFIED
}


def question_of(request: inference_pb2.GenerateRequest, model: Model, session: Session) -> Question:
    """The checked question.

    Raises:
        Refused: The model has no text head.
        InvalidInput: Names the field.
    """
    if not model.has_text_head:
        raise Refused(f"{model.name!r} has no text head; ListModels says which models have one", field="model")
    if request.kind not in _KINDS:
        raise InvalidInput(f"{request.kind} is not one of {', '.join(_KINDS.values())}", field="kind")
    for field, text in (("user_text", request.user_text), ("previous_text", request.previous_text)):
        if len(text) > MAX_TEXT_CHARACTERS:
            raise InvalidInput(f"has {len(text)} characters, at most {MAX_TEXT_CHARACTERS}", field=field)
    if not 0 <= request.max_new_tokens <= MAX_NEW_TOKENS:
        raise InvalidInput(f"is {request.max_new_tokens}; 0 to {MAX_NEW_TOKENS}", field="max_new_tokens")
    if not 0.0 <= request.temperature <= 10.0:
        raise InvalidInput(f"is {request.temperature}; 0 to 10", field="temperature")
    if not 0.0 <= request.top_p <= 1.0:
        raise InvalidInput(f"is {request.top_p}; 0 to 1", field="top_p")
    sample = prepare_sample(request.observation.values, request.task, robot_fit=session.fit, model_spec=model.used_spec)
    allowed_s = stamps.to_seconds(request.deadline) if request.HasField("deadline") else DEFAULT_DEADLINE_S
    if not 0.0 < allowed_s <= MAX_DEADLINE_S:
        raise InvalidInput(f"is {allowed_s:g} s; it must be > 0 and at most {MAX_DEADLINE_S:g} s", field="deadline")
    return Question(
        model=model.name,
        owner=session.session_id,
        sample=sample,
        kind=request.kind,
        user_text=request.user_text,
        previous_text=request.previous_text,
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        until_s=time.monotonic() + allowed_s,
        allowed_s=allowed_s,
    )


class Questions:
    """Questions that are being answered, so that a session that ends, or the server, can end them with its own words."""

    def __init__(self) -> None:
        self._listening: dict[asyncio.Queue[str | TextEnd], str] = {}  # To the session that asked.
        self._none = asyncio.Event()
        self._none.set()

    def begin(self, heard: asyncio.Queue[str | TextEnd], session_id: str) -> None:
        self._listening[heard] = session_id
        self._none.clear()

    def end(self, heard: asyncio.Queue[str | TextEnd]) -> None:
        self._listening.pop(heard, None)
        if not self._listening:
            self._none.set()

    async def all_answered(self) -> None:
        await self._none.wait()

    def end_of(self, session_id: str, error: ManyhandsError) -> None:
        for heard, asked_by in self._listening.items():
            if asked_by == session_id:
                heard.put_nowait(TextEnd(error=error))

    def end_all(self, error: ManyhandsError) -> None:
        for heard in self._listening:
            heard.put_nowait(TextEnd(error=error))


async def generate(
    request: inference_pb2.GenerateRequest,
    model: Model,
    session: Session,
    engine: EnginePort,
    questions: Questions,
    decoders: Executor,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[inference_pb2.GenerateResponse]:
    """Tokens as they come; the engine stops when nobody listens any more.

    Args:
        session: Counts this question already.
        decoders: Where pictures are decoded, so that streams do not wait for it.
        clock: That session.question_rate counts by.

    Raises:
        Overloaded: The session has too many unanswered questions.
        NotFound: The session ended.
        Refused: The model has no text head.
        InvalidInput: Names the field.
        TooLate: The request's deadline passed before the text was finished.
        Unreachable: The engine is away for a moment.
    """
    if session.num_questions > MAX_QUESTIONS:
        raise Overloaded(
            f"{MAX_QUESTIONS} questions of this session wait for their answers, which is the limit; wait for one",
            field="session_id",
            retry_after_s=1.0,
        )
    loop = asyncio.get_running_loop()
    heard: asyncio.Queue[str | TextEnd] = asyncio.Queue()

    def hear(piece: str | TextEnd) -> None:
        try:
            loop.call_soon_threadsafe(heard.put_nowait, piece)
        except RuntimeError:  # The loop is closed: nobody listens any more.
            pass

    questions.begin(heard, session.session_id)
    stop_listening: Callable[[], None] = _nothing
    text, count = "", 0
    try:
        question = await loop.run_in_executor(decoders, question_of, request, model, session)
        stop_listening = engine.ask(question, hear)
        while isinstance(piece := await _next_piece(heard, question), str):
            if count == 0:  # Not before: one that the engine refuses takes nothing of the device.
                session.question_rate.asked(clock())
            text, count = text + piece, count + 1
            session.question_rate.heard(clock())
            yield inference_pb2.GenerateResponse(request_id=request.request_id, text=piece, token_count=count)
        if piece.error is not None:
            raise piece.error
        yield inference_pb2.GenerateResponse(
            request_id=request.request_id, token_count=count, finished=True, full_text=text, version=piece.version
        )
    finally:
        questions.end(heard)
        stop_listening()


async def _next_piece(heard: asyncio.Queue[str | TextEnd], question: Question) -> str | TextEnd:
    if not heard.empty():
        return heard.get_nowait()
    left_s = question.until_s + ENGINE_SLACK_S - time.monotonic()
    try:
        return await asyncio.wait_for(heard.get(), max(0.0, left_s))
    except TimeoutError:
        raise TooLate(f"the text was not finished within {question.allowed_s:g} s", field="deadline") from None


def _nothing() -> None:
    """The engine was not asked yet."""
