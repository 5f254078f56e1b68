"""manyhands serve: run policies for many robots."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import cv2
import torch
import uvloop
from pydantic import Field

from manyhands import config, metrics, ports
from manyhands.inference.v1 import inference_pb2_grpc
from manyhands.security import SecuritySettings
from manyhands.server import GrpcServer
from policies import loading

from .engine import Engine
from .models import AnyPolicy, ServedModel
from .service import SERVICE_NAME, InferenceServicer
from .weights_follower import WeightsFollower

logger = logging.getLogger(__name__)

# Threads of the model and of the streams share one interpreter; the shorter this is, the shorter a stream waits for it.
SWITCH_INTERVAL_S = 0.001
STOP_GRACE_S = 1.0
CATCH_UP_S = 5.0


class Settings(config.Settings):
    """Runs policies for many robots: sessions, deadlines, new weights without a pause."""

    examples: ClassVar[tuple[str, ...]] = (
        "--model reach=checkpoints/reach",
        "--model reach=checkpoints/reach --weights 127.0.0.1:50052 --follow",
    )

    model: dict[str, Path] = Field(
        min_length=1, description="NAME=CHECKPOINT_FOLDER of a policy to serve; may be given several times"
    )
    address: str = Field(
        default=f"127.0.0.1:{ports.INFERENCE}", description="host:port to listen on; port 0 takes a free one"
    )
    weights: str = Field(default="", description="host:port of the weights service that new versions come from")
    follow: bool = Field(default=False, description="swap to every new version of the weights service as it is published")
    device: str = Field(default="cpu", description="torch device that the policies run on")
    max_batch: int = Field(default=4, ge=1, le=64, description="robots in one pass of the model")
    torch_threads: int = Field(default=1, ge=0, description="threads of the matrix kernels; 0 leaves torch's choice")
    max_sessions: int = Field(default=64, ge=1, description="robots served at once")
    idle_timeout_s: float = Field(
        default=4.0, gt=0, description="a session without a stream for this long ends, and its robot_id is free"
    )
    metrics_port: int = Field(default=0, ge=0, le=65535, description="port of the Prometheus page; 0 means none")
    security: SecuritySettings = SecuritySettings()


def main(settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT."""
    policies: dict[str, AnyPolicy] = {}
    for name, folder in settings.model.items():
        logger.info("loading %s from %s", name, folder)
        policies[name] = loading.load(folder, torch.device(settings.device))
    return serve(policies, settings)


def serve(policies: Mapping[str, AnyPolicy], settings: Settings) -> int:
    """Serves policies that are loaded already."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    cv2.setNumThreads(1)  # Pictures are decoded side by side on threads of our own.
    metrics.serve_metrics(settings.metrics_port)
    models = {name: ServedModel(name, policy) for name, policy in policies.items()}
    engine = Engine(models, max_batch=settings.max_batch, torch_threads=settings.torch_threads)
    engine.start()
    follower = None
    if settings.weights:
        follower = WeightsFollower(
            settings.weights, models, engine, follow=settings.follow, security_settings=settings.security
        )
        follower.start(catch_up_s=CATCH_UP_S)
    uvloop.run(_run(models, engine, follower, settings))
    engine.stop()
    return 0


async def _run(
    models: Mapping[str, ServedModel], engine: Engine, follower: WeightsFollower | None, settings: Settings
) -> None:
    server = GrpcServer(settings.address, security_settings=settings.security)
    servicer = InferenceServicer(
        models,
        engine,
        follower=follower,
        max_sessions=settings.max_sessions,
        idle_timeout_s=settings.idle_timeout_s,
    )
    server.add(inference_pb2_grpc.add_InferenceServiceServicer_to_server, servicer, SERVICE_NAME)
    servicer.start()
    await server.run_until_signalled(drain=servicer.drain, grace_s=STOP_GRACE_S)
    if follower is not None:
        await asyncio.to_thread(follower.stop)
    servicer.close()
