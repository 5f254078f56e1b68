"""Text from a policy's language head, token by token, beside the chunks."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Executor

import torch

from manyhands import stamps
from manyhands.common.v1 import common_pb2
from manyhands.errors import InvalidInput, Refused, TooLate
from manyhands.inference.v1 import inference_pb2
from policies.policy import TextKind, TextRequest

from .models import ServedModel
from .prepare import MAX_DEADLINE_S, prepare_sample
from .sessions import Session

MAX_TEXT_CHARACTERS = 8192
MAX_NEW_TOKENS = 1024
DEFAULT_DEADLINE_S = 10.0

_KINDS: Mapping[int, TextKind] = {
    inference_pb2.TEXT_KIND_SUBTASK: TextKind.SUBTASK,
    inference_pb2.TEXT_KIND_MEMORY: TextKind.MEMORY,
    inference_pb2.TEXT_KIND_INTERJECTION: TextKind.INTERJECTION,
    inference_pb2.TEXT_KIND_VISUAL_QUESTION: TextKind.VISUAL_QUESTION,
}


def text_request(request: inference_pb2.GenerateRequest) -> TextRequest:
    """The checked question; InvalidInput names the field."""
    if request.kind not in _KINDS:
        raise InvalidInput(f"{request.kind} is not one of {', '.join(kind.value for kind in TextKind)}", field="kind")
    for field, text in (("user_text", request.user_text), ("previous_text", request.previous_text)):
        if len(text) > MAX_TEXT_CHARACTERS:
            raise InvalidInput(f"has {len(text)} characters, at most {MAX_TEXT_CHARACTERS}", field=field)
    if not 0 <= request.max_new_tokens <= MAX_NEW_TOKENS:
        raise InvalidInput(f"is {request.max_new_tokens}; 0 to {MAX_NEW_TOKENS}", field="max_new_tokens")
    if not 0.0 <= request.temperature <= 10.0:
        raise InvalidInput(f"is {request.temperature}; 0 to 10", field="temperature")
    if not 0.0 <= request.top_p <= 1.0:
        raise InvalidInput(f"is {request.top_p}; 0 to 1", field="top_p")
    return TextRequest(
        kind=_KINDS[request.kind],
        user_text=request.user_text,
        previous_text=request.previous_text,
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
    )


async def generate(
    request: inference_pb2.GenerateRequest, served: ServedModel, session: Session, writers: Executor
) -> AsyncIterator[inference_pb2.GenerateResponse]:
    """Tokens as they come; the policy runs on a thread of writers, which stops when nobody listens any more.

    Raises:
        Refused: The model has no text head.
        InvalidInput: Names the field.
        TooLate: The request's deadline passed before the text was finished.
    """
    if not served.policy.has_text_head:
        raise Refused(f"{served.name!r} has no text head; ListModels says which models have one", field="model")
    asked = text_request(request)
    sample = prepare_sample(request.observation.values, request.task, robot_fit=session.fit, model_spec=served.used_spec)
    allowed_s = stamps.to_seconds(request.deadline) if request.HasField("deadline") else DEFAULT_DEADLINE_S
    if not 0.0 < allowed_s <= MAX_DEADLINE_S:
        raise InvalidInput(f"is {allowed_s:g} s; it must be > 0 and at most {MAX_DEADLINE_S:g} s", field="deadline")
    until_s = time.monotonic() + allowed_s
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[str | BaseException | None] = asyncio.Queue()
    nobody_listens = threading.Event()
    versions: queue.SimpleQueue[common_pb2.PolicyVersion] = queue.SimpleQueue()

    def write() -> None:
        last: BaseException | None = None
        try:
            with served.borrow() as (policy, version), torch.inference_mode():
                versions.put(version)
                device = next(policy.parameters()).device
                for piece in policy.generate([sample], asked, device):
                    if nobody_listens.is_set():
                        return
                    if time.monotonic() > until_s:
                        raise TooLate(f"the text was not finished within {allowed_s:g} s", field="deadline")
                    loop.call_soon_threadsafe(pieces.put_nowait, piece)
        except Exception as error:
            last = error
        loop.call_soon_threadsafe(pieces.put_nowait, last)

    writing = loop.run_in_executor(writers, write)
    text, count = "", 0
    try:
        while isinstance(piece := await pieces.get(), str):
            text, count = text + piece, count + 1
            yield inference_pb2.GenerateResponse(request_id=request.request_id, text=piece, token_count=count)
        if piece is not None:
            raise piece
        yield inference_pb2.GenerateResponse(
            request_id=request.request_id,
            token_count=count,
            finished=True,
            full_text=text,
            version=versions.get_nowait(),
        )
    finally:
        nobody_listens.set()
        writing.cancel()
