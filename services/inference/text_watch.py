"""What operators see of a question to a text head: counts, time to the first token, and a trace."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from manyhands.errors import ManyhandsError
from manyhands.inference.v1 import inference_pb2

from . import operator_metrics
from .sessions import Session
from .tracing import RequestTrace, Traces


class TextWatch:
    """One question."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self.first_token_s: float | None = None
        self.num_tokens = 0
        self.is_whole = False

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def heard(self, response: inference_pb2.GenerateResponse) -> None:
        if response.finished:
            self.is_whole = True
        elif self.first_token_s is None:
            self.first_token_s = self.elapsed_s
        self.num_tokens = response.token_count


@contextlib.contextmanager
def watching_text(request: inference_pb2.GenerateRequest, session: Session, traces: Traces | None) -> Iterator[TextWatch]:
    """Inside, the question is answered; tell the watch what is sent."""
    watch = TextWatch()
    outcome, message = "left", ""  # By whoever asked: nothing is raised then but the end of the call.
    try:
        yield watch
    except ManyhandsError as error:
        outcome, message = "refused", str(error)
        raise
    finally:
        if watch.is_whole:
            outcome = "whole"
        metrics = operator_metrics.of_model(session.model)
        metrics.text(request.kind, outcome, watch.num_tokens)
        if watch.first_token_s is not None:
            metrics.first_token(watch.first_token_s)
        if traces is not None:
            traces.request(_trace(request, session, watch, outcome, message))


def _trace(
    request: inference_pb2.GenerateRequest, session: Session, watch: TextWatch, outcome: str, message: str
) -> RequestTrace:
    total_s = watch.elapsed_s
    first_s = watch.first_token_s
    return RequestTrace(
        name="text",
        session_id=session.session_id,
        robot_id=session.robot_id,
        model=session.model,
        request_id=request.request_id,
        total_s=total_s,
        stages_s={} if first_s is None else {"first token": first_s, "more tokens": total_s - first_s},
        refusal="" if outcome == "whole" else outcome,
        message=message,
        is_error=outcome == "refused",
        details={"text_kind": operator_metrics.text_kind(request.kind), "tokens": watch.num_tokens},
    )
