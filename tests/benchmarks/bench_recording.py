"""How fast a store takes episodes over real sockets, what that costs, and how soon a frame is safe.

    python tests/benchmarks/bench_recording.py [--frames 300] [--write]

Floor, in the same run: appending the same bytes to a file with an fdatasync for every 20 frames, no checks, no sockets.
Rate: recorders that send as fast as they are let; what they wait for is the queue. Pace: three recorders at 20 Hz, as in the
demo: acknowledgement latency and CPU.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from manyhands import codec
from manyhands.clients.dataset import EpisodeDigest
from manyhands.common.v1 import common_pb2
from manyhands.dataset.v1 import dataset_pb2
from manyhands.framelog import LogWriter
from manyhands.spec import Feature, FeatureKind, Spec
from tests.support.store_lab import StoreProcess

SIZES = ((128, 128), (480, 640))
RATE_HZ = 20


@dataclass(frozen=True, kw_only=True)
class Result:
    name: str
    frames_per_s: float
    frames_per_cpu_s: float
    ack_p50_ms: float
    ack_p99_ms: float
    publish_s: float


def spec_of(height: int, width: int) -> Spec:
    cameras = tuple(
        Feature(name=f"observation.images.{name}", kind=FeatureKind.IMAGE, dtype="uint8", shape=(height, width, 3))
        for name in ("top", "wrist")
    )
    state = Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(39,))
    action = Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(4,))
    return Spec(observation=(state, *cameras), action=(action,), control_rate_hz=float(RATE_HZ), robot_type="bench")


def make_frames(spec: Spec, count: int) -> list[dataset_pb2.Frame]:
    """A textured scene that moves a little from frame to frame, with sensor noise."""
    rng = np.random.default_rng(0)
    height, width = spec.images[0].shape[:2]
    scene = rng.integers(40, 216, (height // 8, width // 8, 3)).astype(np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    pictures = []
    for step in range(20):
        noisy = np.roll(scene, step, axis=1).astype(np.int16) + rng.integers(-3, 4, scene.shape)
        pictures.append(codec.encode_image(noisy.clip(0, 255).astype(np.uint8)))
    frames = []
    for sequence in range(count):
        values = codec.encode_values({"observation.state": rng.normal(size=39).astype(np.float32)})
        for camera in spec.images:
            values.append(common_pb2.NamedValue(name=camera.name, image=pictures[sequence % len(pictures)]))
        frames.append(
            dataset_pb2.Frame(
                sequence=sequence,
                task="reach the red block",
                observation=values,
                action=codec.encode_values({"action": rng.normal(size=4).astype(np.float32)}),
                source=dataset_pb2.ACTION_SOURCE_TELEOPERATOR,
            )
        )
    return frames


def floor(frames: Sequence[dataset_pb2.Frame], folder: Path) -> Result:
    payloads = [frame.SerializeToString(deterministic=True) for frame in frames]
    syncs = []
    cpu, start = time.process_time(), time.perf_counter()
    with LogWriter(folder / "floor.log") as log:
        for number, payload in enumerate(payloads):
            log.append(payload)
            if number % 20 == 19:
                before = time.perf_counter()
                log.sync()
                syncs.append(time.perf_counter() - before)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    return result("append + fdatasync of 20 (floor)", len(frames), wall, cpu, syncs, 0.0)


def record(
    store: StoreProcess, spec: Spec, frames: Sequence[dataset_pb2.Frame], *, writers: int, paced: bool, dataset: str
) -> Result:
    latencies: list[float] = []

    def run() -> None:
        with store.client() as client, client.open_append() as stream:
            stream.begin(dataset, str(uuid.uuid4()), robot_id="bench", spec_digest=spec.digest)
            digest = EpisodeDigest()
            sent: list[float] = []
            watcher = threading.Thread(target=watch, args=(stream, sent, len(frames), latencies))
            watcher.start()
            began = time.perf_counter()
            for frame in frames:
                if paced:
                    time.sleep(max(0.0, began + frame.sequence / RATE_HZ - time.perf_counter()))
                digest.add(frame)
                sent.append(time.perf_counter())
                stream.send(frame, timeout_s=60)
            stream.end(digest.frame_count, digest.sha256, dataset_pb2.EPISODE_END_SUCCESS, timeout_s=60)
            watcher.join()

    process = psutil.Process(store.pid)
    with store.client() as client:
        client.create_dataset(dataset, spec)
        threads = [threading.Thread(target=run) for _ in range(writers)]
        before, start = cpu_s(process), time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wall = time.perf_counter() - start
        client.publish(dataset)
        publish = time.perf_counter() - start - wall
        cpu = cpu_s(process) - before  # Receiving, checking, logging, encoding, publishing: all of it.
    name = f"{writers} writer{'s' if writers > 1 else ''}" + (f" at {RATE_HZ} Hz" if paced else "")
    return result(name, writers * len(frames), wall, cpu, latencies, publish)


def watch(stream: object, sent: Sequence[float], count: int, latencies: list[float]) -> None:
    """Notes for each frame how long after send() its acknowledgement was seen."""
    known = -1
    while known < count - 1:
        stream.wait_durable(known + 1, timeout_s=60)  # type: ignore[attr-defined]
        now = time.perf_counter()
        durable = stream.durable_sequence  # type: ignore[attr-defined]
        latencies += [now - sent[sequence] for sequence in range(known + 1, durable + 1)]
        known = durable


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def result(name: str, frames: int, wall: float, cpu: float, latencies: Sequence[float], publish: float) -> Result:
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
    return Result(
        name=name,
        frames_per_s=frames / wall,
        frames_per_cpu_s=frames / cpu,
        ack_p50_ms=float(p50),
        ack_p99_ms=float(p99),
        publish_s=publish,
    )


def hardware() -> str:
    lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = lines[0].partition(":")[2].strip() if lines else platform.machine()
    return f"{os.cpu_count()} x {model}, load {os.getloadavg()[0]:.1f} at the start"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=300, help="of an episode")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/<date>-recording.md")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    lines = [
        "# Recording into the store",
        "",
        f"{hardware()}; commit {commit}; {options.frames} frames an episode, 2 JPEG cameras, state of 39, h264 ultrafast.",
        "Frames a CPU second count all work of the store process: receiving, checking, logging, encoding, publishing.",
        "Acknowledgement: from the recorder's send() until it knows that the frame is on the store's disk.",
        "",
        "| pictures | recording | frames/s | frames/CPU-s | ack p50 (ms) | ack p99 (ms) | publish after the end (s) |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder, StoreProcess(Path(folder) / "store", "--publish-delay-s", "600") as store:
        for height, width in SIZES:
            spec = spec_of(height, width)
            frames = make_frames(spec, options.frames)
            size = f"{height}x{width}, {frames[0].ByteSize() / 1e3:.0f} kB"
            results = [floor(frames, Path(folder))]
            for writers, paced in ((1, False), (3, False), (3, True)):
                dataset = f"d{height}-{writers}-{'paced' if paced else 'free'}"
                results.append(record(store, spec, frames, writers=writers, paced=paced, dataset=dataset))
            for r in results:
                lines.append(
                    f"| {size} | {r.name} | {r.frames_per_s:.0f} | {r.frames_per_cpu_s:.0f} | {r.ack_p50_ms:.1f} | "
                    f"{r.ack_p99_ms:.1f} | {r.publish_s:.2f} |"
                )
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        date = datetime.date.today().isoformat()
        Path(f"docs/benchmarks/{date}-recording.md").write_text(text)


if __name__ == "__main__":
    main()
