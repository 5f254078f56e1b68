"""How every manyhands service listens: errors as rich status, health, reflection, drain on SIGTERM.

A service's main builds a GrpcServer, adds its servicers and awaits run_until_signalled().
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from . import errors, garbage, security
from .interceptors import Guard, GuardInterceptor
from .metrics import metrics_interceptor

logger = logging.getLogger(__name__)

# A chunk request with three raw 480x640 cameras is 2.8 MB; weights travel in pieces of at most 4 MiB.
MAX_MESSAGE_BYTES = 32 * 1024 * 1024

# In progress at once: a stream of each of a thousand robots, and what else they and people ask. More are refused before
# anything is read of them.
MAX_CALLS = 4096

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # gRPC measures bandwidth with pings too, and while such a ping is unanswered, which it waits a minute for, none of
    # keepalive's is sent: a link that was cut under load would be noticed only then.
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC's own waits between attempts to connect grow to two minutes; a robot that holds must not wait that long.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]
SERVER_OPTIONS: list[tuple[str, int]] = [
    *CHANNEL_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # Two servers must never share a port by accident: the second one gets an error instead of half the robots.
    ("grpc.so_reuseport", 0),
]


class GrpcServer:
    """A grpc.aio server with the standard services and the library's conventions.

    Args:
        address: "host:port"; port 0 takes a free one. Loopback may be plain; any other host needs security (rule 8).
        security_settings: Certificates and tokens, or None.
        max_calls: In progress at once; the next is told RESOURCE_EXHAUSTED.

    Raises:
        Refused: The port is taken, or the address needs TLS and has none.
        InvalidInput: A file of security_settings cannot be read.
    """

    def __init__(
        self, address: str, *, security_settings: security.SecuritySettings | None = None, max_calls: int = MAX_CALLS
    ) -> None:
        settings = security_settings or security.SecuritySettings()
        security.check_address(address, settings)
        credentials = security.server_credentials(settings)
        self.server = grpc.aio.server(
            interceptors=[metrics_interceptor(), error_interceptor(), *security.server_interceptors(settings)],
            options=SERVER_OPTIONS,
            maximum_concurrent_rpcs=max_calls,
        )
        host = address.rpartition(":")[0]
        try:
            if credentials is None:
                port = self.server.add_insecure_port(address)
            else:
                port = self.server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise errors.Refused(
                f"cannot listen on {address}: {error}; is it taken? 'manyhands doctor' shows who has which port",
                field="address",
            ) from None
        self.address = f"{host}:{port}"
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        self._services: list[str] = []
        self._telling: set[asyncio.Task[None]] = set()

    def add(self, register: Callable[[Any, Any], None], servicer: object, service_name: str) -> None:
        """register: the generated add_XServicer_to_server; service_name: DESCRIPTOR full name, shown by health."""
        register(servicer, self.server)
        self._services.append(service_name)

    async def start(self) -> None:
        reflection.enable_server_reflection(
            [*self._services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME],
            self.server,
        )
        await self.server.start()
        for name in ("", *self._services):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def set_serving(self, serving: bool) -> None:
        """What health says of this server's services from now on; after stop() it stays NOT_SERVING."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._services):
            task = asyncio.get_running_loop().create_task(self._health.set(name, status))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def stop(self, grace_s: float) -> None:
        """Says NOT_SERVING, lets running calls finish for grace_s, ends the rest."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace_s)

    async def run_until_signalled(
        self,
        *,
        drain: Callable[[], Awaitable[None]] | None = None,
        grace_s: float = 2.0,
        ending: asyncio.Event | None = None,
    ) -> None:
        """start(), then serve until SIGTERM or SIGINT, or ending is set; drain (tell clients, flush) runs before stop().

        A process ends within 5 s of the signal: grace_s, which streams that nobody ends take whole, is part of it.
        """
        stopping = ending or asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        garbage.settle()  # Before anybody can ask for anything.
        await self.start()
        logger.info("listening on %s", self.address)
        print(f"READY {self.address}", flush=True)
        await stopping.wait()
        logger.info("draining")
        await self._health.enter_graceful_shutdown()  # Who chooses a server by its health goes elsewhere from now on.
        if drain is not None:
            await drain()
        await self.stop(grace_s)


def error_interceptor() -> GuardInterceptor:
    """Turns raised ManyhandsErrors into rich status; anything else becomes INTERNAL with an incident id, traceback in the
    log."""

    def make_guard(method: str) -> Guard:
        @contextlib.asynccontextmanager
        async def guard(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
            try:
                yield
            except Exception as error:
                await _abort(error, context, method)

        return guard

    return GuardInterceptor(make_guard)


async def _abort(error: Exception, context: grpc.aio.ServicerContext[Any, Any], method: str) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, errors.ManyhandsError):
        incident = uuid.uuid4().hex[:12]
        logger.exception("%s failed, incident %s", method, incident)
        error = errors.InternalError(f"the server failed; its log has the reason under incident {incident}")
    status = errors.to_status(error)
    await context.abort(
        error.code, status.message, trailing_metadata=((errors.STATUS_DETAILS_KEY, status.SerializeToString()),)
    )
