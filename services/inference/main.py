"""manyhands serve: run policies for many robots. The front end: sessions, streams, pictures; the model runs in a process of
its own (engine_process.py), so that its Python never makes a stream wait, and no torch is imported here."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import ClassVar, Literal

import cv2
import uvloop
from pydantic import Field

from manyhands import config, metrics, ports, stamps
from manyhands.engine.v1 import engine_pb2
from manyhands.errors import InvalidInput
from manyhands.inference.v1 import inference_pb2_grpc
from manyhands.security import SecuritySettings
from manyhands.server import GrpcServer

from . import engine_messages
from .engine_supervisor import EngineSupervisor
from .service import MAX_REQUESTS_HZ, SERVICE_NAME, InferenceServicer
from .start_progress import StartProgress
from .tracing import Traces

logger = logging.getLogger(__name__)

# The loop and the threads that decode pictures share an interpreter; the shorter this is, the shorter a stream waits for it.
SWITCH_INTERVAL_S = 0.001
STOP_GRACE_S = 1.0
CATCH_UP_S = 5.0

_PATHS = {
    "auto": engine_pb2.ENGINE_PATH_UNSPECIFIED,
    "plain": engine_pb2.ENGINE_PATH_PLAIN,
    "fused": engine_pb2.ENGINE_PATH_FUSED,
}


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
    path: Literal["auto", "plain", "fused"] = Field(
        default="auto",
        description="fused: prepared units, for pi052 and pi05; plain: whole passes of the module; auto: fused on a GPU",
    )
    fp8: bool = Field(
        default=False,
        description="multiply the MLPs of a prefix in FP8: faster, and less exact by what docs/design/0015-fused-engine.md "
        "says; for pi052 and pi05 on the fused path, on a GPU of compute capability 8.9 or newer",
    )
    kernel_cache: Path | None = Field(
        default=None,
        description="folder that compiled kernels are kept in, so that the next start is fast; keep it with the host where "
        "homes are thrown away (default: TRITON_CACHE_DIR, or .triton in the home)",
    )
    max_batch: int = Field(default=4, ge=1, le=64, description="robots in one pass of the model")
    torch_threads: int = Field(default=1, ge=0, description="threads of the matrix kernels; 0 leaves torch's choice")
    max_sessions: int = Field(default=64, ge=1, description="robots served at once")
    idle_timeout_s: float = Field(
        default=4.0,
        gt=0,
        description="a session without a stream or a question for this long ends, and its robot_id is free",
    )
    max_requests_hz: float = Field(
        default=MAX_REQUESTS_HZ, gt=0, description="requests a second that are read of one robot's stream; more wait"
    )
    engine_restarts: int = Field(
        default=5, ge=0, description="times that an engine process that died is started again before one served for a minute"
    )
    engine_hung_s: float = Field(
        default=20.0, gt=0, description="an engine process that answers nothing for so long after a deadline is ended"
    )
    metrics_port: int = Field(default=0, ge=0, le=65535, description="port of the Prometheus page; 0 means none")
    otlp_endpoint: str = Field(
        default="", description="host:port of an OpenTelemetry collector (OTLP over gRPC) that requests are traced to"
    )
    trace_share: float = Field(
        default=1.0, ge=0, le=1, description="share of requests that are traced, with --otlp-endpoint"
    )
    security: SecuritySettings = SecuritySettings()


def main(settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT, or until the engine is given up."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    cv2.setNumThreads(1)  # Pictures are decoded side by side on threads of our own.
    if settings.kernel_cache is not None:
        _keep_kernels(settings.kernel_cache)
    metrics.serve_metrics(settings.metrics_port)
    uvloop.run(_serve(settings))
    return 0


def _keep_kernels(folder: Path) -> None:
    """Triton's cache of what it compiled, for the engine process, which inherits the environment."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(
            f"is {folder}, which cannot be made ({error.strerror}); name a folder that this process may write",
            field="kernel_cache",
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidInput(f"is {folder}, which this process may not write; name another one", field="kernel_cache")
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve())


async def _serve(settings: Settings) -> None:
    # Before the engine, which takes long: a package that lacks is told at once.
    traces = _traces(settings)
    engine = EngineSupervisor(start_message(settings), restart_limit=settings.engine_restarts, hung_s=settings.engine_hung_s)
    try:
        with StartProgress() as progress:
            await engine.start(progress.show)
        server = GrpcServer(settings.address, security_settings=settings.security)
        servicer = InferenceServicer(
            engine,
            max_sessions=settings.max_sessions,
            idle_timeout_s=settings.idle_timeout_s,
            max_requests_hz=settings.max_requests_hz,
            traces=traces,
        )
        engine.on_serving = server.set_serving
        server.add(inference_pb2_grpc.add_InferenceServiceServicer_to_server, servicer, SERVICE_NAME)
        servicer.start()
        await server.run_until_signalled(drain=servicer.drain, grace_s=STOP_GRACE_S, ending=engine.given_up)
        servicer.close()
    finally:
        await engine.stop()
        if traces is not None:
            await asyncio.to_thread(traces.close)
    if engine.failure is not None:
        raise engine.failure


def _traces(settings: Settings) -> Traces | None:
    if not settings.otlp_endpoint:
        return None
    return Traces(settings.otlp_endpoint, share=settings.trace_share, security_settings=settings.security)


def start_message(settings: Settings) -> engine_pb2.Start:
    """What an engine process is told."""
    return engine_pb2.Start(
        models=[engine_pb2.ModelSource(name=name, checkpoint=str(folder)) for name, folder in settings.model.items()],
        device=settings.device,
        max_batch=settings.max_batch,
        torch_threads=settings.torch_threads,
        weights_address=settings.weights,
        follow=settings.follow,
        catch_up=stamps.to_duration(CATCH_UP_S),
        security=engine_messages.to_security(settings.security),
        log_level=settings.log_level,
        log_json=settings.log_json,
        path=_PATHS[settings.path],
        fp8=settings.fp8,
    )
