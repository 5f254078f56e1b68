"""CPU and latency of the inference service's front end, beside a websocket and msgpack server that does the same work.

    python -m tests.benchmarks.bench_front_end [--seconds 15] [--rate-hz 5] [--robots 1 8 16] [--write]

Runs `manyhands loadtest --compare` with a tiny policy behind three 224-pixel JPEG cameras, one row a pass in both servers,
and measures what a request costs without any server: decoding, preparing and the policy in one process; then ours again
with pictures through shared memory. With --write the result goes to docs/benchmarks/<date>-front-end.md.
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
import time
from pathlib import Path
from typing import Any

import numpy as np

from manyhands import codec
from manyhands.spec import Feature, FeatureKind, Spec

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "docs" / "benchmarks" / f"{datetime.date.today().isoformat()}-front-end.md"
CAMERAS = tuple(f"observation.images.{name}" for name in ("front", "left_wrist", "right_wrist"))
CAMERA_PX, STATE_SIZE = 224, 14
OURS = "manyhands serve"
SPEC = Spec(
    observation=(
        Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(STATE_SIZE,)),
        *(Feature(name=name, kind=FeatureKind.IMAGE, dtype="uint8", shape=(CAMERA_PX, CAMERA_PX, 3)) for name in CAMERAS),
    ),
    action=(Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(STATE_SIZE,)),),
    control_rate_hz=50.0,
)


def make_checkpoint(folder: Path) -> Any:
    import torch

    from policies import checkpoint

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = {"horizon": 50, "cameras": list(CAMERAS), "width": 64, "num_blocks": 1, "num_steps": 2}
    policy = checkpoint.build("flow", config, SPEC)
    statistics = {
        name: np.full(STATE_SIZE, value)
        for name, value in {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0, "q01": -1.0, "q99": 1.0}.items()
    }
    policy.set_statistics({"observation.state": statistics, "action": statistics})
    checkpoint.save(policy, folder)
    return policy.eval()


def work_alone_ms(policy: Any, number: int = 300) -> tuple[float, float, float]:
    """(CPU, wall p50) of decoding and the policy for a request in one process, and the request's KiB."""
    import cv2
    import torch

    from policies.policy import Sample
    from services.loadtest import observations

    cv2.setNumThreads(1)
    names = tuple(feature.name for feature in SPEC.observation)
    values = observations.encode(observations.make(SPEC, names, 0), 95)
    wall_s: list[float] = []
    with torch.inference_mode():
        for index in range(number + 20):
            if index == 20:
                before_s = time.process_time()
            began = time.perf_counter()
            observation: dict[str, Any] = {
                value.name: codec.decode_image(value.image)
                if value.WhichOneof("value") == "image"
                else codec.decode_tensor(value.tensor)
                for value in values
            }
            inputs = policy.preprocess([Sample(observation=observation, task="open the drawer")], torch.device("cpu"))
            chunk = policy.act(inputs, policy.draw_noise([index]))
            policy.postprocess(chunk, inputs)
            wall_s.append(time.perf_counter() - began)
    cpu_s = time.process_time() - before_s
    return cpu_s / number * 1e3, float(np.median(wall_s[20:])) * 1e3, sum(value.ByteSize() for value in values) / 1024


def run(checkpoint: Path, robots: int, options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """What robots saw, by server."""
    compared, shared = (_load(checkpoint, robots, options, folder, flag) for flag in ("--compare", "--shared-memory"))
    plain = compared.pop("plain_server")
    return {OURS: compared, "websocket + msgpack": plain, f"{OURS}, pictures through shared memory": shared}


def _load(checkpoint: Path, robots: int, options: argparse.Namespace, folder: Path, flag: str) -> dict[str, Any]:
    output = folder / "loadtest.json"
    flags = ["--robots", str(robots), "--rate-hz", str(options.rate_hz), "--seconds", str(options.seconds), flag]
    command = [sys.executable, "-m", "manyhands", "loadtest", "--max-batch", "1", "--json", str(output)]
    subprocess.run([*command, *flags, "--checkpoint", str(checkpoint)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def report(
    results: dict[int, dict[str, dict[str, Any]]],
    alone: tuple[float, float, float],
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
    alone_cpu_ms, alone_wall_ms, request_kib = alone
    lines = [
        "# The inference service's front end beside a plain websocket server",
        "",
        f"`python -m tests.benchmarks.bench_front_end` at {commit}: {os.cpu_count()} cores of {cpu}, Python "
        f"{platform.python_version()}; load average {load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end.",
        "",
        f"Each robot sends {STATE_SIZE} numbers and three {CAMERA_PX} px JPEG cameras (quality 95, {request_kib:.0f} KiB) "
        f"{options.rate_hz:g} times a second for {options.seconds:g} s over loopback and waits for 50 actions. Both servers "
        "run the same tiny flow policy, one row a pass, one torch thread; ours is `manyhands serve`, the other "
        "`services/loadtest/plain_server.py` (websocket, msgpack, all in one loop). First ours, then the plain one, then "
        "ours with pictures that are not encoded, for each number of robots. Everything on the same cores.",
        "",
        f"Decoding, preparing and the policy alone, in one process without a server: {alone_cpu_ms:.2f} ms of CPU, "
        f"{alone_wall_ms:.2f} ms p50.",
        "",
        "| robots | server | p50 ms | p99 ms | requests | missed | errors | CPU ms a request | beside work | on the loop |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for robots, result in results.items():
        for name, one in result.items():
            latency, cpu_ms = one["latency_ms"], one["server_cpu_ms_per_request"]
            lines.append(
                f"| {robots} | {name} | {latency['p50']:.2f} | {latency['p99']:.2f} | {one['requests']} | "
                f"{one['missed_deadlines']} | {one['errors']} | {cpu_ms:.2f} | {cpu_ms - alone_cpu_ms:.2f} | "
                f"{one['server_loop_cpu_ms_per_request']:.2f} |"
            )
    lines += [
        "",
        "*Beside work* is CPU a request less that of the work alone; *on the loop* is the main thread's, which bounds how "
        "many robots one front end carries: the plain server's holds all the work.",
    ]
    if load > (os.cpu_count() or 1) / 2:
        lines += ["", "**The machine ran other jobs meanwhile**: trust the ratios of one row to the next, not the p99."]
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/<date>-front-end.md")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--rate-hz", type=float, default=5.0)
    parser.add_argument("--robots", type=int, nargs="+", default=[1, 8, 16])
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone = work_alone_ms(make_checkpoint(folder / "tiny"))
        results = {robots: run(folder / "tiny", robots, options, folder) for robots in options.robots}
    text = report(results, alone, load, options)
    print(text)
    if options.write:
        REPORT.parent.mkdir(parents=True, exist_ok=True)
        REPORT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
