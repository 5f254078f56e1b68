"""What it costs to have the model in a process of its own, and what it saves.

    python -m tests.benchmarks.bench_ring [--rows 2000] [--write]

First a row of three raw 224-pixel cameras to a model that does nothing and its chunk back, on one event loop: through the
shared-memory ring to an engine process, and to a thread of the same process, in turns. Then a small RPC of the service,
called by another process while the model holds its interpreter nine tenths of the time: in a thread, and in a process.
Last the front end's own work on pictures, on threads and in processes: whether decoding needs processes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import platform
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import uvloop

from manyhands import codec
from manyhands.clients.inference import InferenceClient
from manyhands.engine.v1 import engine_pb2
from manyhands.inference.v1 import inference_pb2_grpc
from manyhands.server import GrpcServer
from services.inference import engine_client
from services.inference.engine_port import Answer, EnginePort, Job, Observed, Outcome, Row
from services.inference.engine_supervisor import EngineSupervisor
from services.inference.main import SWITCH_INTERVAL_S
from services.inference.prepare import prepare_sample
from services.inference.service import SERVICE_NAME, InferenceServicer
from services.inference.sessions import fit
from tests.support.fake_engine import BUSY_S, CAMERA_SIZE, HORIZON, FakeEngine, description

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "docs" / "benchmarks" / f"{datetime.date.today().isoformat()}-engine-process.md"
CAMERA_PIXELS = 224
ROUNDS = 10
PACE_S = 0.004
BUSY_ROW_S, IDLE_S = 0.018, 0.002
DECODE_S = 3.0


class ThreadEngine(FakeEngine):
    """The same model in a thread of this process, as the engine was before it had a process."""

    def __init__(self, camera_size: int) -> None:
        super().__init__(camera_size)
        self._jobs: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def submit(self, **row: Any) -> None:
        self._jobs.put(row)

    def _run(self) -> None:
        while (row := self._jobs.get()) is not None:
            super().submit(**row)

    def stop(self) -> None:
        self._jobs.put(None)
        self._thread.join()


def make_row() -> Row:
    random_numbers = np.random.default_rng(0)
    observation: dict[str, Any] = {}
    for feature in description(CAMERA_PIXELS).used_spec.observation:
        high = 256 if feature.dtype == "uint8" else 1
        observation[feature.name] = random_numbers.integers(0, high, feature.shape).astype(feature.dtype)
    sample = Observed(observation=observation, task="open the drawer")
    return Row(sample=sample, prefix=None, delay_steps=0, execution_horizon=HORIZON, seed=1)


async def round_trip(engine: EnginePort, row: Row) -> None:
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[Outcome] = loop.create_future()

    def settle(result: Outcome) -> None:
        if not outcome.done():  # Nobody waits for it any more.
            outcome.set_result(result)

    def done(result: Outcome) -> None:
        loop.call_soon_threadsafe(settle, result)

    now_s = time.monotonic()
    job = Job(model="fake", row=row, done=done)
    engine.submit(owner="bench", request_id=1, arrived_s=now_s, deadline_s=now_s + 10.0, job=job)
    assert isinstance(await outcome, Answer)


async def time_round_trips(engine: EnginePort, rows: int, pace_s: float) -> list[float]:
    row = make_row()
    measured_s: list[float] = []
    for _ in range(rows):
        if pace_s:
            await asyncio.sleep(pace_s)
        began_s = time.perf_counter()
        await round_trip(engine, row)
        measured_s.append(time.perf_counter() - began_s)
    return measured_s


async def keep_busy(engine: EnginePort) -> None:
    row = make_row()
    while True:
        await round_trip(engine, row)
        await asyncio.sleep(IDLE_S)


async def time_calls(engine: EnginePort, calls: int) -> list[float]:
    """A small RPC of the service, called from another process, while the model is busy."""
    server = GrpcServer("127.0.0.1:0")
    servicer = InferenceServicer(engine)
    server.add(inference_pb2_grpc.add_InferenceServiceServicer_to_server, servicer, SERVICE_NAME)
    servicer.start()
    await server.start()
    load = asyncio.create_task(keep_busy(engine))
    caller = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.benchmarks.bench_ring", "--caller", server.address, "--rows", str(calls)),
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    output, _ = await caller.communicate()
    load.cancel()
    await asyncio.gather(load, return_exceptions=True)
    await servicer.drain()
    await server.stop(0.1)
    servicer.close()
    return list(json.loads(output))


def call(address: str, calls: int) -> None:
    """The other process."""
    measured_s = []
    with InferenceClient(address) as client:
        for _ in range(20):
            client.list_models()
        for _ in range(calls):
            time.sleep(PACE_S)
            began_s = time.perf_counter()
            client.list_models()
            measured_s.append(time.perf_counter() - began_s)
    print(json.dumps(measured_s))


def decode_for(seconds: float, threads: int) -> float:
    """Requests of three JPEG cameras decoded and checked a second."""
    cv2.setNumThreads(1)
    spec = description(CAMERA_PIXELS).used_spec
    rows, columns = np.mgrid[0:CAMERA_PIXELS, 0:CAMERA_PIXELS]
    picture = np.stack([127 + 60 * (np.sin(rows / 17 + c) + np.cos(columns / 11)) for c in range(3)], 2).astype(np.uint8)
    values = {
        feature.name: picture if feature.dtype == "uint8" else np.zeros(feature.shape, dtype=feature.dtype)
        for feature in spec.observation
    }
    encoded = codec.encode_values(values)
    robot_fit = fit(spec, spec, masks_cameras=False)
    until_s = time.monotonic() + seconds

    def work() -> int:
        done = 0
        while time.monotonic() < until_s:
            prepare_sample(encoded, "open the drawer", robot_fit=robot_fit, model_spec=spec)
            done += 1
        return done

    with ThreadPoolExecutor(threads) as pool:
        return sum(future.result() for future in [pool.submit(work) for _ in range(threads)]) / seconds


def decode_in_processes(seconds: float, processes: int) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.bench_ring", "--decoder", str(seconds)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(processes)]
    return sum(float(process.communicate()[0]) for process in running)


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


async def measure(rows: int, calls: int) -> dict[str, list[float]]:
    engine_client.ENGINE_MODULE = "tests.support.fake_engine"
    times: dict[str, list[float]] = {
        f"{name}, {pace}": [] for pace in ("back to back", "paced") for name in ("process", "thread")
    }
    start = engine_pb2.Start(log_level="warning")
    with environment(**{CAMERA_SIZE: str(CAMERA_PIXELS)}):
        supervisor = EngineSupervisor(start)
        await supervisor.start()
        thread = ThreadEngine(CAMERA_PIXELS)
        engines: tuple[tuple[str, EnginePort], ...] = (("process", supervisor), ("thread", thread))
        for _, engine in engines:
            await time_round_trips(engine, 200, 0.0)
        for _ in range(ROUNDS):  # In turns: what else the machine does falls on both.
            for pace, pace_s in (("back to back", 0.0), ("paced", PACE_S)):
                for name, engine in engines:
                    times[f"{name}, {pace}"] += await time_round_trips(engine, rows // ROUNDS, pace_s)
        await supervisor.stop()
        thread.stop()
    with environment(**{CAMERA_SIZE: str(CAMERA_PIXELS), BUSY_S: str(BUSY_ROW_S)}):
        supervisor = EngineSupervisor(start)
        await supervisor.start()
        thread = ThreadEngine(CAMERA_PIXELS)
        for name, engine in (("process", supervisor), ("thread", thread)) * 2:  # type: ignore[assignment]
            times.setdefault(f"calls beside a busy {name}", []).extend(await time_calls(engine, calls // 2))
        await supervisor.stop()
        thread.stop()
    return times


def p50_p99_ms(seconds: Sequence[float]) -> str:
    p50, p99 = np.percentile(seconds, (50, 99)) * 1e3
    return f"{p50:.3f} | {p99:.3f}"


def report(times: dict[str, list[float]], decoded: dict[str, float], load: float) -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    lines_of_cpu = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines_of_cpu if "model name" in line), platform.processor())
    busy = BUSY_ROW_S / (BUSY_ROW_S + IDLE_S)
    lines = [
        "# A model in a process of its own: what the ring costs, what it saves",
        "",
        f"`python -m tests.benchmarks.bench_ring` at {commit}: {os.cpu_count()} cores of {cpu}, Python "
        f"{platform.python_version()}; load average {load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end.",
        "",
        f"A row of three raw {CAMERA_PIXELS}-pixel cameras ({3 * 3 * CAMERA_PIXELS**2 / 1e6:.2f} MB) from the front end's "
        f"loop (uvloop) to a model that does nothing, and its chunk of {HORIZON} actions back. Into the ring it is copied, "
        "and out of it; to a thread it goes by reference.",
        "",
        "| row to chunk, ms | p50 | p99 |",
        "|---|---|---|",
    ]
    lines += [f"| engine in a {name} | {p50_p99_ms(seconds)} |" for name, seconds in times.items() if "," in name]
    lines += [
        "",
        f"`ListModels` of the service, called by another process every {PACE_S * 1e3:g} ms while the model holds its "
        f"interpreter {busy:.0%} of the time (pure Python; switch interval {SWITCH_INTERVAL_S * 1e3:g} ms). Caller, front "
        "end and model share the cores.",
        "",
        "| call, ms | p50 | p99 |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {p50_p99_ms(seconds)} |" for name, seconds in times.items() if "," not in name]
    lines += [
        "",
        f"Requests of three {CAMERA_PIXELS}-pixel JPEG cameras (quality 95) decoded and checked by the front end's code:",
        "",
        "| where | requests/s |",
        "|---|---|",
    ]
    lines += [f"| {name} | {rate:.0f} |" for name, rate in decoded.items()]
    if load > (os.cpu_count() or 1) / 2:
        lines += ["", f"**The machine ran other jobs (load {load:.1f}): the p99 are mostly theirs.**"]
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--decoder", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--caller", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=f"write {REPORT.relative_to(ROOT)}")
    options = parser.parse_args()
    if options.caller:
        call(options.caller, options.rows)
        return 0
    if options.decoder:
        print(decode_for(options.decoder, 1))
        return 0
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    load = os.getloadavg()[0]
    times = uvloop.run(measure(options.rows, options.rows // 2))
    decoded = {
        "one thread": decode_for(DECODE_S, 1),
        "two threads": decode_for(DECODE_S, 2),
        "two processes": decode_in_processes(DECODE_S, 2),
    }
    text = report(times, decoded, load)
    print(text)
    if options.write:
        REPORT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
