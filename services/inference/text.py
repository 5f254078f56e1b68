"""Questions to a policy's language head: what clients ask, checked, and the answer token by token, beside the chunks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from manyhands import stamps
from manyhands.errors import InvalidInput, Refused
from manyhands.inference.v1 import inference_pb2

from .engine_port import EnginePort, Model, Question, TextEnd
from .prepare import MAX_DEADLINE_S, prepare_sample
from .sessions import Session

MAX_TEXT_CHARACTERS = 8192
MAX_NEW_TOKENS = 1024
DEFAULT_DEADLINE_S = 10.0

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


async def generate(
    request: inference_pb2.GenerateRequest, model: Model, session: Session, engine: EnginePort
) -> AsyncIterator[inference_pb2.GenerateResponse]:
    """Tokens as they come; the engine stops when nobody listens any more.

    Raises:
        Refused: The model has no text head.
        InvalidInput: Names the field.
        TooLate: The request's deadline passed before the text was finished.
        Unreachable: The engine is away for a moment.
    """
    question = question_of(request, model, session)
    loop = asyncio.get_running_loop()
    heard: asyncio.Queue[str | TextEnd] = asyncio.Queue()

    def hear(piece: str | TextEnd) -> None:
        try:
            loop.call_soon_threadsafe(heard.put_nowait, piece)
        except RuntimeError:  # The loop is closed: nobody listens any more.
            pass

    stop_listening = engine.ask(question, hear)
    text, count = "", 0
    try:
        while isinstance(piece := await heard.get(), str):
            text, count = text + piece, count + 1
            yield inference_pb2.GenerateResponse(request_id=request.request_id, text=piece, token_count=count)
        if piece.error is not None:
            raise piece.error
        yield inference_pb2.GenerateResponse(
            request_id=request.request_id, token_count=count, finished=True, full_text=text, version=piece.version
        )
    finally:
        stop_listening()
