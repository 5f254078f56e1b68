"""The Prometheus page of the inference service, but for what every process has (manyhands/metrics.py).

Labels are model names of the server's own configuration and words of this code. Nothing that a robot sends becomes one:
who was refused, and why exactly, is in GetStatus and in the log.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import prometheus_client

from manyhands.inference.v1 import inference_pb2
from manyhands.metrics import LATENCY_BUCKETS_S

from .device_use import DeviceTime
from .engine_port import EngineLoad, Swap

STAGES = ("decode", "queue", "prefix", "sample", "postprocess", "total")
TEXT_OUTCOMES = ("whole", "refused", "left")
# The model of a request whose session is not known.
NO_MODEL = "none"

_REASONS: dict[int, str] = {
    number: name.removeprefix("REFUSAL_REASON_").lower()
    for name, number in inference_pb2.RefusalReason.items()
    if number != inference_pb2.REFUSAL_REASON_UNSPECIFIED
}
_KINDS: dict[int, str] = {
    number: name.removeprefix("TEXT_KIND_").lower()
    for name, number in inference_pb2.TextKind.items()
    if number != inference_pb2.TEXT_KIND_UNSPECIFIED
}

_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_PAUSES_S = (1e-5, 1e-4, 5e-4, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 1.0)

_STAGE_SECONDS = prometheus_client.Histogram(
    "manyhands_inference_stage_seconds", "Time of a chunk's request in one stage; total is received to answered",
    ["model", "stage"], buckets=LATENCY_BUCKETS_S,
)  # fmt: skip
_CHUNKS = prometheus_client.Counter("manyhands_inference_chunks", "Chunks answered", ["model"])
_BATCH_SIZE = prometheus_client.Histogram(
    "manyhands_inference_batch_size", "Robots in the pass that a chunk came from", ["model"], buckets=_BATCH_SIZES
)
_MISSED = prometheus_client.Counter(
    "manyhands_inference_missed_deadlines", "Requests answered, or refused, after their deadline", ["model"]
)
_REFUSALS = prometheus_client.Counter("manyhands_inference_refusals", "Requests refused", ["model", "reason"])
_QUESTIONS = prometheus_client.Counter(
    "manyhands_inference_text_questions", "Questions to a text head, by what became of them", ["model", "kind", "outcome"]
)
_SUBTASKS_REFUSED = prometheus_client.Counter(
    "manyhands_inference_subtasks_refused",
    "Subtasks asked beside chunks that were none, or did not come",
    ["model"],
)
_TOKENS = prometheus_client.Counter("manyhands_inference_text_tokens", "Tokens of text sent", ["model"])
_FIRST_TOKEN = prometheus_client.Histogram(
    "manyhands_inference_text_first_token_seconds", "From a question to its first token", ["model"],
    buckets=LATENCY_BUCKETS_S,
)  # fmt: skip
_SESSIONS = prometheus_client.Gauge("manyhands_inference_sessions", "Sessions open", ["model"])
_IN_FLIGHT = prometheus_client.Gauge("manyhands_inference_requests_in_flight", "Requests received and not answered yet")
_QUEUE = prometheus_client.Gauge("manyhands_inference_queue_length", "Rows in line for the model, a moment ago")
_VERSION = prometheus_client.Gauge(
    "manyhands_inference_served_version", "Number of the version that acts; 0 is the checkpoint", ["model"]
)
_POSSIBLE = prometheus_client.Gauge(
    "manyhands_inference_possible_chunks_per_second",
    "Without text, as was measured or as the last seconds showed; not a number while nothing ran",
    ["model"],
)
_TEXT_SHARE = prometheus_client.Gauge(
    "manyhands_inference_text_share", "Of the device, what the questions of the last seconds take; 0 if not known", ["model"]
)
_ASKED = prometheus_client.Gauge(
    "manyhands_inference_asked_chunks_per_second", "By all sessions, at the replan intervals they asked for", ["model"]
)
_SWAPS = prometheus_client.Counter(
    "manyhands_inference_swaps", "Versions that came in, or were refused", ["model", "outcome"]
)
_SWAP_PAUSE = prometheus_client.Histogram(
    "manyhands_inference_swap_pause_seconds", "How long no pass could start because of a swap", ["model"], buckets=_PAUSES_S
)
_RESTARTS = prometheus_client.Counter(
    "manyhands_inference_engine_restarts", "Engine processes started in the place of one that ended, and ready"
)
# Without a sample where the device has no memory of its own.
_MEMORY_USED = prometheus_client.Gauge(
    "manyhands_inference_device_memory_used_bytes", "Memory of the device in use, by all its processes", ["device"]
)
_MEMORY_TOTAL = prometheus_client.Gauge("manyhands_inference_device_memory_bytes", "Memory of the device", ["device"])
# Without a sample where nothing runs in units.
_DEVICE_SECONDS = prometheus_client.Counter(
    "manyhands_inference_device_seconds", "Of the device, that units took", ["model", "kind"]
)
_DEVICE_UNITS = prometheus_client.Counter("manyhands_inference_device_units", "Units that the device ran", ["model", "kind"])
_DEVICE_ROWS = prometheus_client.Counter(
    "manyhands_inference_device_rows", "Chunks or texts in the units that the device ran", ["model", "kind"]
)
_DEVICE_GAPS = prometheus_client.Counter(
    "manyhands_inference_device_gap_seconds", "Of the device, between two units although there was work", ["device"]
)


class ModelMetrics:
    """One model's series, all there from the start, so that rates are right from the first event on."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._stages = {stage: _STAGE_SECONDS.labels(model, stage) for stage in STAGES}
        self._chunks = _CHUNKS.labels(model)
        self._batch_size = _BATCH_SIZE.labels(model)
        self._missed = _MISSED.labels(model)
        self._refusals = {number: _REFUSALS.labels(model, name) for number, name in _REASONS.items()}
        self._swaps = {accepted: _SWAPS.labels(model, "accepted" if accepted else "refused") for accepted in (True, False)}
        self._swap_pause = _SWAP_PAUSE.labels(model)

    def chunk(self, stage_s: Mapping[str, float], batch_size: int) -> None:
        for stage, seconds in stage_s.items():
            self._stages[stage].observe(seconds)
        self._chunks.inc()
        self._batch_size.observe(batch_size)

    def refusal(self, reason: inference_pb2.RefusalReason.ValueType) -> None:
        self._refusals[reason].inc()

    def missed_deadline(self) -> None:
        self._missed.inc()

    def swap(self, swap: Swap) -> None:
        self._swaps[swap.accepted].inc()
        if swap.accepted:
            self._swap_pause.observe(swap.pause_s)

    def first_token(self, seconds: float) -> None:
        _FIRST_TOKEN.labels(self._model).observe(seconds)

    def text(self, kind: inference_pb2.TextKind.ValueType, outcome: str, num_tokens: int) -> None:
        """A question that has ended; outcome is one of TEXT_OUTCOMES."""
        _QUESTIONS.labels(self._model, text_kind(kind), outcome).inc()
        _TOKENS.labels(self._model).inc(num_tokens)

    def subtask_refused(self) -> None:
        """A robot that asked for one beside its chunk goes on with its last good one."""
        _SUBTASKS_REFUSED.labels(self._model).inc()

    def has_text_head(self) -> None:
        """Shows the model's series of text."""
        for kind in _KINDS.values():
            for outcome in TEXT_OUTCOMES:
                _QUESTIONS.labels(self._model, kind, outcome)
        _TOKENS.labels(self._model)
        _FIRST_TOKEN.labels(self._model)
        _SUBTASKS_REFUSED.labels(self._model)

    def now(
        self, *, sessions: int, version: int, possible_per_s: float | None, text_share: float, asked_per_s: float
    ) -> None:
        _SESSIONS.labels(self._model).set(sessions)
        _VERSION.labels(self._model).set(version)
        _POSSIBLE.labels(self._model).set(float("nan") if possible_per_s is None else possible_per_s)
        _TEXT_SHARE.labels(self._model).set(text_share)
        _ASKED.labels(self._model).set(asked_per_s)


