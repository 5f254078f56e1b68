"""From an observation in the robot's memory to its chunk, through real sockets and real processes, with 1, 3 and 16 robots.

    python -m tests.benchmarks.bench_inference [--seconds 20] [--rate-hz 5] [--robots 1 3 16]

In the same run, as the floor: the policy called in process, and a bare gRPC stream that carries the same bytes both ways
through a server that does nothing. Writes docs/benchmarks/2026-11-22-inference.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from manyhands import channel, codec
from manyhands.clients.act_stream import ActStream, Chunk
from manyhands.clients.inference import InferenceClient
from manyhands.common.v1 import common_pb2
from manyhands.inference.v1 import inference_pb2
from manyhands.server import SERVER_OPTIONS
from manyhands.spec import Feature, FeatureKind, Spec

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "docs" / "benchmarks" / f"{datetime.date.today().isoformat()}-inference.md"
CAMERAS = ("observation.images.front", "observation.images.wrist")
CAMERA_SIZE, STATE_SIZE, ACTION_SIZE, HORIZON = 128, 39, 4, 16
CONTROL_RATE_HZ = 20.0
ROBOTS_PER_PROCESS = 4
DEADLINE_S = 0.2
ECHO_METHOD = "/bench.Echo/Stream"
SERVER_STAGES = ("decode", "queue", "prefix", "sample", "postprocess")
STAGES = ("encode", "transport", *SERVER_STAGES, "hand-over", "observation to chunk")

SPEC = Spec(
    observation=(
        Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(STATE_SIZE,)),
        *(
            Feature(name=name, kind=FeatureKind.IMAGE, dtype="uint8", shape=(CAMERA_SIZE, CAMERA_SIZE, 3))
            for name in CAMERAS
        ),
    ),
    action=(Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(ACTION_SIZE,)),),
    control_rate_hz=CONTROL_RATE_HZ,
)

Times = dict[str, list[float]]


def make_observations(seed: int, number: int = 8) -> list[dict[str, npt.NDArray[np.generic]]]:
    """Smooth pictures with some noise, as a camera's: pure noise would make JPEG ten times too big."""
    random_numbers = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:CAMERA_SIZE, 0:CAMERA_SIZE]
    observations = []
    for index in range(number):
        observation: dict[str, npt.NDArray[np.generic]] = {
            "observation.state": random_numbers.normal(size=STATE_SIZE).astype(np.float32)
        }
        for camera, name in enumerate(CAMERAS):
            waves = np.stack([np.sin((rows + 9 * index) / 17 + c) + np.cos(columns / (11 + camera)) for c in range(3)], 2)
            noise = random_numbers.normal(scale=6.0, size=waves.shape)
            observation[name] = np.clip(127 + 60 * waves + noise, 0, 255).astype(np.uint8)
        observations.append(observation)
    return observations


def encode_request(observation: dict[str, npt.NDArray[np.generic]], seed: int) -> inference_pb2.ActRequest:
    request = inference_pb2.ActRequest(
        observation=common_pb2.Observation(values=codec.encode_values(observation)), task="open the drawer"
    )
    request.noise_seed = seed
    request.deadline.FromMilliseconds(int(DEADLINE_S * 1e3))
    return request


def drive(stream: ActStream, times: Times, *, rate_hz: float, start_s: float, seconds: float, seed: int) -> None:
    """One robot: at each tick an observation is encoded and sent, and its chunk awaited."""
    observations = make_observations(seed)
    for tick in range(int(seconds * rate_hz)):
        time.sleep(max(0.0, start_s + tick / rate_hz - time.monotonic()))
        began = time.perf_counter()
        request = encode_request(observations[tick % len(observations)], tick)
        encoded = time.perf_counter()
        stream.send_message(request)
        reply = stream.receive(10.0)
        finished = time.perf_counter()
        assert reply is not None
        if tick < rate_hz:  # The first second warms both sides up.
            continue
        if not isinstance(reply.result, Chunk):
            times["refused"].append(1.0)
            continue
        times["encode"].append(encoded - began)
        times["transport"].append(finished - encoded - reply.stage_s["total"])
        for stage in SERVER_STAGES:
            times[stage].append(reply.stage_s[stage])
        times["hand-over"].append(reply.stage_s["total"] - sum(reply.stage_s[stage] for stage in SERVER_STAGES))
        times["observation to chunk"].append(finished - began)
        times["batch"].append(reply.batch_size)


def drive_echo(send: Any, receive: Any, times: Times, *, rate_hz: float, start_s: float, seconds: float, seed: int) -> None:
    payloads = [encode_request(observation, 0).SerializeToString() for observation in make_observations(seed)]
    for tick in range(int(seconds * rate_hz)):
        time.sleep(max(0.0, start_s + tick / rate_hz - time.monotonic()))
        began = time.perf_counter()
        send(payloads[tick % len(payloads)])
        receive()
        if tick >= rate_hz:
            times["echo"].append(time.perf_counter() - began)


