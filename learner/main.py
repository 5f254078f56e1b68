"""The learner as a process: manyhands learner --store HOST:PORT --weights HOST:PORT --output DIR."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from pathlib import Path
from typing import ClassVar, Never

from pydantic import Field
from tqdm import tqdm

from manyhands import config, metrics
from manyhands.clients.dataset import DatasetClient, fetch_snapshot
from manyhands.learner.v1 import learner_pb2, learner_pb2_grpc
from manyhands.security import SecuritySettings
from manyhands.server import GrpcServer

from .cluster import RayCluster
from .progress import Point
from .runs import Runs, State
from .service import LearnerServicer

logger = logging.getLogger(__name__)


class Settings(config.Settings):
    """Trains policies on what the store has, on Ray, and publishes versions while it trains."""

    examples: ClassVar[tuple[str, ...]] = ("--store 127.0.0.1:50051 --weights 127.0.0.1:50052 --output learner-data",)

    store: str = Field(description="host:port of the dataset store")
    weights: str = Field("", description="host:port of the weights service; empty publishes nothing")
    output: Path = Field(description="folder of runs, checkpoints and copied data; shared by all machines of the cluster")
    checkpoints: Path = Field(Path("checkpoints"), description="folder of the checkpoints that recipes start from")
    address: str = Field("127.0.0.1:50054", description="host:port to listen on; port 0 takes a free one")
    num_workers: int = Field(1, ge=1, description="training workers")
    worker_threads: int = Field(1, ge=1, description="torch threads of a worker")
    use_gpu: bool = Field(False, description="one GPU a worker")
    ray_address: str = Field("", description="a running Ray cluster; empty starts a local one, with this process")
    max_failures: int = Field(5, ge=0, description="times a run starts its workers again after one died")
    metrics_port: int = Field(0, ge=0, description="port of the Prometheus page; 0 is off")
    security: SecuritySettings = SecuritySettings()


def main(settings: Settings) -> int:
    # Before anything of gRPC exists: Ray forks, and a fork beside gRPC's threads may hang. And in the main thread, whose end
    # is what Ray's processes are told to die with.
    cluster = RayCluster(settings.ray_address, num_workers=settings.num_workers)
    cluster.start()
    try:
        asyncio.run(serve(settings, cluster))
    except BaseException:
        cluster.stop()
        raise
    cluster.exit()


async def serve(settings: Settings, cluster: RayCluster) -> None:
    metrics.serve_metrics(settings.metrics_port)
    output = settings.output.resolve()
    output.mkdir(parents=True, exist_ok=True)

    def fetch(dataset: str) -> Path:
        with DatasetClient(settings.store, security_settings=settings.security) as store:
            return fetch_snapshot(store, dataset, output / "data")

    runs = Runs(
        output,
        fit=cluster.fit,
        fetch=fetch,
        worker_config={
            "weights": settings.weights,
            "security": settings.security.model_dump_json(),
            "threads": settings.worker_threads,
            "use_gpu": settings.use_gpu,
            "checkpoints": str(settings.checkpoints.expanduser().resolve()),
            "cache": str(output / "cache"),
        },
        max_failures=settings.max_failures,
    )
    threading.Thread(target=_show, args=(runs,), name="show", daemon=True).start()
    servicer = LearnerServicer(runs, num_workers=settings.num_workers)
    server = GrpcServer(settings.address, security_settings=settings.security)
    name = learner_pb2.DESCRIPTOR.services_by_name["LearnerService"].full_name
    server.add(learner_pb2_grpc.add_LearnerServiceServicer_to_server, servicer, name)
    await server.run_until_signalled(drain=servicer.drain, grace_s=1.0)


def _show(runs: Runs) -> None:
    """What happens, on the terminal: a bar where there is one, else a line now and then."""
    bar: tqdm[Never] | None = None
    last: State | None = None
    while True:
        status = runs.wait_for_change(timeout_s=2.0)
        if status.state is not last:
            last = status.state
            logger.info("run %s: %s %s", status.request.run_id if status.request else "-", status.state.value, status.detail)
            if bar is not None:
                bar.close()
            is_training = status.state is State.TRAINING and sys.stderr.isatty()
            bar = tqdm(total=status.max_steps, unit="step", initial=status.step) if is_training else None
        if status.state is State.TRAINING and (point := _newest(runs.points())) is not None:
            text = f"loss {point.metrics['train/loss']:.4f}, {len(status.published)} versions"
            if bar is not None:
                bar.set_postfix_str(text, refresh=False)
                bar.update(point.step - bar.n)
            else:
                logger.info("step %d of %d, %s", point.step, status.max_steps, text)


def _newest(points: list[Point]) -> Point | None:
    return next((point for point in reversed(points) if point.kind == "metrics"), None)
