"""What a control period costs an actor: observation and command over loopback, against an empty call on the same server.

python -m tests.benchmarks.bench_robot_agent            prints the table
python -m tests.benchmarks.bench_robot_agent --write    also writes docs/benchmarks/<date>-robot-agent.md
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from manyhands.channel import connect
from manyhands.clients.robot import RobotClient

ROOT = Path(__file__).parents[2]
PERIODS = 400
VIEW_S = 4.0


def processor() -> str:
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"{len(names)} x {names[0] if names else platform.processor()}"


def milliseconds(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """p50 and p99."""
    for _ in range(20):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return float(np.percentile(times, 50)), float(np.percentile(times, 99))


def percent_of_a_core(process: psutil.Process, seconds: float) -> float:
    before = process.cpu_times()
    time.sleep(seconds)
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / seconds * 100


def view(address: str, seconds: float, count: int) -> list[threading.Thread]:
    def look() -> None:
        end = time.monotonic() + seconds
        with RobotClient(address) as viewer:
            for _ in viewer.observe(5.0):
                if time.monotonic() > end:
                    return

    threads = [threading.Thread(target=look) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def measure(robot: str) -> list[str]:
    rows = []
    with tempfile.TemporaryDirectory() as state:
        command = [sys.executable, "-m", "manyhands", "robot", "--robot", robot, "--address", "127.0.0.1:0"]
        command += ["--state-dir", state, "--watchdog-s", "5", "--log-level", "warning"]
        agent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert agent.stdout is not None
            address = agent.stdout.readline().split()[1]
            with connect(address) as channel, RobotClient(address) as client:
                health = health_pb2_grpc.HealthStub(channel)
                client.acquire("benchmark", ttl_s=30)
                client.reset(0)
                action = client.get_observation(teleoperator="expert").teleop_action

                def period() -> None:
                    client.get_observation()
                    client.command(action)

                def pictures() -> None:
                    client.command(action)  # Else the pictures of the last period would be answered again.
                    client.get_observation(include_images=True)

                for name, call, repeats in (
                    ("empty call (floor)", lambda: health.Check(health_pb2.HealthCheckRequest(), timeout=2), PERIODS),
                    ("observation, no pictures", client.get_observation, PERIODS),
                    ("command", lambda: client.command(action), PERIODS),
                    ("observation and command", period, PERIODS),
                    ("command, observation with two JPEG pictures", pictures, 60),
                ):
                    p50, p99 = milliseconds(call, repeats)
                    rows.append(f"| {robot} | {name} | {p50:.2f} ms | {p99:.2f} ms |")
                client.release()
                process = psutil.Process(agent.pid)
                for name, count in (("idle", 0), ("1 viewer at 5 Hz", 1), ("4 viewers at 5 Hz", 4)):
                    threads = view(address, VIEW_S + 1, count)
                    rows.append(
                        f"| {robot} | agent's processor time, {name} | {percent_of_a_core(process, VIEW_S):.1f} % | |"
                    )
                    for thread in threads:
                        thread.join()
        finally:
            agent.terminate()
            agent.wait(10)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/<date>-robot-agent.md")
    write = parser.parse_args().write
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    table = [row for robot in ("arm", "metaworld") for row in measure(robot)]
    text = "\n".join(
        [
            "# Robot agent: what a control period costs",
            "",
            f"{processor()}, Python {platform.python_version()}, commit {commit.stdout.strip()}, "
            f"load average {os.getloadavg()[0]:.1f}. One client, plain loopback, `tests/benchmarks/bench_robot_agent.py`.",
            "",
            "| robot | what | p50 | p99 |",
            "|---|---|---|---|",
            *table,
            "",
        ]
    )
    print(text)
    if write:
        (ROOT / "docs" / "benchmarks" / f"{datetime.date.today()}-robot-agent.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
