"""Servers of the tool's own: the inference service with a tiny policy, and the plain one to compare it with."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil

from manyhands.errors import Refused, TooLate
from manyhands.processes import end_with_parent
from manyhands.spec import Feature, FeatureKind, Spec

READY_PREFIX = "READY "
READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 8.0
LOG_LINES_SHOWN = 15

TINY = "tiny"
TINY_CAMERAS = ("observation.images.front", "observation.images.wrist")
TINY_SPEC = Spec(
    observation=(
        Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(8,)),
        *(Feature(name=name, kind=FeatureKind.IMAGE, dtype="uint8", shape=(64, 64, 3)) for name in TINY_CAMERAS),
    ),
    action=(Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(8,)),),
    control_rate_hz=50.0,
)


def make_tiny_checkpoint(folder: Path) -> None:
    """A flow policy with two small cameras and fresh weights, in a few hundred kilobytes."""
    import torch

    from policies import checkpoint

    torch.manual_seed(0)
    config = {"horizon": 16, "cameras": list(TINY_CAMERAS), "width": 64, "num_blocks": 1, "num_steps": 4}
    policy = checkpoint.build("flow", config, TINY_SPEC)

    def statistics(size: int) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
        values = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0, "q01": -1.0, "q99": 1.0}
        return {name: np.full(size, value) for name, value in values.items()}

    policy.set_statistics({"observation.state": statistics(8), "action": statistics(8)})
    checkpoint.save(policy, folder)


class ServerProcess:
    """A process that says READY host:port; ended at the latest with this one.

    Args:
        words: After the interpreter's name.
        log: Everything it prints.
    """

    def __init__(self, name: str, words: Sequence[str], log: Path) -> None:
        self.name = name
        self._log = log
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [*end_with_parent(), sys.executable, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
                # Ctrl-C in the terminal is for this process, which ends the server after its robots.
                start_new_session=True,
            )
        self.address = self._wait_ready()

    def cpu_s(self) -> float:
        """CPU that it and its children have used."""
        try:
            process = psutil.Process(self.process.pid)
            times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
        except psutil.NoSuchProcess:
            return float("nan")
        return float(sum(one.user + one.system for one in times))

    def loop_cpu_s(self) -> float:
        """CPU of its main thread, which is the event loop: at a core's worth no more robots fit."""
        try:
            threads = psutil.Process(self.process.pid).threads()
        except psutil.NoSuchProcess:
            return float("nan")
        return float(sum(one.user_time + one.system_time for one in threads if one.id == self.process.pid))

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_ready(self) -> str:
        killer = threading.Timer(READY_TIMEOUT_S, self.process.kill)
        killer.start()
        try:
            assert self.process.stdout is not None
            for line in self.process.stdout:
                if line.startswith(READY_PREFIX):
                    return line[len(READY_PREFIX) :].split()[0]
        except BaseException:
            self.process.kill()
            raise
        finally:
            timed_out = killer.finished.is_set()
            killer.cancel()
        self.process.wait()
        lines: list[str] = []
        with contextlib.suppress(OSError):
            lines = self._log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        tail = "\n  ".join(lines)
        if timed_out:
            raise TooLate(f"{self.name} was not ready within {READY_TIMEOUT_S:.0f} s:\n  {tail}")
        raise Refused(f"{self.name} ended with exit code {self.process.returncode}:\n  {tail}")


def inference_service(model: str, checkpoint: Path, flags: Sequence[str], log: Path) -> ServerProcess:
    words = ["-m", "manyhands", "serve", "--model", f"{model}={checkpoint}", "--address", "127.0.0.1:0", *flags]
    return ServerProcess("manyhands serve", [*words, "--log-level", "warning"], log)


def plain_server(checkpoint: Path, device: str, torch_threads: int, log: Path) -> ServerProcess:
    words = ["-m", "services.loadtest.plain_server", str(checkpoint), device, str(torch_threads)]
    return ServerProcess("the plain server", words, log)
