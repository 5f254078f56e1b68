"""Who acts on this tick, and with what: pure, from what is known at the tick."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from manyhands.common.v1 import common_pb2
from manyhands.dataset.v1 import dataset_pb2
from manyhands.robot.types import Arrays, RobotObservation
from manyhands.spec import Feature

from .chunk_queue import ChunkQueue


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One tick.

    Attributes:
        action: To command, arrays by action feature; None: hold.
        source: Who decided.
        age_s: Of the observation behind the action.
        version: Weights, where source is POLICY.
        proposed: What the policy wanted, where there is such a thing.
        hold_reason: Why there is no action.
    """

    action: Arrays | None
    source: dataset_pb2.ActionSource.ValueType
    age_s: float = 0.0
    version: common_pb2.PolicyVersion | None = None
    proposed: Arrays | None = None
    hold_reason: str = ""


def hold(reason: str) -> Decision:
    return Decision(action=None, source=dataset_pb2.ACTION_SOURCE_HOLD, hold_reason=reason)


def decide(
    observation: RobotObservation,
    *,
    features: Sequence[Feature],
    queue: ChunkQueue | None,
    tick: int,
    now_s: float,
    observed_s: float,
    no_chunk_reason: str = "",
) -> Decision:
    """A person before the policy, the policy before nothing, and nothing on a value that is not fresh.

    Args:
        queue: None when a teleoperator drives the run.
        observed_s: When this observation was asked for.
        no_chunk_reason: What keeps chunks away, for the hold's reason.
    """
    for name, health in observation.health.items():
        if not health.valid:
            return hold(f"{name} is not fresh: {health.reason or f'{health.age_s:.3f} s old'}")
    planned = queue.take(tick, now_s) if queue is not None else None
    proposed = split_action(planned.values, features) if planned is not None else None
    person = observation.teleop_action
    if queue is None or observation.intervening:
        if not person:
            return hold("the teleoperator gives no action")
        return Decision(
            action=person,
            source=dataset_pb2.ACTION_SOURCE_TELEOPERATOR,
            age_s=now_s - observed_s,
            proposed=proposed,
        )
    if planned is None or proposed is None:
        waiting = "the last chunk is used up" if tick else "waiting for the first chunk"
        return hold(f"{waiting}: {no_chunk_reason}" if no_chunk_reason else waiting)
    return Decision(
        action=proposed,
        source=dataset_pb2.ACTION_SOURCE_POLICY,
        age_s=planned.age_s,
        version=planned.version,
        proposed=proposed,
    )


def split_action(values: npt.NDArray[np.float32], features: Sequence[Feature]) -> dict[str, npt.NDArray[np.generic]]:
    """(R,) concatenated action to arrays by feature, in the spec's order and dtypes."""
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    start = 0
    for feature in features:
        end = start + feature.shape[0]
        arrays[feature.name] = values[start:end].astype(feature.dtype)
        start = end
    return arrays


def action_size(features: Sequence[Feature]) -> int:
    """R."""
    return sum(feature.shape[0] for feature in features)


def same(first: Arrays, second: Arrays) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)
