"""The weights service as a process: manyhands weights --root DIR."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from manyhands import config, metrics
from manyhands.security import SecuritySettings
from manyhands.server import GrpcServer
from manyhands.weights.v1 import weights_pb2, weights_pb2_grpc

from .servicer import WeightsServicer
from .store import WeightsStore


class Settings(config.Settings):
    """Keeps versions of policies, each tensor once, and tells everyone who watches of new ones."""

    examples: ClassVar[tuple[str, ...]] = ("--root /var/lib/manyhands/weights --keep-versions 20",)

    root: Path = Field(description="folder of the versions; made when it is not there")
    address: str = Field("127.0.0.1:50052", description="host:port to listen on; port 0 takes a free one")
    keep_versions: int = Field(0, ge=0, description="newest versions of each model to keep; 0 keeps all")
    max_version_gib: float = Field(64.0, gt=0, description="largest sum of a version's tensors")
    collect_after_s: float = Field(
        3600.0, ge=0, description="how long a tensor that no version names stays after somebody sent or asked for it"
    )
    max_publishing: int = Field(4, ge=1, description="learners that may publish at once")
    metrics_port: int = Field(0, ge=0, le=65535, description="port of the Prometheus page; 0 means none")
    security: SecuritySettings = SecuritySettings()


def main(settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT."""
    metrics.serve_metrics(settings.metrics_port)
    asyncio.run(serve(settings))
    return 0


async def serve(settings: Settings) -> None:
    store = WeightsStore(
        settings.root,
        keep_versions=settings.keep_versions,
        max_version_bytes=int(settings.max_version_gib * 1024**3),
        grace_s=settings.collect_after_s,
    )
    try:
        servicer = WeightsServicer(store, max_publishing=settings.max_publishing)
        server = GrpcServer(settings.address, security_settings=settings.security)
        name = weights_pb2.DESCRIPTOR.services_by_name["WeightsService"].full_name
        server.add(weights_pb2_grpc.add_WeightsServiceServicer_to_server, servicer, name)
        await server.run_until_signalled(drain=servicer.drain)
    finally:
        store.close()