def text_kind(kind: int) -> str:
    """A word for it; one for all that the contract does not name."""
    return _KINDS.get(kind, "unknown")


def reason_word(reason: int) -> str:
    return _REASONS[reason]


@functools.cache
def of_model(model: str) -> ModelMetrics:
    """model is a name of the server's configuration, or NO_MODEL."""
    return ModelMetrics(model)


def engine_restarted() -> None:
    _RESTARTS.inc()


def device_did(time: DeviceTime, device: str) -> None:
    """Since it was told last."""
    for (model, kind), use in time.units.items():
        _DEVICE_SECONDS.labels(model, kind.value).inc(use.device_s)
        _DEVICE_UNITS.labels(model, kind.value).inc(use.num_units)
        _DEVICE_ROWS.labels(model, kind.value).inc(use.num_rows)
    if time.units:
        _DEVICE_GAPS.labels(device).inc(time.gap_s)


def now(*, in_flight: int, load: EngineLoad | None) -> None:
    """load None: the engine is away."""
    _IN_FLIGHT.set(in_flight)
    _QUEUE.set(load.waiting_count if load is not None else 0)
    for gauge, value in (
        (_MEMORY_USED, load.memory_used_bytes if load is not None else 0),
        (_MEMORY_TOTAL, load.memory_total_bytes if load is not None else 0),
    ):
        if load is not None and load.memory_total_bytes:
            gauge.labels(load.device).set(value)
        else:
            gauge.clear()


def show(models: Iterable[tuple[str, bool]]) -> None:
    """Puts the series of models (name, has a text head) on the page."""
    for name, has_text_head in models:
        metrics = of_model(name)
        if has_text_head:
            metrics.has_text_head()
