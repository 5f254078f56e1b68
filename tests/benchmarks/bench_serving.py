"""pi052 through the whole service: real processes, real gRPC, simulated robots. The table of docs/design/0016.

python -m tests.benchmarks.bench_serving                           a tiny network on the CPU: does it run?
python -m tests.benchmarks.bench_serving --size full --device cuda --folder /dev/shm --write

One robot beside the engine alone shows what the service adds; 16 robots replan at 5 Hz and ask for a 20-token subtask every
2 s; the same chunks with more and more text show how much the device has left; all weights are swapped under that load, and
back; the server starts without compiled kernels, and with them; a plain websocket server with the plain module serves one
robot. --parts chooses among these.

Results go to $OUT where it is set, with the logs; else, with --write and a full network, to docs/benchmarks. What a part
measured is written before the next one begins.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deploy.local import Service, Topology
from tests.benchmarks.serving import device, loads, model, page, starts, swap
from tests.benchmarks.serving.loads import ASK_EVERY_S, ASK_TOKENS, FLEET, ROBOTS, Found, asking
from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]
PARTS = ("first-start", "alone", "fleet", "text", "swap", "peer")
# Seconds between a robot's questions and tokens of an answer; 0.001: the next question follows the answer.
RUNGS = ((ASK_EVERY_S, ASK_TOKENS), (1.9, 120), (0.001, 120))
START_TIMEOUT_S = 300.0
# Beside what robots take: processes that begin and end.
LOAD_EXTRA_S = 12.0
ALONE_CHUNKS = 100
# Of the weights in the run, and what a disk must keep free beside them.
NUM_VERSIONS, SPARE_BYTES = 2, 1 << 30
PEER_RATE_HZ, PEER_S = 2.0, 10.0


class LeftOut(Exception):
    """There is no time for it."""


class Bench:
    """Args:
        folder: For everything, in memory perhaps.
        disk: For versions of the weights where folder is too small.

    Attributes:
        results, failures: By part.
    """

    def __init__(self, options: argparse.Namespace, folder: Path, disk: Path, topology: Topology) -> None:
        self.results: dict[str, Any] = {}
        self.failures: dict[str, str] = {}
        self._options = options
        self._folder = folder
        self._disk = disk
        self._topology = topology
        self._until_s: float = time.monotonic() + options.budget_s
        self._facts: dict[str, Any] = {}
        self._weights: Service | None = None
        self._server: Service | None = None
        self._metrics_port = free_port()
        processor = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
        self._hardware = f"{processor}, {os.cpu_count()} cores"
        self._checkpoints = options.folder / f"serving-{options.size}" if options.keep else folder

    def run(self) -> None:
        parts = self._options.parts
        begin_s = time.monotonic()
        self._facts = model.make(self._checkpoints, self._options.size, self._options.device)
        # The device is the server's from now on.
        gc.collect()
        if self._options.device == "cuda":
            torch.cuda.empty_cache()
        self._say(f"the checkpoint is there after {time.monotonic() - begin_s:.1f} s; {self._facts}")
        if "swap" in parts:
            self._attempt("weights service", self._start_weights)
        if "first-start" in parts:
            # It finds no compiled kernels; the engine by itself would leave them behind.
            self._attempt("first start", self._first_start)
        if "alone" in parts:
            self._attempt("engine alone", self._engine_alone)
        self._attempt("start", self._start)
        if self._server is None:
            return
        if "alone" in parts:
            self._attempt("load alone", lambda: self._load("--robots", "1", "--rate-hz", "10"))
        if "fleet" in parts:
            self._attempt("fleet", lambda: self._load(*FLEET, *asking(ASK_EVERY_S, ASK_TOKENS)))
        if "text" in parts:
            self._attempt("text", self._texts)
        if "swap" in parts and self._weights is not None:
            self._attempt("swap", self._swap)
        if "peer" in parts:
            self._attempt("peer", self._peer)

    def _attempt(self, part: str, measure: Callable[[], Any]) -> None:
        """Whatever becomes of one part, the others are measured and the page is written."""
        begin_s = time.monotonic()
        try:
            found = measure()
        except LeftOut as reason:
            self.failures[part] = str(reason)
            self._say(f"{part} is left out: {reason}")
        except Exception as error:
            self.failures[part] = f"{type(error).__name__}: {error}"
            self._say(f"{part} failed:\n{traceback.format_exc()}")
        else:
            if found is not None:
                self.results[part] = found
                self._say(f"{part}, {time.monotonic() - begin_s:.0f} s: {json.dumps(found)}")
        try:
            self._write()
        except Exception:  # The next parts are worth more than the page.
            self._say(f"the page cannot be written:\n{traceback.format_exc()}")

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _start_weights(self) -> None:
        checkpoint_bytes = sum(path.stat().st_size for path in (self._checkpoints / model.NAME).iterdir())
        needed = NUM_VERSIONS * checkpoint_bytes + SPARE_BYTES
        roomy = [folder for folder in (self._folder, self._disk) if shutil.disk_usage(folder).free > needed]
        if not roomy:
            raise LeftOut(f"versions need {needed / 1e9:.0f} GB in --folder or in {self._disk}; free some")
        self._say(f"versions go to {roomy[0]}")
        command = ["weights", "--root", str(roomy[0] / "weights"), "--address", "127.0.0.1:0"]
        self._weights = self._topology.start("weights", command)

    def _first_start(self) -> None:
        self._start("first-start")
        self._topology.stop("first-start")
        self._server = None

    def _start(self, name: str = "serve") -> None:
        """The server and how long it took to be ready."""
        options = self._options
        command = ["serve", "--model", f"{model.NAME}={self._checkpoints / model.NAME}", "--device", options.device]
        command += ["--path", "fused", "--max-batch", str(ROBOTS), "--address", "127.0.0.1:0"]
        command += ["--metrics-port", str(self._metrics_port)]
        if self._weights is not None:
            command += ["--weights", self._weights.address]
        launched_unix_s, began_s = time.time(), time.perf_counter()
        service = self._topology.start(name, command, timeout_s=min(START_TIMEOUT_S, self._left_s()))
        ready_s = time.perf_counter() - began_s
        phases = starts.phases(service.log_path, launched_unix_s)
        self._say(f"ready after {ready_s:.1f} s: {phases}")
        # The engine alone compiles what one row needs, a first start everything.
        is_second = name != "first-start" and "first-start" in options.parts
        self.results.setdefault("starts", []).append({"is_second": is_second, "ready_s": ready_s, "phases": phases})
        self._server = service

    def _engine_alone(self) -> Found:
        words = [str(self._checkpoints / model.NAME), self._options.device, self._facts["task"], str(ALONE_CHUNKS)]
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.serving.engine_alone", *words],
            capture_output=True,
            text=True,
            timeout=self._left_s(),
        )
        if done.returncode:
            raise RuntimeError(f"it ended with exit code {done.returncode}:\n{done.stderr[-4000:]}")
        found: Found = json.loads(done.stdout.splitlines()[-1])
        return found

    def _load(self, *flags: str, seconds: float | None = None) -> Found:
        seconds = seconds or self._options.seconds
        self._need(seconds + LOAD_EXTRA_S)
        assert self._server is not None
        flags = ("--seconds", str(seconds), *flags)
        meter = device.Meter(self._metrics_port)
        found = loads.run(self._server.address, self._facts["task"], self._folder, *flags, timeout_s=self._left_s())
        self._tell_device(found, meter)
        return found

    def _tell_device(self, load: Found, meter: device.Meter) -> None:
        load["device"] = meter.found(load["seconds"])
        self._say(f"device, ms of each second: {device.line(load['device'])}")

    def _texts(self) -> None:
        """Longest answers last; the first is the fleet's own load, where that was measured."""
        found: list[Found] = []
        for every_s, most in RUNGS:
            tokens = min(most, self._facts["max_new_tokens"])
            asked = f"{tokens} every {every_s:g} s" if every_s >= 0.1 else f"{tokens}, one answer after the other"
            known = self.results.get("fleet") if (every_s, most) == (ASK_EVERY_S, ASK_TOKENS) else None
            try:
                load = known or self._load(*FLEET, *asking(every_s, tokens), seconds=self._options.text_seconds)
            except Exception as error:
                if not found:
                    raise
                self.failures["text"] = f"{asked} and more: {error}"
                self._say(f"the text loads end with {asked}:\n{traceback.format_exc()}")
                break
            found.append({"asked": asked, "load": load})
            self._say(f"{asked}: {json.dumps(load)}")
            self.results["text"] = found
            self._write()

    def _swap(self) -> Found:
        assert self._weights is not None
        assert self._server is not None
        published_s = swap.publish(self._weights, self._checkpoints, self._say)
        settle_s = max(5.0, self._options.seconds / 2)
        self._need(3 * settle_s + LOAD_EXTRA_S)
        meter = device.Meter(self._metrics_port)
        found = swap.measure(
            self._topology, self._server, self._facts["task"], self._folder, settle_s, self._left_s(), self._say
        )
        self._tell_device(found["load"], meter)
        return {"published_s": published_s, **found}

    def _peer(self) -> Found:
        robot = ("--robots", "1", "--rate-hz", str(PEER_RATE_HZ))
        plain = ("--compare", "--checkpoint", str(self._checkpoints / model.NAME), "--device", self._options.device)
        return self._load(*robot, *plain, seconds=min(PEER_S, self._options.seconds))

    # -- time, and what is written -------------------------------------------------------------------------------------

    def _left_s(self) -> float:
        return max(1.0, self._until_s - time.monotonic())

    def _need(self, seconds: float) -> None:
        if self._left_s() < seconds:
            raise LeftOut(f"takes over {seconds:.0f} s, {self._left_s():.0f} of --budget-s are left")

    def _say(self, what: str) -> None:
        print(f"[{self._options.budget_s - (self._until_s - time.monotonic()):.0f} s] {what}", flush=True)

    def page(self) -> list[str]:
        options, facts = self._options, self._facts
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        settings = [
            f"{self._hardware}; torch {torch.__version__}; commit {options.commit or git.stdout.strip() or 'unknown'}. "
            f"{options.seconds:g} s a load, {options.text_seconds:g} s for more text.",
            f"3 cameras, {facts.get('prompt_tokens')} prompt tokens of a chunk and {facts.get('question_tokens')} of a "
            "question, 50 actions, 10 Euler steps, random weights; robots on the same machine, JPEG q95 over loopback gRPC, "
            f"{loads.DEADLINE_MS:g} ms given. Robots replan at their own rate, whatever interval the server asks for.",
        ]
        if options.size == "tiny":
            settings.append("A tiny network, its numbers say nothing.")
        return page.lines(f"pi052 through the service, {options.size} network", settings, self.results, self.failures)

    def _write(self) -> None:
        options = self._options
        if "OUT" in os.environ:
            out = Path(os.environ["OUT"])
            (out / "serving.json").write_text(json.dumps({"results": self.results, "failures": self.failures}) + "\n")
            for log in self._topology.log_dir.glob("*.log"):
                shutil.copy(log, out)
        elif options.write and options.size == "full":
            out = ROOT / "docs" / "benchmarks"
        else:
            return
        (out / f"{datetime.date.today()}-serving.md").write_text("\n".join(self.page()) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--parts", type=_parts, default=PARTS, help=f"comma-separated, of {', '.join(PARTS)}; all by default"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--text-seconds", type=float, default=10.0, help="of each load with more text")
    parser.add_argument("--budget-s", type=float, default=570.0, help="what would take longer is left out, and said so")
    parser.add_argument("--folder", type=Path, help="for the checkpoint and versions; memory is faster than a disk")
    parser.add_argument(
        "--keep", action="store_true", help="leave the checkpoint in --folder, and take the one that is there"
    )
    parser.add_argument("--commit", default="", help="where the sources lie outside a repository")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.keep and options.folder is None:
        parser.error("--keep needs --folder")
    # Processes started here find the sources, and may be interrupted even where a shell put this one into the background.
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH", "")) if path)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as directory, tempfile.TemporaryDirectory() as disk:
        folder = Path(directory)
        with Topology(folder / "logs") as topology:
            bench = Bench(options, folder, Path(disk), topology)
            try:
                bench.run()
            finally:
                for log in (folder / "logs").glob("*.log"):
                    print(log.name, log.read_text()[-1500:], flush=True)
    print("\n".join(bench.page()))
    return 1 if bench.failures else 0


def _parts(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    unknown = set(chosen) - set(PARTS)
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
