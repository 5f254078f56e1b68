"""Monotonic stamps that never leave the process whose clock made them except to come back as an echo (rule 3)."""

from __future__ import annotations

import time
import uuid

from google.protobuf import duration_pb2

from .common.v1 import common_pb2

CLOCK_ID = uuid.uuid4().hex


def now() -> common_pb2.Stamp:
    return common_pb2.Stamp(clock_id=CLOCK_ID, monotonic_ns=time.monotonic_ns())


def age_s(stamp: common_pb2.Stamp) -> float | None:
    """Seconds since an own stamp was made; None for another process's stamp, which cannot be compared."""
    if stamp.clock_id != CLOCK_ID:
        return None
    return (time.monotonic_ns() - stamp.monotonic_ns) / 1e9


def to_duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def to_seconds(duration: duration_pb2.Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
