"""manyhands store: keeps every episode of a fleet and hands them out for training."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from manyhands import config, metrics
from manyhands.dataset.v1 import dataset_pb2, dataset_pb2_grpc
from manyhands.security import SecuritySettings
from manyhands.server import GrpcServer

from .service import DatasetService
from .store import Store, StoreLimits

_DEFAULTS = StoreLimits()


class Settings(config.Settings):
    """Where the store keeps its data, where it listens, and when it says no."""

    examples: ClassVar[tuple[str, ...]] = ("--root ~/manyhands-data --address 127.0.0.1:50051",)

    root: Path = Field(description="folder of the store; made if missing, one process at a time")
    address: str = Field("127.0.0.1:50051", description="where to listen; port 0 takes a free one")
    security: SecuritySettings = Field(SecuritySettings(), description="certificates and tokens; needed off loopback")
    publish_delay_s: float = Field(
        _DEFAULTS.publish_delay_s, ge=0, description="sealed episodes wait so long to be published together"
    )
    encoder_threads: int = Field(_DEFAULTS.encoder_threads, ge=1, le=256, description="threads that encode video")
    min_free_mib: int = Field(_DEFAULTS.min_free_mib, ge=0, description="no new frames while the disk has less free space")
    max_live_episodes: int = Field(_DEFAULTS.max_live_episodes, ge=1, description="episodes recorded at once")
    metrics_port: int = Field(0, ge=0, le=65535, description="port of the Prometheus page; 0 means none")
    max_streams: int = Field(64, ge=1, le=1024, description="recorders connected at once")


def main(settings: Settings) -> int:
    metrics.serve_metrics(settings.metrics_port)
    return asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> int:
    server = GrpcServer(settings.address, security_settings=settings.security)
    limits = StoreLimits(
        min_free_mib=settings.min_free_mib,
        max_live_episodes=settings.max_live_episodes,
        publish_delay_s=settings.publish_delay_s,
        encoder_threads=settings.encoder_threads,
    )
    store = await asyncio.to_thread(Store, settings.root.expanduser(), limits)
    service = DatasetService(store, max_streams=settings.max_streams)
    try:
        server.add(
            dataset_pb2_grpc.add_DatasetServiceServicer_to_server,
            service,
            dataset_pb2.DESCRIPTOR.services_by_name["DatasetService"].full_name,
        )
        await server.run_until_signalled(grace_s=1.0)
    finally:
        store.interrupt()
        await asyncio.to_thread(service.close)
        await asyncio.to_thread(store.close)
    return 0
