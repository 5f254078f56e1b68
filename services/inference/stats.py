"""Numbers for operators: what chunks cost by stage, over the last few thousand of them, and counts since the start."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping

import numpy as np

from manyhands.inference.v1 import inference_pb2

from . import operator_metrics
from .operator_metrics import NO_MODEL, STAGES

CHUNKS_KEPT = 4096


class ServiceStats:
    """Over all sessions; also shown to Prometheus."""

    def __init__(self) -> None:
        self.chunk_count = 0
        self.refused_count = 0
        self.missed_deadline_count = 0
        self._seconds: dict[str, deque[float]] = {stage: deque(maxlen=CHUNKS_KEPT) for stage in STAGES}

    def chunk(self, model: str, stage_s: Mapping[str, float], *, batch_size: int, is_late: bool) -> None:
        self.chunk_count += 1
        for stage, seconds in stage_s.items():
            self._seconds[stage].append(seconds)
        operator_metrics.of_model(model).chunk(stage_s, batch_size)
        if is_late:
            self._missed_deadline(model)

    def refusal(self, model: str | None, reason: inference_pb2.RefusalReason.ValueType) -> None:
        """model None: the session is not known."""
        self.refused_count += 1
        operator_metrics.of_model(model or NO_MODEL).refusal(reason)
        if model and reason == inference_pb2.REFUSAL_REASON_DEADLINE:
            self._missed_deadline(model)

    def percentiles(self) -> dict[str, tuple[float, float]]:
        """(p50, p99) in seconds by stage; empty before the first chunk."""
        return {stage: p50_p99(seconds) for stage, seconds in self._seconds.items() if seconds}

    def _missed_deadline(self, model: str) -> None:
        self.missed_deadline_count += 1
        operator_metrics.of_model(model).missed_deadline()


def p50_p99(seconds: Collection[float]) -> tuple[float, float]:
    if not seconds:
        return 0.0, 0.0
    p50, p99 = np.percentile(np.fromiter(seconds, dtype=np.float64), (50, 99))
    return float(p50), float(p99)
