"""How late a thread of an engine launches something while a version of the weights comes in.

    python -m tests.benchmarks.bench_bring_in [--gigabytes 1.6] [--write]

An engine's thread launches its next unit shortly before the device is free, in a dozen small calls that each let go of the
interpreter: whoever wants it too makes every robot's chunk late. A thread of this process sleeps half a millisecond, makes
such calls, and notes how much longer than the sleep that took; a process with nothing else to do does the same, and shows
what of that is the machine's. The weights service is a process of its own; one of the tensors has 400 MB, as a vocabulary's
table. --write also writes docs/benchmarks/<date>-bring-in.md.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch

from deploy.local import Topology
from manyhands.clients.weights import WeightsClient
from manyhands.weights.v1 import weights_pb2
from policies import checkpoint
from policies.tensor_file import is_finite
from services.inference.engine_process import SWITCH_INTERVAL_S
from services.inference.fused.courier import Courier
from services.inference.spare import Source, Spare
from services.inference.weights_bringer import WeightsBringer
from services.inference.weights_follower import STAGING_NICENESS
from services.weights.servicer import FETCHED_PIECE_BYTES

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "docs" / "benchmarks" / f"{datetime.date.today().isoformat()}-bring-in.md"
TICK_S = 0.0005
LATE_S = 0.002
CALLS_OF_LAUNCH = 12
TABLE_BYTES = 400_000_000
MATRIX = (2048, 8192)
IDLE_S = 3.0

Late = list[float]


class Model(torch.nn.Module):
    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self.table = made(TABLE_BYTES // 2)
        for index in range(max(1, (num_bytes - TABLE_BYTES) // (2 * MATRIX[0] * MATRIX[1]))):
            self.register_parameter(f"matrix_{index}", made(*MATRIX))


def made(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.rand(shape).to(torch.bfloat16), requires_grad=False)


def tick(ended: Callable[[], bool]) -> Late:
    """How many seconds longer than the sleep it took, each time, until something was launched."""
    late, places = [], torch.zeros(2, 64, dtype=torch.int32)
    while not ended():
        begin_s = time.perf_counter()
        time.sleep(TICK_S)
        for _ in range(CALLS_OF_LAUNCH):
            places[0].copy_(places[1])
        late.append(time.perf_counter() - begin_s - TICK_S)
    return late


@dataclass
class Phase:
    """Attributes:
    here: Of the thread of this process.
    elsewhere: Of the process beside it.
    """

    name: str
    took_s: float
    here: Late
    elsewhere: Late


@dataclass
class Measured:
    phases: list[Phase] = field(default_factory=list)

    def phase(self, name: str, work: Callable[[], Any]) -> None:
        """Runs work on a thread of low priority, as versions are staged."""
        ended = threading.Event()
        late: Late = []
        ticking = threading.Thread(target=lambda: late.extend(tick(ended.is_set)))
        # Ends with its standard input.
        command = [sys.executable, "-m", "tests.benchmarks.bench_bring_in", "--ticker"]
        beside = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert beside.stdout is not None
        beside.stdout.readline()
        working = threading.Thread(target=staging, args=(work,))
        ticking.start()
        begin_s = time.perf_counter()
        working.start()
        working.join()
        took_s = time.perf_counter() - begin_s
        ended.set()
        ticking.join()
        output, _ = beside.communicate()
        self.phases.append(Phase(name, took_s, late, json.loads(output)))


def staging(work: Callable[[], Any]) -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), STAGING_NICENESS)
    work()


def beside() -> None:
    """The other process."""
    print("ticking", flush=True)
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    print(json.dumps(tick(ended.is_set)))


class Here:
    """As versions came in before: received and looked through in the engine's process, piece by piece."""

    def __init__(self, client: WeightsClient, state: Mapping[str, torch.Tensor]) -> None:
        self._client = client
        self._state = state

    def fetch_into(
        self, entries: Iterable[weights_pb2.TensorEntry], place: Callable[[weights_pb2.TensorEntry], Any]
    ) -> Iterator[weights_pb2.TensorEntry]:
        for entry in self._client.fetch_into(entries, place):
            assert is_finite(self._state[entry.name])
            yield entry