def robots_process(kind: str, address: str, first: int, number: int, of: int, rate_hz: float, seconds: float) -> None:
    """Child: some of the robots, a thread each; prints their times as JSON."""
    times: Times = defaultdict(list)
    start_s = time.monotonic() + 1.0
    threads = []
    sessions: list[str] = []
    with InferenceClient(address) as client, channel.connect(address) as raw:
        for index in range(first, first + number):
            robot_start_s = start_s + index / of / rate_hz  # Evenly out of step, as independent robots are.
            if kind == "serve":
                session = client.open_session(
                    robot_id=f"robot{index}",
                    client_id=uuid.uuid4().hex,
                    model="tiny",
                    spec=SPEC,
                    replan_interval_steps=int(CONTROL_RATE_HZ / rate_hz),
                )
                sessions.append(session.session_id)
                target, ends = drive, (client.act_stream(session.session_id), times)
            else:
                target, ends = drive_echo, (*echo_stream(raw), times)  # type: ignore[assignment]
            options = {"rate_hz": rate_hz, "start_s": robot_start_s, "seconds": seconds, "seed": index}
            threads.append(threading.Thread(target=target, args=ends, kwargs=options))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for session_id in sessions:
            client.close_session(session_id)
    print(json.dumps(times))


def echo_stream(raw: grpc.Channel) -> tuple[Any, Any]:
    import queue

    outgoing: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def requests() -> Iterator[bytes]:
        while True:
            yield outgoing.get()

    call = raw.stream_stream(ECHO_METHOD)(requests())
    return outgoing.put, lambda: next(call)


def echo_process() -> None:
    """Child: answers every request with as many bytes as a chunk has, and does nothing else."""
    import uvloop

    chunk = inference_pb2.ActResponse(session_id="0" * 32, request_id=1)
    for tensor in (chunk.chunk.actions, chunk.chunk.model_actions):
        tensor.CopyFrom(codec.encode_tensor(np.zeros((HORIZON, ACTION_SIZE), dtype=np.float32)))
    answer = chunk.SerializeToString()

    async def stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for _ in requests:
            yield answer

    async def run() -> None:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(stream)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", {"Stream": handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        print(f"READY 127.0.0.1:{port}", flush=True)
        await server.wait_for_termination()

    uvloop.run(run())


def make_checkpoint(folder: Path) -> Any:
    import torch

    from policies import checkpoint

    torch.manual_seed(0)
    torch.set_num_threads(1)
    policy = checkpoint.build("flow", {"horizon": HORIZON, "cameras": list(CAMERAS)}, SPEC)

    def statistics(size: int) -> dict[str, npt.NDArray[np.float64]]:
        values = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0, "q01": -1.0, "q99": 1.0}
        return {name: np.full(size, value) for name, value in values.items()}

    policy.set_statistics({"observation.state": statistics(STATE_SIZE), "action": statistics(ACTION_SIZE)})
    checkpoint.save(policy, folder)
    return policy


def time_policy(policy: Any, *, rate_hz: float, seconds: float) -> list[float]:
    """The policy alone, in this process, from arrays to actions, at a robot's pace: caches are as cold as in the server."""
    import torch

    from policies.policy import Sample

    observations = make_observations(0)
    measured_s: list[float] = []
    with torch.inference_mode():
        for index in range(int(rate_hz * seconds)):
            time.sleep(1 / rate_hz)
            began = time.perf_counter()
            inputs = policy.preprocess(
                [Sample(observation=observations[index % 8], task="open the drawer")], torch.device("cpu")
            )
            policy.postprocess(policy.act(inputs, policy.draw_noise([index])), inputs)
            measured_s.append(time.perf_counter() - began)
    return measured_s[int(rate_hz) :]


