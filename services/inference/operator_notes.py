"""What is written down of a request when it is over: counters, metrics, the log of refusals, a trace."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from manyhands.errors import ManyhandsError
from manyhands.inference.v1 import inference_pb2

from . import responses
from .engine_port import Answer
from .operator_metrics import reason_word
from .sessions import Session
from .stats import ServiceStats
from .tracing import RequestTrace, Traces

logger = logging.getLogger(__name__)

_NO_ERRORS = (inference_pb2.REFUSAL_REASON_UNSPECIFIED, inference_pb2.REFUSAL_REASON_SUPERSEDED)


class OperatorNotes:
    """traces None: none are made."""

    def __init__(self, stats: ServiceStats, traces: Traces | None = None) -> None:
        self._stats = stats
        self.traces = traces

    def answered(
        self,
        session: Session,
        request: inference_pb2.ActRequest,
        answer: Answer,
        stage_s: Mapping[str, float],
        *,
        is_late: bool,
    ) -> None:
        self._stats.chunk(session.model, stage_s, batch_size=answer.batch_size, is_late=is_late)
        session.chunk_count += 1
        session.latencies_s.append(stage_s["total"])
        session.missed_deadline_count += is_late
        if self.traces is not None:
            details = {"version": answer.version.number, "batch_size": answer.batch_size, "is_late": is_late}
            self.traces.request(_trace(session, request, stage_s, inference_pb2.Refusal(), details))

    def refused(
        self,
        session: Session | None,
        request: inference_pb2.ActRequest,
        refusal: inference_pb2.Refusal,
        stage_s: Mapping[str, float],
        now_s: float,
    ) -> None:
        """session None: it is not known."""
        self._stats.refusal(session.model if session is not None else None, refusal.reason)
        if session is None:
            return
        session.refused_count += 1
        session.missed_deadline_count += refusal.reason == inference_pb2.REFUSAL_REASON_DEADLINE
        if self.traces is not None:
            self.traces.request(_trace(session, request, stage_s, refusal, {}))
        # Being superseded is how a busy server works: counted, and no more.
        if refusal.reason == inference_pb2.REFUSAL_REASON_SUPERSEDED:
            return
        _log(session, refusal, request.request_id, now_s)

    def question_refused(self, session: Session, why: ManyhandsError, now_s: float) -> None:
        """A question by Generate; of chunks nothing is counted."""
        _log(session, responses.refusal(why), None, now_s)


def _log(session: Session, refusal: inference_pb2.Refusal, request_id: int | None, now_s: float) -> None:
    """request_id: None for a question, whose id is its client's own."""
    of_question = request_id is None
    num_logged = session.refusals.add(
        reason=refusal.reason,
        field=refusal.field,
        message=f"a question: {refusal.message}" if of_question else refusal.message,
        request_id=request_id or 0,
        now_s=now_s,
        of_question=of_question,
    )
    if num_logged:
        more = f" ({num_logged} such since the last line)" if num_logged > 1 else ""
        what = "a question" if of_question else f"request {request_id}"
        logger.info("%s of %s is refused: %s%s", what, session.robot_id, refusal.message, more)


def _trace(
    session: Session,
    request: inference_pb2.ActRequest,
    stage_s: Mapping[str, float],
    refusal: inference_pb2.Refusal,
    details: Mapping[str, int | float | str],
) -> RequestTrace:
    return RequestTrace(
        name="chunk",
        session_id=session.session_id,
        robot_id=session.robot_id,
        model=session.model,
        request_id=str(request.request_id),
        total_s=stage_s["total"],
        stages_s={stage: seconds for stage, seconds in stage_s.items() if stage != "total"},
        refusal=reason_word(refusal.reason) if refusal.reason else "",
        message=refusal.message,
        is_error=refusal.reason not in _NO_ERRORS,
        details=details,
    )
