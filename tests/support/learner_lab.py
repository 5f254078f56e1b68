"""A store with a small dataset, a weights service and a learner, each a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import psutil

from manyhands import codec
from manyhands.clients.dataset import DatasetClient, EpisodeDigest
from manyhands.dataset.v1 import dataset_pb2
from manyhands.spec import Feature, FeatureKind, Spec

ROOT = Path(__file__).parents[2]
DATASET = "numbers"
SPEC = Spec(
    observation=(Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(4,)),),
    action=(Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(2,)),),
    control_rate_hz=20.0,
)
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Process:
    """One manyhands command; stop() or the context's end terminates it."""

    def __init__(self, folder: Path, name: str, *flags: str) -> None:
        self.log = folder / f"{name}-{uuid.uuid4().hex[:4]}.log"
        with self.log.open("w") as log:
            command = [sys.executable, "-m", "manyhands", name, *flags]
            self.process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT)
        self.address = ""

    def wait_ready(self, timeout_s: float = 90.0) -> Process:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for line in self.log.read_text().splitlines():
                if line.startswith("READY "):
                    self.address = line.split()[1]
                    return self
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> float:
        """Seconds that a clean end took."""
        started = time.monotonic()
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(20)
        return time.monotonic() - started


def wait_gone(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that are still there after timeout_s."""
    return [process for process in psutil.wait_procs(processes, timeout=timeout_s)[1] if process.is_running()]


def fill(store: str, *, num_episodes: int = 3, num_frames: int = 30) -> None:
    """Publishes episodes whose actions follow from the state."""
    rng = np.random.default_rng(0)
    with DatasetClient(store) as client:
        client.create_dataset(DATASET, SPEC)
        with client.open_append() as stream:
            for _ in range(num_episodes):
                stream.begin(DATASET, str(uuid.uuid4()), robot_id="lab", spec_digest=SPEC.digest)
                digest = EpisodeDigest()
                for sequence in range(num_frames):
                    state = rng.normal(size=4).astype(np.float32)
                    frame = dataset_pb2.Frame(
                        sequence=sequence,
                        task="follow the numbers",
                        observation=codec.encode_values({"observation.state": state}),
                        action=codec.encode_values({"action": state[:2] * 0.5}),
                        source=dataset_pb2.ACTION_SOURCE_TELEOPERATOR,
                    )
                    digest.add(frame)
                    stream.send(frame)
                stream.end(digest.frame_count, digest.sha256, dataset_pb2.EPISODE_END_SUCCESS)
        client.publish(DATASET)


def start_store(folder: Path) -> Process:
    store = Process(folder, "store", "--root", str(folder / "store"), "--address", "127.0.0.1:0").wait_ready()
    fill(store.address)
    return store


def start_weights(folder: Path, address: str = "127.0.0.1:0") -> Process:
    return Process(folder, "weights", "--root", str(folder / "weights"), "--address", address)


def start_learner(folder: Path, store: str, weights: str) -> Process:
    flags = ["--store", store, "--weights", weights, "--output", str(folder / "learner"), "--address", "127.0.0.1:0"]
    return Process(folder, "learner", *flags)
