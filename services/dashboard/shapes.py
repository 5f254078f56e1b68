"""Messages of the contracts as the JSON of the page. Pure: no connections, no clocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from manyhands import codec, stamps
from manyhands.actor.v1 import actor_pb2
from manyhands.common.v1 import common_pb2
from manyhands.dataset.v1 import dataset_pb2
from manyhands.inference.v1 import inference_pb2
from manyhands.learner.v1 import learner_pb2
from manyhands.robot.v1 import robot_pb2

from .feed import Json

STAGES = ("capture", "network", "queue", "compute")


def number(value: float) -> float | None:
    """JSON has no NaN and no infinity; six digits are more than a plot shows."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def milliseconds(duration: object) -> float:
    return round(stamps.to_seconds(duration) * 1000, 3)  # type: ignore[arg-type]


def label(enum: Any, prefix: str, value: int) -> str:
    """ "ROBOT_MODE_EMERGENCY_STOP" as "emergency stop"; a number this version has no name for stays a number."""
    if value not in enum.values():
        return str(value)
    name = str(enum.Name(value)).removeprefix(prefix)
    return "" if name == "UNSPECIFIED" else name.lower().replace("_", " ")


def version(message: common_pb2.PolicyVersion) -> Json | None:
    if not message.model and not message.number and not message.digest:
        return None
    return {"model": message.model, "number": message.number, "digest": message.digest.hex()[:12]}


def metrics(values: Mapping[str, float]) -> Json:
    return {name: number(value) for name, value in sorted(values.items())}


def features(spec: common_pb2.Spec) -> Json:
    """Vectors with names and units, in the spec's order."""
    shown = []
    for feature in (*spec.observation, *spec.action):
        if feature.kind != common_pb2.FEATURE_KIND_IMAGE:
            size = math.prod(feature.shape)
            shown.append(
                {
                    "name": feature.name,
                    "kind": "action" if feature.kind == common_pb2.FEATURE_KIND_ACTION else "state",
                    "elements": list(feature.element_names) or [str(index) for index in range(size)],
                    "units": list(feature.element_units) or [""] * size,
                }
            )
    return shown


def cameras(spec: common_pb2.Spec) -> Json:
    return [
        {"name": feature.name, "height": feature.shape[0], "width": feature.shape[1]}
        for feature in spec.observation
        if feature.kind == common_pb2.FEATURE_KIND_IMAGE and len(feature.shape) == 3
    ]


def vectors(values: Iterable[common_pb2.NamedValue]) -> Json:
    """{feature: [numbers]} of those values that are numbers. Raises InvalidInput."""
    return {
        value.name: [number(float(element)) for element in codec.decode_value(value).reshape(-1)]
        for value in values
        if value.WhichOneof("value") == "tensor"
    }


def robot_status(status: robot_pb2.RobotStatus) -> Json:
    return {
        "mode": label(robot_pb2.RobotMode, "ROBOT_MODE_", status.mode),
        "authority": label(robot_pb2.Authority, "AUTHORITY_", status.authority),
        "lease_holder": status.lease_holder,
        "fault": status.fault,
        "clamped_count": status.clamped_count,
        "refused_count": status.refused_count,
        "hold_count": status.hold_count,
    }


def actor_status(status: actor_pb2.GetStatusResponse) -> Json:
    return {
        "state": label(actor_pb2.RunState, "RUN_STATE_", status.state),
        "mode": label(actor_pb2.RunMode, "RUN_MODE_", status.run.mode),
        "run_id": status.run.run_id,
        "detail": status.detail,
        "task": status.run.task,
        "model": status.run.model,
        "dataset": status.run.dataset,
        "episode_count": status.run.episode_count,
        "finished_count": status.finished_episode_count,
        "success_count": status.success_count,
        "spooled_frame_count": status.spooled_frame_count,
    }


def tick(message: actor_pb2.Tick) -> Json:
    return {
        "tick": message.tick,
        "episode_number": message.episode_number,
        "source": label(dataset_pb2.ActionSource, "ACTION_SOURCE_", message.source),
        "queue_length": message.queue_length,
        "lateness_ms": milliseconds(message.lateness),
        "clamped_elements": list(message.clamped_elements),
    }


def chunk(message: actor_pb2.ChunkEvent) -> Json:
    return {
        "request_id": message.request_id,
        "requested_tick": message.requested_tick,
        "arrived_tick": message.arrived_tick,
        "delay_steps": message.delay_steps,
        "used_count": message.used_count,
        "latency_ms": milliseconds(message.latency),
        "stages_ms": {
            "capture": milliseconds(message.capture),
            "network": milliseconds(message.network),
            "queue": milliseconds(message.server_queue),
            "compute": milliseconds(message.server_compute),
        },
        "version": version(message.version),
        "refusal": message.refusal,
    }


def episode_result(message: actor_pb2.EpisodeResult) -> Json:
    return {
        "episode_number": message.episode_number,
        "uuid": message.episode_uuid,
        "task": message.task,
        "seed": message.seed,
        "frame_count": message.frame_count,
        "success": message.success,
        "reason": label(dataset_pb2.EpisodeEnd, "EPISODE_END_", message.reason),
        "versions": [version(one) for one in message.versions],
        "held_tick_count": message.held_tick_count,
    }


def percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest rank of a sorted, non-empty sequence."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def latency(chunks: Sequence[Json]) -> Json:
    """p50 and p99 (ms) in all and by stage, over chunks that came."""
    arrived = [one for one in chunks if not one["refusal"]]
    if not arrived:
        return {"count": 0, "total": None, "stages": {}}

    def summary(values: Iterable[float]) -> Json:
        ordered = sorted(values)
        return {"p50_ms": percentile(ordered, 0.5), "p99_ms": percentile(ordered, 0.99)}

    return {
        "count": len(arrived),
        "total": summary(one["latency_ms"] for one in arrived),
        "stages": {stage: summary(one["stages_ms"][stage] for one in arrived) for stage in STAGES},
    }


def inference_status(status: inference_pb2.GetStatusResponse, *, now_s: float) -> Json:
    return {
        "uptime_s": round(stamps.to_seconds(status.uptime)),
        "chunk_count": status.chunk_count,
        "refused_count": status.refused_count,
        "missed_deadline_count": status.missed_deadline_count,
        "waiting_count": status.waiting_count,
        "engine_restart_count": status.engine_restart_count,
        "memory_used_bytes": status.device_memory_used_bytes,
        "memory_total_bytes": status.device_memory_total_bytes,
        "loads": {
            load.model: {
                "possible_per_s": number(load.possible_chunks_per_s),
                "usable_per_s": number(load.usable_chunks_per_s),
                "text_share": number(load.text_share),
                "asked_per_s": number(load.asked_chunks_per_s),
                "session_count": load.session_count,
                "pinned": load.pinned,
            }
            for load in status.loads
        },
        "models": [
            {
                "name": model.name,
                "policy_type": model.policy_type,
                "version": version(model.version),
                "chunk_horizon": model.chunk_horizon,
                "parameter_count": model.parameter_count,
            }
            for model in status.models
        ],
        "sessions": [_session(session, now_s) for session in status.sessions],
        "stages": [
            {"stage": stage.stage, "p50_ms": milliseconds(stage.p50), "p99_ms": milliseconds(stage.p99)}
            for stage in status.stages
        ],
        "swaps": [
            {
                "version": version(swap.version),
                "accepted": swap.accepted,
                "reason": swap.reason,
                "pause_ms": milliseconds(swap.pause),
                "t": round(now_s - stamps.to_seconds(swap.ago), 1),
            }
            for swap in status.swaps
        ],
    }


def _session(session: inference_pb2.SessionStatus, now_s: float) -> Json:
    return {
        "robot_id": session.robot_id,
        "model": session.model,
        "connected": session.connected,
        "chunk_count": session.chunk_count,
        "refused_count": session.refused_count,
        "missed_deadline_count": session.missed_deadline_count,
        "subtask_count": session.subtask_count,
        "refused_subtask_count": session.refused_subtask_count,
        "p50_ms": milliseconds(session.latency_p50),
        "p99_ms": milliseconds(session.latency_p99),
        "refusals": [
            {
                "reason": label(inference_pb2.RefusalReason, "REFUSAL_REASON_", one.reason),
                "message": one.message,
                "count": one.count,
                "t": round(now_s - stamps.to_seconds(one.last_ago), 1),
                "request_id": one.last_request_id,
            }
            for one in session.refusals
        ],
    }


def learner_status(status: learner_pb2.GetStatusResponse) -> Json:
    return {
        "state": label(learner_pb2.RunState, "RUN_STATE_", status.state),
        "detail": status.detail,
        "run_id": status.run.run_id,
        "recipe": status.run.recipe,
        "dataset": status.run.dataset,
        "model": status.run.model,
        "step": status.step,
        "max_steps": status.max_steps,
        "worker_count": status.worker_count,
        "restart_count": status.restart_count,
        "checkpoint_path": status.checkpoint_path,
        "published": [version(one) for one in status.published],
    }


def learner_point(message: learner_pb2.WatchProgressResponse) -> Json:
    return {"step": message.step, "metrics": metrics(message.metrics), "published": version(message.published)}


def dataset(info: dataset_pb2.DatasetInfo) -> Json:
    return {
        "name": info.definition.name,
        "rate_hz": info.definition.spec.control_rate_hz,
        "episode_count": info.episode_count,
        "frame_count": info.frame_count,
        "sealed_count": info.sealed_count,
        "recording_count": info.recording_count,
        "size_bytes": info.size_bytes,
    }


def episode(message: dataset_pb2.Episode) -> Json:
    return {
        "index": message.index,
        "uuid": message.episode_uuid,
        "frame_count": message.frame_count,
        "tasks": list(message.tasks),
        "reason": label(dataset_pb2.EpisodeEnd, "EPISODE_END_", message.reason),
        "robot_id": message.robot_id,
        "versions": [version(one) for one in message.versions],
        "videos": [
            {
                "feature": span.feature,
                "path": span.path,
                "from_s": span.from_timestamp_s,
                "to_s": span.to_timestamp_s,
            }
            for span in message.videos
        ],
    }
