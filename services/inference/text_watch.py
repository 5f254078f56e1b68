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
    """One question, from now on.

    Args:
        request_id: As its client names it.
        traces: None: none are made.
    """

    def __init__(
        self, session: Session, kind: inference_pb2.TextKind.ValueType, request_id: str, traces: Traces | None
    ) -> None:
        self._session = session
        self._kind = kind
        self._request_id = request_id
        self._traces = traces
        self._started_s = time.monotonic()
        self._first_token_s: float | None = None
        self._num_tokens = 0
        self._is_whole = False

    def token(self) -> None:
        if self._first_token_s is None:
            self._first_token_s = time.monotonic() - self._started_s
        self._num_tokens += 1

    def whole(self) -> None:
        """The answer is complete."""
        self._is_whole = True

    def end(self, why: ManyhandsError | None = None) -> None:
        """Once. Not whole and without a reason, it was left by whoever asked."""
        outcome = "whole" if self._is_whole else "left" if why is None else "refused"
        metrics = operator_metrics.of_model(self._session.model)
        metrics.text(self._kind, outcome, self._num_tokens)
        if self._first_token_s is not None:
            metrics.first_token(self._first_token_s)
        if self._traces is not None:
            self._traces.request(self._trace(outcome, "" if why is None else str(why)))

    def _trace(self, outcome: str, message: str) -> RequestTrace:
        total_s = time.monotonic() - self._started_s
        first_s = self._first_token_s
        return RequestTrace(
            name="text",
            session_id=self._session.session_id,
            robot_id=self._session.robot_id,
            model=self._session.model,
            request_id=self._request_id,
            total_s=total_s,
            stages_s={} if first_s is None else {"first token": first_s, "more tokens": total_s - first_s},
            refusal="" if outcome == "whole" else outcome,
            message=message,
            is_error=outcome == "refused",
            details={"text_kind": operator_metrics.text_kind(self._kind), "tokens": self._num_tokens},
        )


@contextlib.contextmanager
def watching_text(request: inference_pb2.GenerateRequest, session: Session, traces: Traces | None) -> Iterator[TextWatch]:
    """Inside, the question is answered; tell the watch of its tokens and its end."""
    watch = TextWatch(session, request.kind, request.request_id, traces)
    why: ManyhandsError | None = None
    try:
        yield watch
    except ManyhandsError as error:
        why = error
        raise
    finally:
        watch.end(why)
