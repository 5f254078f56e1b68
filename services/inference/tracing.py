"""OpenTelemetry traces of requests, where the operator asks for them: one span a request, with a child for each stage.

Spans are made when a request is over, from the times that its answer carries anyway: a request costs nothing until then, and
nothing at all without a collector. Stages are put one after the other from the request's arrival; what is left at the end
of the request's span is hand-overs between them. Spans are stamped with this machine's wall clock, as the protocol wants;
nothing here reads them back (rule 3).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manyhands.errors import InvalidInput, Refused
from manyhands.security import SecuritySettings, channel_credentials

from .sessions import shown

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

SERVICE_NAME = "manyhands-inference"
SEND_PERIOD_S = 1.0
# Of one batch, retries included: a collector that hangs must not hold up the end of the server.
SEND_TIMEOUT_S = 2
CLOSE_S = 1.0
MAX_WAITING_SPANS = 8192
LOG_PERIOD_S = 60.0


@dataclass(frozen=True, kw_only=True)
class RequestTrace:
    """A request that is over.

    Attributes:
        name: What was asked, as "chunk".
        session_id: Of which its beginning is sent.
        total_s: From arrival to answer.
        stages_s: In order.
        refusal: Why there is no answer, in a word; "" where there is one. message is for people.
        details: More attributes.
    """

    name: str
    session_id: str
    robot_id: str
    model: str
    request_id: str
    total_s: float
    stages_s: Mapping[str, float]
    refusal: str = ""
    message: str = ""
    is_error: bool = False
    details: Mapping[str, int | float | str]


class Traces:
    """Sends spans to a collector, from a thread of its own; what it does not take in time is dropped.

    Args:
        endpoint: "host:port" of an OTLP collector (gRPC).
        share: Of requests that are traced, 0 to 1.

    Raises:
        Refused: The packages are not installed; or the endpoint is neither loopback nor is there an authority to trust.
    """

    def __init__(self, endpoint: str, *, share: float = 1.0, security_settings: SecuritySettings | None = None) -> None:
        if not endpoint.rpartition(":")[2].isdecimal() or "/" in endpoint:
            raise InvalidInput(f"is {endpoint!r}; it must be HOST:PORT of a collector's gRPC port", field="otlp_endpoint")
        credentials = channel_credentials(endpoint, security_settings or SecuritySettings())
        try:
            from opentelemetry import trace
            from opentelemetry.context import Context
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
        except ModuleNotFoundError as error:
            raise Refused(
                f"tracing needs the package that has {error.name!r}: pip install 'manyhands[trace]', or leave out "
                "--otlp-endpoint",
                field="otlp_endpoint",
            ) from None
        logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter").addFilter(_OnceInAWhile())
        exporter = OTLPSpanExporter(
            endpoint=endpoint, insecure=credentials is None, credentials=credentials, timeout=SEND_TIMEOUT_S
        )
        self._provider = TracerProvider(
            sampler=TraceIdRatioBased(share),
            resource=Resource.create({"service.name": SERVICE_NAME}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, max_queue_size=MAX_WAITING_SPANS, schedule_delay_millis=SEND_PERIOD_S * 1000.0)
        )
        self._trace = trace
        self._no_parent = Context()
        self._tracer: Tracer = self._provider.get_tracer("manyhands.inference")

    def request(self, over: RequestTrace) -> None:
        """Makes the spans of a request that is over now."""
        ended_ns = time.time_ns()
        started_ns = ended_ns - _nanoseconds(over.total_s)
        span = self._tracer.start_span(
            over.name, context=self._no_parent, kind=self._trace.SpanKind.SERVER, start_time=started_ns
        )
        if span.is_recording():
            self._describe(span, over)
            inside = self._trace.set_span_in_context(span, self._no_parent)
            at_ns = started_ns
            for stage, seconds in over.stages_s.items():
                until_ns = min(ended_ns, at_ns + _nanoseconds(seconds))
                self._tracer.start_span(stage, context=inside, start_time=at_ns).end(until_ns)
                at_ns = until_ns
        span.end(ended_ns)

    def close(self) -> None:
        """Sends what is left, for a second at most."""
        ending = threading.Thread(target=self._provider.shutdown, name="traces-end", daemon=True)
        ending.start()
        ending.join(CLOSE_S)

    def _describe(self, span: Span, over: RequestTrace) -> None:
        span.set_attributes(
            {
                "manyhands.session": shown(over.session_id),
                "manyhands.robot": over.robot_id,
                "manyhands.model": over.model,
                "manyhands.request_id": over.request_id,
                **{f"manyhands.{name}": value for name, value in over.details.items()},
            }
        )
        if over.refusal:
            span.set_attribute("manyhands.refusal", over.refusal)
            if over.is_error:
                span.set_status(self._trace.StatusCode.ERROR, over.message)


class _OnceInAWhile(logging.Filter):
    """A collector that is away is one line a minute, not one a batch."""

    def __init__(self) -> None:
        super().__init__()
        self._passed_s = -LOG_PERIOD_S

    def filter(self, record: logging.LogRecord) -> bool:
        now_s = time.monotonic()
        if record.levelno < logging.ERROR or now_s - self._passed_s < LOG_PERIOD_S:
            return False
        self._passed_s = now_s
        return True


def _nanoseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e9))
