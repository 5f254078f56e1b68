"""Connections to the services, tried again for ever, and their health as a viewer sees it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from manyhands import channel, errors
from manyhands.security import SecuritySettings

from .feed import Feed, Json

logger = logging.getLogger(__name__)

RETRY_PAUSE_S = 0.5
# A service that is gone shows so within interval + timeout, plus what the page needs to draw it: under 3 s.
HEALTH_INTERVAL_S = 1.0
HEALTH_TIMEOUT_S = 1.0


class Upstream:
    """All channels and background tasks of the dashboard.

    Attributes:
        feed: Where watchers write.
    """

    def __init__(self, feed: Feed, security_settings: SecuritySettings) -> None:
        self.feed = feed
        self._security_settings = security_settings
        self._channels: dict[tuple[str, bool], grpc.aio.Channel] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._health: dict[str, Json] = {}

    @property
    def has_tls(self) -> bool:
        """Services are talked to over TLS."""
        return self._security_settings.authority is not None

    def channel(self, address: str, *, without_token: bool = False) -> grpc.aio.Channel:
        """without_token: calls show another token than the dashboard's own."""
        key = (address, without_token)
        if key not in self._channels:
            settings = self._security_settings
            if without_token:
                settings = settings.model_copy(update={"token_file": None})
            self._channels[key] = channel.connect_aio(address, security_settings=settings)
        return self._channels[key]

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def add_service(self, kind: str, address: str, *, name: str = "") -> None:
        """Shows the service's health from now on; name tells several of a kind apart."""
        identifier = f"{kind}:{name}" if name else kind
        if identifier in self._health:
            return
        shown = {"id": identifier, "kind": kind, "name": name, "address": address, "state": "connecting"}
        self._health[identifier] = shown
        self.spawn(self._watch_health(identifier, address), f"health of {identifier}")

    def rename_service(self, identifier: str, name: str) -> None:
        """Another name on the page; the identifier stays."""
        self._health[identifier] = {**self._health[identifier], "name": name}

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for open_channel in self._channels.values():
            await open_channel.close(None)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("%s ended", task.get_name(), exc_info=task.exception())

    async def _watch_health(self, identifier: str, address: str) -> None:
        stub = health_pb2_grpc.HealthStub(self.channel(address))
        since_s = self.feed.now_s()
        while True:
            state, detail, latency_ms = await _check(stub)
            shown = self._health[identifier]
            if state != shown["state"]:
                since_s = self.feed.now_s()
                logger.info("%s at %s is %s %s", identifier, address, state, detail)
            self._health[identifier] = {
                **shown, "state": state, "detail": detail, "latency_ms": latency_ms, "since_t": since_s,
            }  # fmt: skip
            self.feed.set("services", list(self._health.values()))
            await asyncio.sleep(HEALTH_INTERVAL_S)


async def _check(stub: health_pb2_grpc.HealthStub) -> tuple[str, str, float | None]:
    started_s = time.monotonic()
    try:
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=HEALTH_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        return "down", errors.from_rpc_error(error).message, None
    latency_ms = round((time.monotonic() - started_s) * 1000, 1)
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return "up", "", latency_ms
    return "draining", "it says that it is not serving", latency_ms


async def keep_trying(what: str, watch: Callable[[], Awaitable[None]], *, pause_s: float = RETRY_PAUSE_S) -> None:
    """Runs watch again and again; a service that is away is the normal case and is logged once."""
    complained = ""
    while True:
        try:
            with channel.translated_errors():
                await watch()
            complained = ""
        except errors.ManyhandsError as error:
            if error.message != complained:
                complained = error.message
                logger.info("%s: %s", what, error)
        await asyncio.sleep(pause_s)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A service of the command line: what it is called on the page and where it is."""

    name: str
    address: str


def same_place(address: str) -> str:
    """One spelling for addresses that mean the same."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host == "localhost" else address


@contextlib.contextmanager
def suppressed_bad_values(note: Callable[[str], None]) -> Any:
    """Inside, a value that a peer sent and that cannot be read is noted instead of ending the watch."""
    try:
        yield
    except errors.InvalidInput as error:
        note(str(error))
