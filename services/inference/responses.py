"""What a robot's stream says of what became of its requests."""

from __future__ import annotations

from collections.abc import Mapping

from manyhands import codec, stamps
from manyhands.common.v1 import common_pb2
from manyhands.errors import Conflict, InvalidInput, ManyhandsError, NotFound, Overloaded, TooLate, Unreachable
from manyhands.inference.v1 import inference_pb2

from .engine_port import Answer, Superseded

_REASONS: dict[type[ManyhandsError], inference_pb2.RefusalReason.ValueType] = {
    InvalidInput: inference_pb2.REFUSAL_REASON_INVALID,
    TooLate: inference_pb2.REFUSAL_REASON_DEADLINE,
    NotFound: inference_pb2.REFUSAL_REASON_UNKNOWN_SESSION,
    Conflict: inference_pb2.REFUSAL_REASON_REPLAYED,
    Overloaded: inference_pb2.REFUSAL_REASON_OVERLOADED,
    Unreachable: inference_pb2.REFUSAL_REASON_UNAVAILABLE,
}


def answered(
    request: inference_pb2.ActRequest,
    answer: Answer,
    stage_s: Mapping[str, float],
    *,
    action_size: int,
    replan_interval_steps: int,
) -> inference_pb2.ActResponse:
    """A chunk.

    Args:
        action_size: The robot's; it has the first of the model's action elements.
        replan_interval_steps: What the robot is asked for from now on.
    """
    times = {stage: stamps.to_duration(seconds) for stage, seconds in stage_s.items()}
    chunk = inference_pb2.Chunk(
        actions=codec.encode_tensor(answer.actions[:, :action_size]),
        model_actions=codec.encode_tensor(answer.model_actions),
        replan_interval_steps=replan_interval_steps,
    )
    return inference_pb2.ActResponse(
        session_id=request.session_id,
        request_id=request.request_id,
        version=answer.version,
        request_sent=request.sent,
        times=inference_pb2.StageTimes(**times, batch_size=answer.batch_size),
        chunk=chunk,
    )


def refusal(why: ManyhandsError | Superseded) -> inference_pb2.Refusal:
    if isinstance(why, Superseded):
        return inference_pb2.Refusal(
            reason=inference_pb2.REFUSAL_REASON_SUPERSEDED, message="a newer observation of this robot came first"
        )
    return inference_pb2.Refusal(
        reason=_REASONS.get(type(why), inference_pb2.REFUSAL_REASON_INTERNAL),
        field=why.field,
        message=str(why),
        retry_after=stamps.to_duration(why.retry_after_s) if why.retry_after_s is not None else None,
    )


def refused(
    request: inference_pb2.ActRequest, why: inference_pb2.Refusal, version: common_pb2.PolicyVersion | None
) -> inference_pb2.ActResponse:
    """version: Of the weights that serve; None where it is not known whom the request was for."""
    return inference_pb2.ActResponse(
        session_id=request.session_id,
        request_id=request.request_id,
        version=version,
        request_sent=request.sent,
        refusal=why,
    )
