"""Drives one robot through episodes, by a served policy or by a teleoperator, and records them.

Start it next to the robot agent; then start runs on it from anywhere ('manyhands dashboard', manyhands.clients.actor).
Everything recorded goes through the spool folder, so neither a crash nor a store that is away loses a frame.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from manyhands import config, errors, garbage
from manyhands.actor.v1 import actor_pb2, actor_pb2_grpc
from manyhands.common.v1 import common_pb2
from manyhands.metrics import serve_metrics
from manyhands.security import SecuritySettings
from manyhands.server import GrpcServer

from .daemon import Actor, ActorOptions
from .service import ActorServicer

logger = logging.getLogger(__name__)

IMAGE_ENCODINGS = {
    "jpeg": common_pb2.IMAGE_ENCODING_JPEG,
    "png": common_pb2.IMAGE_ENCODING_PNG,
    "raw": common_pb2.IMAGE_ENCODING_RAW_RGB8,
}
# Threads take turns this often. The control loop waits for its turn behind the recorder and the network: at the
# interpreter's default of 5 ms it would miss half a period at 100 Hz.
SWITCH_INTERVAL_S = 0.0005


class Settings(config.Settings):
    examples: ClassVar[tuple[str, ...]] = (
        "--robot 127.0.0.1:50061 --inference gpu-host:50053 --store store-host:50051 --spool /var/lib/manyhands/spool",
    )

    address: str = Field("127.0.0.1:0", description="HOST:PORT to listen on; port 0 takes a free one")
    robot: str = Field(description="HOST:PORT of the robot agent")
    inference: str = Field("", description="HOST:PORT of the inference service; needed for runs with a policy")
    store: str = Field("", description="HOST:PORT of the dataset store; needed for recording")
    spool: Path = Field(description="folder for episodes that the store does not have yet; one actor each")
    spool_limit_gb: float = Field(20.0, gt=0, description="most that the spool may hold; a run stops before it is full")
    resume_run: bool = Field(False, description="go on with a run that a crash or a restart of this actor cut short")
    image_encoding: Literal["jpeg", "png", "raw"] = Field("jpeg", description="of pictures, recorded and sent; jpeg has 95")
    simulation_speed: float = Field(1.0, gt=0, description="factor on the control rate, for simulated robots only")
    max_action_age_s: float = Field(
        3.0, gt=0, description="an action whose observation is older is never executed; the robot holds instead"
    )
    chunk_deadline_s: float = Field(2.0, gt=0, le=60, description="how long a chunk request is worth waiting for")
    flush_s: float = Field(3.0, ge=0, description="at shutdown, how long the spool may take to reach the store")
    metrics_port: int = Field(0, ge=0, le=65535, description="port of the Prometheus page; 0 means none")
    security: SecuritySettings = Field(SecuritySettings(), description="certificates and token")


def main(settings: Settings) -> int:
    serve_metrics(settings.metrics_port)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    options = ActorOptions(
        robot_address=settings.robot,
        inference_address=settings.inference,
        store_address=settings.store,
        spool_dir=settings.spool,
        spool_limit_bytes=int(settings.spool_limit_gb * 1e9),
        security=settings.security,
        image_encoding=IMAGE_ENCODINGS[settings.image_encoding],
        simulation_speed=settings.simulation_speed,
        max_action_age_s=settings.max_action_age_s,
        chunk_deadline_s=settings.chunk_deadline_s,
    )
    try:
        actor = Actor(options)
    except OSError as error:
        raise errors.Refused(f"cannot use the folder {settings.spool}: {error}", field="spool") from error
    asyncio.run(_serve(settings, actor))
    return 0


async def _serve(settings: Settings, actor: Actor) -> None:
    server = GrpcServer(settings.address, security_settings=settings.security)
    servicer = ActorServicer(actor)
    server.add(
        actor_pb2_grpc.add_ActorServiceServicer_to_server,
        servicer,
        actor_pb2.DESCRIPTOR.services_by_name["ActorService"].full_name,
    )
    garbage.settle()  # Before a robot moves.
    if settings.resume_run:
        actor.resume_run()

    async def drain() -> None:
        await asyncio.to_thread(actor.shut_down, settings.flush_s)
        servicer.drain()

    await server.run_until_signalled(drain=drain, grace_s=1.0)
