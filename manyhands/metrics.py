"""Prometheus metrics of every process: calls and their latency, stages of work, one page to scrape.

Names follow Prometheus' rules (base units, _total for counters); docs/guide lists them. Labels hold only names from code,
never what a peer sends, so that nobody can make them grow without bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import prometheus_client

from .errors import Refused
from .interceptors import Guard, GuardInterceptor

logger = logging.getLogger(__name__)

# From a tick of a 1 kHz loop to a training step; a chunk's budget (tens of ms) lies in the finest part.
LATENCY_BUCKETS_S = (
    0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip

CALLS = prometheus_client.Counter(
    "manyhands_rpc_handled", "Calls this server has finished, by method and status code", ["method", "code"]
)
CALL_SECONDS = prometheus_client.Histogram(
    "manyhands_rpc_seconds", "From the arrival of a call to its end; of a stream its whole life", ["method"],
    buckets=LATENCY_BUCKETS_S,
)  # fmt: skip
CALLS_RUNNING = prometheus_client.Gauge("manyhands_rpc_running", "Calls and streams now open", ["method"])
STAGE_SECONDS = prometheus_client.Histogram(
    "manyhands_stage_seconds", "Time in one stage of a component's work", ["component", "stage"], buckets=LATENCY_BUCKETS_S
)

ENGINE_DEATHS = prometheus_client.Counter(
    "manyhands_engine_deaths", "Engine processes of the inference service that ended without being told to"
)


def serve_metrics(port: int, *, host: str = "127.0.0.1") -> None:
    """Serves /metrics in a thread of its own; port 0 means none. The page is plain and open: keep it on a trusted network.

    Raises:
        Refused: The port is taken.
    """
    if port == 0:
        return
    try:
        prometheus_client.start_http_server(port, addr=host)
    except OSError as error:
        raise Refused(
            f"cannot serve metrics on {host}:{port}: {error.strerror}; give another --metrics-port", field="metrics_port"
        ) from None
    logger.info("metrics on http://%s:%d/metrics", host, port)


def observe_stage(component: str, stage: str, seconds: float) -> None:
    """Counts seconds in stage of component, as observe_stage("inference", "decode", 0.004)."""
    STAGE_SECONDS.labels(component, stage).observe(seconds)


@contextlib.contextmanager
def timed_stage(component: str, stage: str) -> Iterator[None]:
    """Counts the time inside the with-statement, also when it raises."""
    start = time.perf_counter()
    try:
        yield
    finally:
        observe_stage(component, stage, time.perf_counter() - start)


def metrics_interceptor() -> GuardInterceptor:
    """Counts what every call of a server became; must be outermost, to see the status after translation."""

    def make_guard(method: str) -> Guard:
        # The method is one that the server offers: calls of unknown methods never come here.
        running = CALLS_RUNNING.labels(method)
        seconds = CALL_SECONDS.labels(method)

        @contextlib.asynccontextmanager
        async def guard(context: Any) -> AsyncIterator[None]:
            start = time.perf_counter()
            running.inc()
            code = grpc.StatusCode.OK
            try:
                yield
                code = _status(context, grpc.StatusCode.OK)
            except (asyncio.CancelledError, GeneratorExit):
                code = grpc.StatusCode.CANCELLED
                raise
            except BaseException:
                code = _status(context, grpc.StatusCode.UNKNOWN)
                raise
            finally:
                running.dec()
                seconds.observe(time.perf_counter() - start)
                CALLS.labels(method, code.name).inc()

        return guard

    return GuardInterceptor(make_guard)


def _status(context: Any, default: grpc.StatusCode) -> grpc.StatusCode:
    """The status set on context; grpc.aio hands out an enum member or its number."""
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    return next((known for known in grpc.StatusCode if code and known.value[0] == code), default)
