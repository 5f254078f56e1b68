"""The dashboard as a process: manyhands dashboard --robot left=127.0.0.1:50061 --inference 127.0.0.1:50053."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from typing import ClassVar

from aiohttp import web
from pydantic import Field

from manyhands import config
from manyhands.errors import Refused
from manyhands.security import SecuritySettings

from .access import Access
from .feed import Feed
from .robots import Fleet
from .sources import DatasetReader, watch_inference, watch_learner, watch_weights
from .swaps import WeightSwapper
from .upstream import Target, Upstream
from .web import Pages

logger = logging.getLogger(__name__)


class Settings(config.Settings):
    """A page with the robots' cameras, joints and chunks, what is served and learned, the episodes, and who is well."""

    examples: ClassVar[tuple[str, ...]] = (
        "--robot left=127.0.0.1:50061 --inference 127.0.0.1:50053 --weights 127.0.0.1:50052",
        "--inference 127.0.0.1:50053 --weights 127.0.0.1:50052 --allow-swaps",
        "--actor 127.0.0.1:50071 --store 127.0.0.1:50051 --learner 127.0.0.1:50054",
    )

    address: str = Field("127.0.0.1:8080", description="host:port of the page; port 0 takes a free one")
    robot: dict[str, str] = Field(default_factory=dict, description="name and host:port of a robot agent")
    actor: list[str] = Field(default_factory=list, description="host:port of an actor, which tells where its robot is")
    inference: str | None = Field(None, description="host:port of the inference service")
    weights: str | None = Field(None, description="host:port of the weights service")
    learner: str | None = Field(None, description="host:port of the learner")
    store: str | None = Field(None, description="host:port of the dataset store")
    observe_rate_hz: float = Field(
        5.0, gt=0, le=30, description="pictures and states a second asked of each robot, however many look at the page"
    )
    allow_swaps: bool = Field(False, description="operators may swap a served model to another version from the page")
    security: SecuritySettings = SecuritySettings()


def main(settings: Settings) -> int:
    asyncio.run(serve(settings))
    return 0


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT."""
    access = Access(settings.address, settings.security)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    feed = Feed()
    upstream = Upstream(feed, settings.security)
    async with contextlib.AsyncExitStack() as cleanup:
        cleanup.push_async_callback(upstream.close)
        fleet, datasets = _watch(settings, upstream)
        swapper = WeightSwapper(upstream, settings.inference) if settings.allow_swaps and settings.inference else None
        pages = Pages(feed, access, fleet, datasets, swapper)
        runner = web.AppRunner(pages.application(), access_log=None, shutdown_timeout=2.0)
        await runner.setup()
        cleanup.push_async_callback(runner.cleanup)
        address = await _listen(runner, settings.address, access)
        logger.info("the page is at %s://%s/", "https" if access.tls() else "http", address)
        print(f"READY {address}", flush=True)
        await stopping.wait()


def _watch(settings: Settings, upstream: Upstream) -> tuple[Fleet, DatasetReader | None]:
    """Begins watching everything that was named."""
    fleet = Fleet(upstream, observe_rate_hz=settings.observe_rate_hz)
    for name, address in settings.robot.items():
        fleet.add_robot(Target(name=name, address=address))
    for address in settings.actor:
        fleet.add_actor(address)
    if settings.inference:
        watch_inference(upstream, settings.inference)
    if settings.weights:
        watch_weights(upstream, settings.weights)
    if settings.learner:
        watch_learner(upstream, settings.learner)
    configured = {name: bool(getattr(settings, name)) for name in ("inference", "weights", "learner", "store")}
    upstream.feed.set("configured", configured)
    return fleet, DatasetReader(upstream, settings.store) if settings.store else None


async def _listen(runner: web.AppRunner, address: str, access: Access) -> str:
    host, _, port = address.rpartition(":")
    site = web.TCPSite(runner, host.strip("[]"), int(port), ssl_context=access.tls())
    try:
        await site.start()
    except OSError as error:
        raise Refused(
            f"cannot listen on {address}: {error.strerror}; is it taken? 'manyhands doctor' shows who has which port",
            field="address",
        ) from None
    return f"{host}:{runner.addresses[0][1]}"
