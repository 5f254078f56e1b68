"""manyhands loadtest: simulated robots against an inference service, as many as you mean to have.

Without --address it starts a server of its own on this machine, with a tiny policy or your --checkpoint. Every robot has a
session and a stream like a real one; pictures are encoded once. With --compare the same robots then meet a plain websocket
server that runs the same policy. The exit code is 1 when there were errors.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from manyhands import config
from manyhands.clients.inference import InferenceClient
from manyhands.errors import InvalidInput, NotFound, Refused
from manyhands.inference.v1 import inference_pb2
from manyhands.security import SecuritySettings
from manyhands.spec import Feature, FeatureKind, Spec

from . import fleet, report, servers
from .plan import Plan


class Settings(config.Settings):
    """Simulated robots against a running inference service: latencies, misses, errors, CPU."""

    examples: ClassVar[tuple[str, ...]] = (
        "--robots 32 --rate-hz 10 --seconds 60 --json loadtest.json",
        "--address gpu1:50053 --model arm --robots 16 --rate-hz 5 --ask-every-s 2",
        "--compare --robots 16 --rate-hz 5",
    )

    address: str = Field(default="", description="host:port of the service; without it one is started here")
    model: str = Field(default="", description="name in the server's list; needed where it serves several")
    checkpoint: Path | None = Field(
        default=None, description="policy that servers started here run; without it a tiny one with two cameras"
    )
    robots: int = Field(default=32, ge=1, le=10000, description="simulated robots")
    task: str = Field(default="open the drawer", description="instruction that all robots have")
    rate_hz: float = Field(default=10.0, gt=0, le=1000, description="observations a second that each robot sends")
    seconds: float = Field(default=60.0, gt=0, description="how long all robots are there")
    ramp_up_s: float = Field(default=0.0, ge=0, description="robots come one after the other within this time")
    deadline_ms: float = Field(default=100.0, gt=0, le=60000, description="from sending an observation to its chunk")
    replan_interval_steps: int = Field(
        default=0, ge=0, description="actions of a chunk that a robot executes; 0: what its rates give"
    )
    with_prefix: bool = Field(
        default=False, description="send the rest of the last chunk with each request, for real-time chunking"
    )
    camera_px: int = Field(default=0, ge=0, le=4096, description="square size of sent pictures; 0: the model's own")
    jpeg_quality: int = Field(default=95, ge=1, le=100, description="of sent pictures")
    shared_memory: bool = Field(
        default=False,
        description="leave pictures in memory that the server, on this machine, has made for them, instead of sending JPEG",
    )
    ask_every_s: float = Field(
        default=0.0, ge=0, description="between a robot's questions, a tiny one: one after the other; 0 for none"
    )
    ask_tokens: int = Field(default=20, ge=1, description="most tokens of an answer")
    processes: int = Field(default=0, ge=0, le=256, description="processes of robots; 0: as many as the load needs")
    compare: bool = Field(default=False, description="also run a plain websocket server with the same policy")
    device: str = Field(default="cpu", description="torch device of servers started here")
    max_batch: int = Field(default=8, ge=1, le=64, description="robots in a pass of a service started here")
    torch_threads: int = Field(default=1, ge=0, description="of servers started here")
    json_file: Path | None = Field(default=None, description="write the result here", json_schema_extra={"flag": "json"})
    timeline: bool = Field(
        default=False, description="with --json: also each chunk's time, latency and version, as through a swap of weights"
    )
    security: SecuritySettings = SecuritySettings()


def main(settings: Settings) -> int:
    if settings.timeline and settings.json_file is None:
        raise InvalidInput("goes into the file of --json; name one", field="timeline")
    if settings.compare:
        _check_can_compare(settings)
    with tempfile.TemporaryDirectory(prefix="manyhands-loadtest-") as folder:
        results, interrupted = _measure(settings, Path(folder))
    result = next(iter(results.values()))
    if settings.json_file is not None:
        plain = {"plain_server": results[PLAIN]} if PLAIN in results else {}
        settings.json_file.write_text(json.dumps({**result, "interrupted": interrupted, **plain}, indent=1) + "\n")
    console = Console()
    title = f"{settings.robots} robots at {settings.rate_hz:g} Hz for {result['seconds']:.0f} s"
    console.print(report.table(results, title + (", stopped early" if interrupted else "")))
    for name, one in results.items():
        for message, number in list(one["errors_by_message"].items())[:5]:
            console.print(f"{name}: {number} x {message}", style="red", markup=False)
    return 1 if any(one["errors"] or not one["chunks"] for one in results.values()) else 0


SERVICE = "manyhands serve"
PLAIN = "plain websocket server"


def _measure(settings: Settings, folder: Path) -> tuple[dict[str, dict[str, Any]], bool]:
    """Results by server."""
    results: dict[str, dict[str, Any]] = {}
    checkpoint = settings.checkpoint
    if checkpoint is None and not settings.address:
        checkpoint = folder / servers.TINY
        servers.make_tiny_checkpoint(checkpoint)
    with contextlib.ExitStack() as stack:
        own: servers.ServerProcess | None = None
        if not settings.address:
            assert checkpoint is not None
            own = stack.enter_context(
                servers.inference_service(servers.TINY, checkpoint, _serve_flags(settings), folder / "serve.log")
            )
        plan = make_plan(settings, own.address if own else settings.address)
        results[SERVICE], interrupted = _run(settings, plan, own, SERVICE)
    if settings.compare and not interrupted:
        assert checkpoint is not None
        with servers.plain_server(checkpoint, settings.device, settings.torch_threads, folder / "plain.log") as plain:
            changes = {"kind": "plain", "address": plain.address}
            results[PLAIN], interrupted = _run(settings, plan.model_copy(update=changes), plain, PLAIN)
    return results, interrupted


def _run(settings: Settings, plan: Plan, own: servers.ServerProcess | None, name: str) -> tuple[dict[str, Any], bool]:
    workers = settings.processes or fleet.num_workers(plan)
    before_s = (own.cpu_s(), own.loop_cpu_s()) if own else (math.nan, math.nan)
    with _progress(name, plan.ramp_up_s + plan.seconds) as on_progress:
        tally, seconds, interrupted = fleet.run(plan, min(workers, plan.fleet), on_progress)
    after_s = (own.cpu_s(), own.loop_cpu_s()) if own else (math.nan, math.nan)
    return report.summarise(
        tally,
        robots=plan.fleet,
        seconds=seconds,
        replan_interval_steps=plan.replan_interval_steps,
        server_cpu_s=after_s[0] - before_s[0],
        server_loop_cpu_s=after_s[1] - before_s[1],
    ), interrupted


@contextlib.contextmanager
def _progress(name: str, seconds: float) -> Iterator[Any]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[counts]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=seconds, counts="")

        def update(elapsed_s: float, counts: Counter[str]) -> None:
            text = f"{counts['requests']} requests, {counts['missed']} missed, {counts['errors']} errors"
            bar.update(task, completed=min(elapsed_s, seconds), counts=text)

        yield update


def make_plan(settings: Settings, address: str) -> Plan:
    """Asks the server what it serves.

    Raises:
        InvalidInput, NotFound, Refused: The settings do not fit what is served; the message says how.
    """
    with InferenceClient(address, security_settings=settings.security) as client:
        model = _choose(client.list_models(), settings)
    spec = robot_spec(Spec.from_proto(model.spec), settings.camera_px)
    steps = settings.replan_interval_steps or round(spec.control_rate_hz / settings.rate_hz)
    if settings.replan_interval_steps > model.chunk_horizon:
        raise InvalidInput(
            f"is {settings.replan_interval_steps}, chunks have {model.chunk_horizon} actions", field="replan_interval_steps"
        )
    return Plan(
        kind="service",
        address=address,
        model=model.name,
        spec=spec.to_proto().SerializeToString().hex(),
        task=settings.task,
        # Two tests of one server at a time must not take each other's robots.
        name=f"loadtest-{os.getpid()}-{time.time_ns() % 100000}",
        first=0,
        number=settings.robots,
        fleet=settings.robots,
        rate_hz=settings.rate_hz,
        seconds=settings.seconds,
        ramp_up_s=settings.ramp_up_s,
        begins_s=0.0,
        deadline_s=settings.deadline_ms / 1e3,
        jpeg_quality=settings.jpeg_quality,
        shared_memory=settings.shared_memory,
        replan_interval_steps=min(max(1, steps), model.chunk_horizon),
        with_prefix=settings.with_prefix,
        ask_every_s=settings.ask_every_s,
        ask_tokens=settings.ask_tokens,
        with_timeline=settings.timeline,
        security=settings.security,
    )


def robot_spec(model: Spec, camera_px: int) -> Spec:
    """A robot that fits the model, its cameras of another size where asked."""

    def resized(feature: Feature) -> Feature:
        if not camera_px or feature.kind is not FeatureKind.IMAGE:
            return feature
        return Feature(name=feature.name, kind=feature.kind, dtype=feature.dtype, shape=(camera_px, camera_px, 3))

    return Spec(
        observation=tuple(resized(feature) for feature in model.observation),
        action=model.action,
        control_rate_hz=model.control_rate_hz,
        robot_type=model.robot_type,
    )


def _choose(models: tuple[inference_pb2.Model, ...], settings: Settings) -> inference_pb2.Model:
    names = ", ".join(model.name for model in models)
    if not settings.model and len(models) != 1:
        raise InvalidInput(f"is needed: the server has {names or 'no models'}", field="model")
    chosen = next((model for model in models if model.name == settings.model or not settings.model), None)
    if chosen is None:
        raise NotFound(f"{settings.model!r} is not served; there are {names}", field="model")
    if settings.ask_every_s > 0 and not chosen.has_text_head:
        raise Refused(f"{chosen.name!r} has no text head; leave --ask-every-s at 0", field="ask_every_s")
    return chosen


def _serve_flags(settings: Settings) -> list[str]:
    flags = {
        "--device": settings.device,
        "--max-batch": str(settings.max_batch),
        "--torch-threads": str(settings.torch_threads),
        "--max-sessions": str(max(64, settings.robots)),
    }
    return [word for pair in flags.items() for word in pair]


def _check_can_compare(settings: Settings) -> None:
    if settings.address and settings.checkpoint is None:
        raise InvalidInput(
            "needs --checkpoint beside --address: the plain server runs on this machine, with the same policy",
            field="compare",
        )
    # Now, not after the first half of the test; the command line says what to install.
    import msgpack  # noqa: F401
    import websockets  # noqa: F401
