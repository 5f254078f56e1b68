"""Numbers for operators: what chunks cost by stage, over the last few thousand of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping

import numpy as np

from manyhands import metrics

STAGES = ("decode", "queue", "prefix", "sample", "postprocess", "total")
CHUNKS_KEPT = 4096


class StageStats:
    """Counts and stage latencies over all sessions, since the start; also shown to Prometheus."""

    def __init__(self) -> None:
        self.chunk_count = 0
        self.refused_count = 0
        self._seconds: dict[str, deque[float]] = {stage: deque(maxlen=CHUNKS_KEPT) for stage in STAGES}

    def chunk(self, stage_s: Mapping[str, float]) -> None:
        self.chunk_count += 1
        for stage, seconds in stage_s.items():
            self._seconds[stage].append(seconds)
            metrics.observe_stage("inference", stage, seconds)

    def refusal(self) -> None:
        self.refused_count += 1

    def percentiles(self) -> dict[str, tuple[float, float]]:
        """(p50, p99) in seconds by stage; empty before the first chunk."""
        return {stage: p50_p99(seconds) for stage, seconds in self._seconds.items() if seconds}


def p50_p99(seconds: Collection[float]) -> tuple[float, float]:
    if not seconds:
        return 0.0, 0.0
    p50, p99 = np.percentile(np.fromiter(seconds, dtype=np.float64), (50, 99))
    return float(p50), float(p99)