def start(*command: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("READY "):
            return process, line.split()[1]
    raise SystemExit(f"{' '.join(command)} did not start")


def run_robots(kind: str, address: str, number: int, rate_hz: float, seconds: float) -> Times:
    """number robots in as few processes as ROBOTS_PER_PROCESS allows; their times together."""
    children = []
    for first in range(0, number, ROBOTS_PER_PROCESS):
        count = min(ROBOTS_PER_PROCESS, number - first)
        arguments = [kind, address, str(first), str(count), str(number), str(rate_hz), str(seconds)]
        children.append(
            subprocess.Popen([sys.executable, __file__, "--role", *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        )
    merged: Times = defaultdict(list)
    for child in children:
        output, _ = child.communicate(timeout=seconds + 60)
        for name, values in json.loads(output).items():
            merged[name].extend(values)
    return merged


def percentiles_ms(seconds: Sequence[float]) -> str:
    if not seconds:
        return "-"
    p50, p99 = np.percentile(seconds, (50, 99)) * 1e3
    return f"{p50:.2f} / {p99:.2f}"


def report(
    results: dict[int, Times],
    floors: dict[int, Times],
    policy_s: list[float],
    load: float,
    options: argparse.Namespace,
) -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    cpu = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    counts = list(results)
    request_kib = len(encode_request(make_observations(0)[0], 0).SerializeToString()) / 1024
    lines = [
        "# Observation to chunk through the inference service",
        "",
        f"`python -m tests.benchmarks.bench_inference` at {commit}: {os.cpu_count()} cores of {cpu}, Python "
        f"{platform.python_version()}; load average {load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end.",
        "",
        f"Each robot sends {STATE_SIZE} numbers and two {CAMERA_SIZE} px JPEG cameras (quality 95, {request_kib:.1f} KiB a "
        f"request) {options.rate_hz:g} times a second for {options.seconds:g} s, the first second left out, and waits for a "
        f"chunk of {HORIZON} actions. One server: a front end and its engine process (flow policy with both cameras, plain "
        f"module on the CPU, one torch thread, at most 4 robots a pass); {ROBOTS_PER_PROCESS} robots a client process. "
        "All on the same cores, so the clients' own work is in the figures.",
        "",
        *busy_machine(load),
        "p50 / p99, ms:",
        "",
        "| stage | " + " | ".join(f"{count} robot{'s' if count > 1 else ''}" for count in counts) + " |",
        "|---|" + "---|" * len(counts),
    ]
    names = {
        "encode": "encode JPEG (robot)",
        "transport": "transport: both sockets, serialising, waking up",
        "decode": "decode and check (server)",
        "queue": "wait for the model",
        "prefix": "to tensors",
        "sample": "model, 10 Euler steps",
        "postprocess": "to the robot's units",
        "hand-over": "between the server's threads",
        "observation to chunk": "**observation to chunk**",
    }
    for stage in STAGES:
        lines.append(f"| {names[stage]} | " + " | ".join(percentiles_ms(results[count][stage]) for count in counts) + " |")
    lines += [
        "| *floor: policy called in process, one robot's pace* | "
        + " | ".join([percentiles_ms(policy_s)] * len(counts))
        + " |",
        "| *floor: bare gRPC echo, same bytes, as many robots* | "
        + " | ".join(percentiles_ms(floors[count]["echo"]) for count in counts)
        + " |",
        "| p50 added over both floors and the encoding | "
        + " | ".join(f"{added_ms(results[count], floors[count], policy_s):.2f}" for count in counts)
        + " |",
        "| chunks; refused; mean robots a pass | "
        + " | ".join(
            f"{len(results[count]['sample'])}; {len(results[count]['refused'])}; {np.mean(results[count]['batch']):.2f}"
            for count in counts
        )
        + " |",
        "",
    ]
    return "\n".join(lines)


def busy_machine(load: float) -> list[str]:
    cores = os.cpu_count() or 1
    if load <= cores / 2:
        return []
    return [
        f"**The machine ran other jobs (load {load:.1f} on {cores} cores).** The p99 and the differences from the "
        "floors are mostly theirs; run it again on a quiet machine.",
        "",
    ]


def added_ms(times: Times, floor: Times, policy_s: list[float]) -> float:
    def p50(seconds: Sequence[float]) -> float:
        return float(np.median(seconds))

    floor_s = p50(policy_s) + p50(floor["echo"]) + p50(times["encode"])
    return (p50(times["observation to chunk"]) - floor_s) * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/<date>-inference.md")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rate-hz", type=float, default=5.0)
    parser.add_argument("--robots", type=int, nargs="+", default=[1, 3, 16])
    options = parser.parse_args()
    if options.role:
        if options.role == ["echo"]:
            echo_process()
            return 0
        kind, address, first, number, of, rate_hz, seconds = options.role
        robots_process(kind, address, int(first), int(number), int(of), float(rate_hz), float(seconds))
        return 0
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint_folder = Path(folder) / "tiny"
        policy_s = time_policy(make_checkpoint(checkpoint_folder), rate_hz=options.rate_hz, seconds=options.seconds)
        echo, echo_address = start(sys.executable, __file__, "--role", "echo")
        serve, serve_address = start(
            sys.executable, "-m", "manyhands", "serve", "--model", f"tiny={checkpoint_folder}", "--address", "127.0.0.1:0"
        )
        try:
            floors = {
                count: run_robots("echo", echo_address, count, options.rate_hz, options.seconds / 2)
                for count in options.robots
            }
            results = {
                count: run_robots("serve", serve_address, count, options.rate_hz, options.seconds)
                for count in options.robots
            }
        finally:
            for process in (echo, serve):
                process.terminate()
                process.wait(10.0)
    text = report(results, floors, policy_s, load, options)
    print(text)
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    if options.write:
        REPORT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