def measure(num_bytes: int) -> tuple[Measured, float]:
    """Phases, and how many seconds publishing took."""
    measured = Measured()
    with tempfile.TemporaryDirectory() as directory, Topology(Path(directory) / "logs") as topology:
        command = ["weights", "--root", f"{directory}/weights", "--address", "127.0.0.1:0"]
        live = Model(num_bytes)
        address = topology.start("weights", command).address
        with WeightsClient(address, timeout_s=60.0) as client:
            begin_s = time.perf_counter()
            client.publish(
                model="bench",
                policy_type="bench",
                config_json="{}",
                spec=None,
                tensors=checkpoint.as_wire({name: tensor * 0.5 for name, tensor in live.state_dict().items()}),
                publish_id="bench/1",
            )
            publish_s = time.perf_counter() - begin_s
            manifest = client.get_manifest("bench")
            measured.phase("nothing", lambda: time.sleep(IDLE_S))
            spares: list[Spare] = []
            measured.phase("making the spare copy", lambda: spares.append(Spare.of(live)))
            (spare,) = spares

            def fill(source: Source) -> None:
                spare.digests.clear()
                spare.fill(manifest, source, live=live, live_digests={}, check_going_on=lambda: None)

            state = spare.policy.state_dict()
            here, bringer = Here(client, state), WeightsBringer(address)
            fill(bringer)  # Its pages are there from now on.
            measured.phase("a version, received and checked in this process", lambda: fill(here))
            measured.phase("a version, by a process of its own", lambda: fill(bringer))
            measured.phase("in this process again", lambda: fill(here))
            measured.phase("by a process of its own again", lambda: fill(bringer))
            courier, buffer = Courier(torch.device("cpu")), torch.zeros(TABLE_BYTES // 2, dtype=torch.bfloat16)
            measured.phase(
                "copies as the courier makes them on a CPU",
                lambda: [courier.bring(tensor, buffer[: tensor.numel()]) for tensor in state.values()],
            )
    return measured, publish_s


def in_row(late: Late) -> str:
    """p50, p99, max, ms, and the share beyond LATE_S."""
    milliseconds = np.array(late or [0.0]) * 1e3
    p50, p99 = np.percentile(milliseconds, (50, 99))
    share = (milliseconds > LATE_S * 1e3).mean()
    return f"{p50:.2f} / {p99:.2f} / {milliseconds.max():.1f} | {share:.2%}"


def report(measured: Measured, publish_s: float, num_bytes: int) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    rows = "\n".join(
        f"| {phase.name} | {phase.took_s:.2f} | {in_row(phase.here)} | {in_row(phase.elsewhere)} |"
        for phase in measured.phases
    )
    here = f"{os.cpu_count()} cores ({platform.machine()})"
    return f"""# A version of the weights comes in, {datetime.date.today()}

`python -m tests.benchmarks.bench_bring_in --gigabytes {num_bytes / 1e9:g}` on {here},
load average {os.getloadavg()[0]:.1f}; torch {torch.__version__}, gRPC {grpc.__version__}, commit {commit}.
{num_bytes / 1e9:g} GB of bfloat16, one tensor of {TABLE_BYTES / 1e6:g} MB; the weights service on the same cores.
Publishing took {publish_s:.1f} s.

A thread sleeps {TICK_S * 1e3:g} ms and makes {CALLS_OF_LAUNCH} small calls of torch, as a launch does.
How much longer than the sleep that took, p50 / p99 / max in ms, and how often more than {LATE_S * 1e3:g} ms;
the same of a process that does nothing else.

| meanwhile | s | this process | late | another process | late |
|---|---|---|---|---|---|
{rows}

A thread waits for a core as any process does; what it waits longer than the other one is the interpreter. "In this process"
is how versions came in before, in messages of {FETCHED_PIECE_BYTES // 1024} KiB.
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1.6)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--ticker", action="store_true", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.ticker:
        beside()
        return
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    torch.set_num_threads(1)
    num_bytes = int(settings.gigabytes * 1e9)
    text = report(*measure(num_bytes), num_bytes)
    print(text)
    if settings.write:
        REPORT.write_text(text)


if __name__ == "__main__":
    main()
