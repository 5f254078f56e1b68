"""GetStatus: what an operator sees, as the contract has it. Nothing is decided here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from manyhands import stamps
from manyhands.inference.v1 import inference_pb2

from . import capacity
from .engine_port import EnginePort
from .refusals import Burst
from .sessions import Session
from .stats import ServiceStats, p50_p99


@dataclass(frozen=True, kw_only=True)
class ModelUse:
    """One model's load.

    Attributes:
        possible_per_s: Chunks a second without text, as the engine says; None where nothing ran.
        text_share: Of the device, 0 to 1.
        asked_per_s: Chunks a second.
    """

    model: str
    possible_per_s: float | None
    text_share: float
    asked_per_s: float
    session_count: int


def status(
    *,
    sessions: Sequence[Session],
    stats: ServiceStats,
    engine: EnginePort,
    uses: Sequence[ModelUse],
    models: Sequence[inference_pb2.Model],
    now_s: float,
    started_s: float,
) -> inference_pb2.GetStatusResponse:
    load = engine.load()
    return inference_pb2.GetStatusResponse(
        sessions=[_session_status(session, now_s) for session in sessions],
        stages=[
            inference_pb2.StageLatency(stage=stage, p50=stamps.to_duration(p50), p99=stamps.to_duration(p99))
            for stage, (p50, p99) in stats.percentiles().items()
        ],
        swaps=[
            inference_pb2.SwapRecord(
                version=swap.version,
                accepted=swap.accepted,
                reason=swap.reason,
                pause=stamps.to_duration(swap.pause_s),
                ago=stamps.to_duration(max(0.0, now_s - swap.at_s)),
            )
            for swap in engine.swaps()
        ],
        models=models,
        uptime=stamps.to_duration(now_s - started_s),
        chunk_count=stats.chunk_count,
        refused_count=stats.refused_count,
        missed_deadline_count=stats.missed_deadline_count,
        loads=[
            inference_pb2.ModelLoad(
                model=use.model,
                possible_chunks_per_s=use.possible_per_s or 0.0,
                usable_chunks_per_s=capacity.usable_per_s(use.possible_per_s or 0.0, use.text_share),
                asked_chunks_per_s=use.asked_per_s,
                session_count=use.session_count,
                pinned=engine.is_pinned(use.model),
                text_share=use.text_share,
            )
            for use in uses
        ],
        waiting_count=load.waiting_count if load is not None else 0,
        device_memory_used_bytes=load.memory_used_bytes if load is not None else 0,
        device_memory_total_bytes=load.memory_total_bytes if load is not None else 0,
        engine_restart_count=engine.restart_count,
    )


def _session_status(session: Session, now_s: float) -> inference_pb2.SessionStatus:
    p50_s, p99_s = p50_p99(session.latencies_s)
    return inference_pb2.SessionStatus(
        session_id=session.shown_id,
        robot_id=session.robot_id,
        model=session.model,
        chunk_count=session.chunk_count,
        refused_count=session.refused_count,
        missed_deadline_count=session.missed_deadline_count,
        latency_p50=stamps.to_duration(p50_s),
        latency_p99=stamps.to_duration(p99_s),
        last_refusal=session.refusals.last_message,
        subtask_count=session.subtask_count,
        refused_subtask_count=session.refused_subtask_count,
        last_subtask=session.last_subtask,
        connected=session.stream is not None,
        refusals=[_refusal_record(burst, now_s) for burst in session.refusals],
    )


def _refusal_record(burst: Burst, now_s: float) -> inference_pb2.RefusalRecord:
    return inference_pb2.RefusalRecord(
        reason=inference_pb2.RefusalReason.ValueType(burst.reason),
        field=burst.field,
        message=burst.message,
        count=burst.count,
        first_ago=stamps.to_duration(max(0.0, now_s - burst.first_s)),
        last_ago=stamps.to_duration(max(0.0, now_s - burst.last_s)),
        last_request_id=burst.last_request_id,
    )
